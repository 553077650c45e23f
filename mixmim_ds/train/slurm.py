"""What SLURM tells a task that `srun` has started (srun(1), "OUTPUT ENVIRONMENT VARIABLES")."""

import itertools
import os
import platform
import re
from collections.abc import Iterable

PORTS = 10_000  # of a job's rendezvous, from 10,000 on: below the ports that Linux gives to outgoing connections


def adopt() -> None:
    """Announces this task's rank as torchrun would, if it is one of several that srun has started.

    Rank 0 lies on the first node of the step, for srun gives out ranks node by node (--distribution=block). Whoever
    sets MASTER_ADDR or MASTER_PORT knows better.
    """
    given = os.environ
    if "RANK" in given or int(given.get("SLURM_STEP_NUM_TASKS", 1)) == 1:
        return
    given |= {"RANK": given["SLURM_PROCID"], "WORLD_SIZE": given["SLURM_STEP_NUM_TASKS"]}
    given["LOCAL_RANK"] = "0" if _has_own_gpu() else given["SLURM_LOCALID"]
    given.setdefault("MASTER_ADDR", nodes()[0])
    given.setdefault("MASTER_PORT", str(PORTS + int(given["SLURM_JOB_ID"]) % PORTS))


def _has_own_gpu() -> bool:
    """Whether this task sees one GPU of several that its step has here, as with --gpus-per-task=1 or --gpu-bind.

    SLURM (22.05) tells a task of neither option, so what it sees decides. One of one is shared by the tasks there are.
    """
    seen = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
    return len(seen) == 1 and int(os.environ.get("SLURM_GPUS_ON_NODE", 0)) > 1


def nodes() -> list[str]:
    """The nodes of this step in the order of their ranks; this machine alone without SLURM."""
    return expand(os.environ.get("SLURM_STEP_NODELIST", platform.node()))


def places() -> list[str]:
    """The node of each rank of this step; none where srun has not started the ranks."""
    told = re.findall(r"(\d+)(?:\(x(\d+)\))?", os.environ.get("SLURM_STEP_TASKS_PER_NODE", ""))  # "8(x2),4"
    tasks = [int(count) for count, times in told for _ in range(int(times or 1))]
    return [name for name, count in zip(nodes(), tasks, strict=False) for _ in range(count)]


def cores_of_task() -> int | None:
    """The cores that this task is to take, whatever it sees: those it was given, or else its part of the step's on this
    node, all of which srun leaves in sight of every task that it does not bind. None where neither is told."""
    if "SLURM_CPUS_PER_TASK" in os.environ:
        return int(os.environ["SLURM_CPUS_PER_TASK"])
    here, cores = places().count(node()), int(os.environ.get("SLURM_CPUS_ON_NODE", 0))
    return max(1, cores // here) if here and cores else None


def leave_out(names: Iterable[str]) -> str:
    """How a job does without some nodes, to follow other advice; nothing where they are not SLURM's."""
    names = list(names)
    ours = set(names) <= set(expand(os.environ.get("SLURM_JOB_NODELIST", "")))
    return f", or leave the node out: sbatch --exclude={','.join(names)}" if ours else ""


def node() -> str:
    """This machine as SLURM calls it, or else as it calls itself."""
    return os.environ.get("SLURMD_NODENAME", platform.node())


def expand(nodelist: str) -> list[str]:
    """The names in SLURM's short form: "n[1-2,08],gpu" -> n1, n2, n08, gpu."""
    names: list[str] = []
    for entry in re.findall(r"(?:[^,\[]|\[[^\]]*\])+", nodelist):
        parts = re.split(r"\[([^\]]*)\]", entry)
        choices = [_numbers(part) if place % 2 else [part] for place, part in enumerate(parts)]
        names += map("".join, itertools.product(*choices))
    return names


def _numbers(ranges: str) -> list[str]:
    """ "1-2,08" -> 1, 2, 08."""
    numbers: list[str] = []
    for piece in ranges.split(","):
        first, _, last = piece.partition("-")
        numbers += [f"{number:0{len(first)}}" for number in range(int(first), int(last or first) + 1)]
    return numbers
