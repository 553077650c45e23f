"""The processes of a run: who they are, how they meet, agree and part."""

import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import _world

from mixmim_ds.device import on_gpu
from mixmim_ds.libc import die_with_parent, keep_memory
from mixmim_ds.train.slurm import adopt, cores_of_task, node

try:
    from torch.distributed import set_timeout
except ImportError:  # torch before it became public
    from torch.distributed.distributed_c10d import _set_pg_timeout as set_timeout

T = TypeVar("T")
EXIT_REQUEUE = 85  # stopped on request with everything saved


class RunFailed(Exception):
    """The run cannot go on; the message is the one line that says why, the exit code is 1."""


class RankFailed(RunFailed):
    """A failure that this rank alone may know of, and so must tell by itself."""


class PeerLost(RankFailed):
    """This rank waited in vain for another one, whose failure is the reason."""


class RankMistaken(ValueError):
    """A user's mistake that the first rank cannot see; the rank that raises it prints it."""


class AgreedMistake(ValueError):
    """A mistake that all ranks have been told of."""


def is_peer_lost(error: RuntimeError) -> bool:
    """Whether a collective failed rather than the computation."""
    return isinstance(error, dist.DistError) or any(word in str(error) for word in ("gloo", "pair closure"))


@dataclass(frozen=True)
class World:
    """This process among all of the run."""

    rank: int
    size: int
    device: torch.device
    control: dist.ProcessGroup  # gloo: what the hosts tell each other never waits for a GPU

    @property
    def first(self) -> bool:
        """The rank that writes what is written once."""
        return self.rank == 0


def rank_before_connecting() -> int:
    """This process's rank as its launcher announced it; 0 for a single process."""
    adopt()
    return int(os.environ.get("RANK", 0))


def tell(error: ValueError | RunFailed) -> int:
    """Prints the one line of an error, on rank 0 unless this rank alone may know of it; the exit code that it means."""
    if rank_before_connecting() == 0 or isinstance(error, (RankFailed, RankMistaken)):
        print(f"error: {error}", file=sys.stderr)
    return 2 if isinstance(error, ValueError) else 1


def connect(timeout_s: int) -> World:
    """Meets the other processes, as started by `deepspeed`, `torchrun`, `srun`, or alone.

    Args:
        timeout_s: seconds that a collective may take; `shorten_timeout` changes it once training runs.

    Raises:
        ValueError: a node has more processes than GPUs.
        RunFailed: the port that the first rank is to be met at is taken.
    """
    adopt()
    alone: dict[str, Any] = {}
    if "RANK" not in os.environ:  # a launcher sets it; others, such as MASTER_ADDR, may stand in any shell
        os.environ |= {"WORLD_SIZE": "1", "LOCAL_RANK": "0"}  # not RANK, for a process may connect again
        alone = {"store": dist.HashStore(), "rank": 0, "world_size": 1}  # a port could be taken by then
    else:
        # A launcher that is killed would leave its ranks behind, training on unseen: they stop, saved, instead.
        die_with_parent(signal.SIGTERM)
    device = _own_device()
    gpu = device.type == "cuda"
    if gpu:
        torch.cuda.set_device(device)
    else:
        keep_memory()
    torch.set_num_threads(share_of_cores())  # beside GPUs for the optimizer that zero3_offload has on the host
    timeout = timedelta(seconds=timeout_s)
    try:
        dist.init_process_group("nccl" if gpu else "gloo", timeout=timeout, device_id=device if gpu else None, **alone)
    except dist.DistNetworkError as error:
        if "EADDRINUSE" not in str(error):
            raise
        raise RunFailed(
            f"port {os.environ['MASTER_PORT']} of {node()} is taken, perhaps by another run; choose another one "
            "(deepspeed --master_port N, torchrun --master-port N, MASTER_PORT=N srun)."
        ) from error
    control: Any = dist.new_group(backend="gloo", timeout=timeout)
    # Until all have met: the first rank serves their meeting, and may be about to end with a mistake.
    dist.barrier(control)
    return World(dist.get_rank(), dist.get_world_size(), device, control)


def _own_device() -> torch.device:
    """The GPU of this process, or the CPU. ValueError where there are fewer GPUs than processes."""
    if not on_gpu():
        return torch.device("cpu")
    local_rank = int(os.environ["LOCAL_RANK"])
    if local_rank >= torch.cuda.device_count():
        # The other ranks wait for this one and its like: the first of them tells.
        kind = RankMistaken if local_rank == torch.cuda.device_count() else ValueError
        raise kind(
            f"more processes were started on {node()} than its {torch.cuda.device_count()} GPUs; "
            "start one per GPU (deepspeed --num_gpus N, srun --ntasks-per-node=N)."
        )
    return torch.device("cuda", local_rank)


def share_of_cores() -> int:
    """This process's part of the cores that the job may use on this node."""
    local = int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or 1)
    cores = len(os.sched_getaffinity(0))
    return max(1, min(cores // local, cores_of_task() or cores))


def shorten_timeout(timeout_s: int) -> None:
    """From the first finished step on a collective is quick: one that is not means that a rank is dead.

    All groups there are, for DeepSpeed's own, which carry the gradients, have a timeout of half an hour.
    """
    for group in list(_world.pg_map):
        set_timeout(timedelta(seconds=timeout_s), group)


@contextmanager
def connected(timeout_s: int) -> Iterator[World]:
    """`connect`, and parting when all is done; after an error the process is still connected, and `end` is to end it.

    Raises:
        ValueError, RunFailed: as `connect`.
    """
    yield connect(timeout_s)
    disconnect()


def disconnect() -> None:
    """Parts; without it a process that is done can end with an error code."""
    if not dist.is_initialized():
        return
    deepspeed = sys.modules.get("deepspeed")
    if deepspeed is not None and deepspeed.comm.is_initialized():
        deepspeed.comm.destroy_process_group()  # forgets its own groups, too, which another engine would take up
    else:
        dist.destroy_process_group()


def end(code: int) -> int:
    """The exit code, for a process that parted from the others; one that did not is ended here.

    What takes down groups, the interpreter's own end too, waits for the other ranks, and under NCCL for as long as a
    collective may take: the launcher would learn of the failure much later.
    """
    if dist.is_initialized():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    return code


def on_first_rank(world: World, function: Callable[[], Any]) -> Any:
    """Calls `function` on rank 0 alone; every rank gets its result, or the ValueError that it raised, or RunFailed for
    an OSError: disks may come back, so that is no mistake."""
    answer: list[Any] = [None, None]
    if world.first:
        answer = list(_tried(function))
    dist.broadcast_object_list(answer, src=0, group=world.control)
    if answer[1] is not None:
        raise answer[1]
    return answer[0]


def made_once(world: World, function: Callable[[], T]) -> T:
    """What `function` gives on every rank, where rank 0, called before the others, makes what they find."""
    made: list[T] = []
    on_first_rank(world, lambda: made.append(function()))
    # a rank that does not find it must be heard, for the first one alone tells mistakes
    on_every_rank(world, lambda: None if made else made.append(function()))
    return made[0]


def on_every_rank(world: World, function: Callable[[], Any]) -> list[Any]:
    """Calls `function` on every rank; every rank gets all results, or the first error, as of `on_first_rank`."""
    answers, errors = zip(*gather(world, _tried(function)), strict=True)
    for error in filter(None, errors):
        raise error
    return list(answers)


def _tried(function: Callable[[], T]) -> tuple[T | None, AgreedMistake | RunFailed | None]:
    """What a function gives, or the error that all ranks are to raise."""
    try:
        return function(), None
    except ValueError as error:
        return None, AgreedMistake(str(error))
    except OSError as error:
        return None, RunFailed(str(error))


def gather(world: World, value: Any) -> list[Any]:
    """What every rank brings, in the order of the ranks."""
    values: list[Any] = [None] * world.size
    dist.all_gather_object(values, value, group=world.control)
    return values


def gather_on_first(world: World, value: Any) -> list[Any]:
    """As `gather`, on rank 0 alone; nothing elsewhere."""
    values: list[Any] = [None] * world.size if world.first else []
    dist.gather_object(value, values if world.first else None, dst=0, group=world.control)
    return values


def mean_over_ranks(world: World, value: float) -> float:
    """The mean of one number of every rank."""
    total = torch.tensor(value, dtype=torch.float64)
    dist.all_reduce(total, group=world.control)
    return total.item() / world.size
