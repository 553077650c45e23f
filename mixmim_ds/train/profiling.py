"""What a run does in a few of its steps, traced on every rank, to look at."""

import logging
import time
from contextlib import suppress
from pathlib import Path
from typing import Self

import torch
from torch.profiler import ProfilerActivity, profile, schedule

from mixmim_ds.config import RunConfig
from mixmim_ds.device import on_gpu
from mixmim_ds.train.distributed import World, is_peer_lost

OPERATORS = 30  # lines of a table
ALLOCATIONS = 1_000_000  # that a memory snapshot goes back at most
log = logging.getLogger("mixmim_ds")


def activities() -> list[ProfilerActivity]:
    """What PyTorch's profiler is to see: the host's operators, and where there is a GPU its kernels."""
    return [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if on_gpu() else [])


class Profiler:
    """Traces the steps `train.profile` into run_dir/profile, some files a rank.

    `.trace.json.gz` is for https://ui.perfetto.dev and chrome://tracing, `.operators.txt` a table of what took longest,
    and `.memory.pickle`, of GPUs alone, for https://pytorch.org/memory_viz. A run that stops between the steps keeps
    what there is, and the next start traces the others; one that fails there, inside `with`, keeps what led to it. What
    cannot be written is told, and the run goes on.

    Args:
        start: steps done so far.
        last: the step after which the run ends.
    """

    def __init__(self, config: RunConfig, world: World, start: int, last: int) -> None:
        self.world, self.folder = world, Path(config.run_dir) / "profile"
        self.running: profile | None = None
        first, until = config.train.profile or (0, 0)
        self.first, self.until = max(first, start + 1), min(until, last)
        if config.train.profile and self.first > self.until:
            log.warning("train.profile has no effect: this start does steps %s to %s", f"{start + 1:,}", f"{last:,}")
        self.step(start)

    def step(self, done: int) -> float:
        """To be called after every step; returns the seconds that it took."""
        began, self.done = time.perf_counter(), done
        if self.running:
            self.running.step()
        elif self.first <= self.until and done in (self.first - 2, self.first - 1):
            self._begin(warmup=self.first - 1 - done)
        return time.perf_counter() - began

    def close(self) -> None:
        """Writes what has been traced so far, if the run stops meanwhile."""
        if self.running:
            self.running.stop()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: object) -> None:
        """After an error writes the trace up to it: of a GPU out of memory its snapshot tells what has taken it."""
        # A GPU that waits for a rank that is gone would have the profiler wait, too.
        if error is None or (on_gpu() and isinstance(error, RuntimeError) and is_peer_lost(error)):
            return
        self.done = max(self.done, self.first)  # of the step that failed there is a part
        with suppress(RuntimeError):  # the GPU's own failure comes again; it is told by the one that is under way
            self.close()

    def _begin(self, warmup: int) -> None:
        """The step before is traced too and thrown away, for the first one pays for the profiler's own start."""
        steps = schedule(wait=0, warmup=warmup, active=self.until - self.first + 1, repeat=1)
        self.running = profile(activities=activities(), schedule=steps, on_trace_ready=self._write, record_shapes=True)
        self.running.start()
        if on_gpu():
            torch.cuda.memory._record_memory_history(max_entries=ALLOCATIONS, stacks="python")

    def _write(self, record: profile) -> None:
        self.running = None
        stem = str(self.folder / f"steps_{self.first}-{self.done}.rank_{self.world.rank}")
        order = "self_cuda_time_total" if on_gpu() else "self_cpu_time_total"
        try:
            self.folder.mkdir(exist_ok=True)
            record.export_chrome_trace(f"{stem}.trace.json.gz")
            Path(f"{stem}.operators.txt").write_text(record.key_averages().table(sort_by=order, row_limit=OPERATORS))
            if on_gpu():
                torch.cuda.memory._dump_snapshot(f"{stem}.memory.pickle")
            log.info("steps %s to %s are profiled in %s", self.first, self.done, self.folder)
        except OSError as error:
            log.warning("%s cannot be written (%s)", self.folder, error.strerror)
        finally:
            if on_gpu():
                torch.cuda.memory._record_memory_history(enabled=None)
