"""How a run that is asked to stop does so: on all ranks, after the same step."""

import os
import signal
from pathlib import Path
from types import FrameType

import torch
import torch.distributed as dist

from mixmim_ds.train.distributed import World


class StopRequest:
    """SIGTERM, SIGINT or SIGUSR1 on any rank becomes a stop of all ranks after the same step.

    The agreement runs on the hosts while the next step computes, so it costs no time; a stop takes effect one step
    after the signal. So does the end of the `deepspeed` command, which leaves its launcher and the ranks behind.
    """

    SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)

    def __init__(self, world: World) -> None:
        self.world = world
        self.signals, self.starter = 0, _starter()
        self.pending: tuple[torch.Tensor, dist.Work] | None = None

    def listen(self) -> None:
        """From here on signals are heeded. Before, while images are looked through, they end the process as they do any
        other."""
        for number in self.SIGNALS:
            signal.signal(number, self._note)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.signals += 1

    def close(self) -> None:
        """From here on a signal has nothing to stop; in the last moments of the interpreter it would kill instead."""
        for number in self.SIGNALS:
            signal.signal(number, signal.SIG_IGN)

    def agreed(self) -> bool:
        """Whether any rank had been asked to stop when this was called last; call it once a step on every rank."""
        stop = self.settle()
        flag = torch.tensor(self.signals + (_starter() != self.starter))
        work = dist.all_reduce(flag, dist.ReduceOp.MAX, group=self.world.control, async_op=True)
        self.pending = (flag, work)
        return stop

    def settle(self) -> bool:
        """Finishes the agreement under way; True if it says stop."""
        if self.pending is None:
            return False
        flag, work = self.pending
        work.wait()
        self.pending = None
        return bool(flag.item())


def _starter() -> str | None:
    """The process that has started this one's launcher, if that is DeepSpeed's: the command that users see and stop,
    which passes on nothing but Ctrl-C. What ends a launcher itself reaches its ranks by `die_with_parent`."""
    launcher = Path(f"/proc/{os.getppid()}")
    try:
        if b"deepspeed.launcher.launch" not in (launcher / "cmdline").read_bytes():
            return None
        return (launcher / "stat").read_text().rpartition(")")[2].split()[1]
    except OSError:  # it is gone
        return None
