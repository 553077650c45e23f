"""Ranks and places as SLURM tells them."""

import os

import pytest

from mixmim_ds.benchmark.options import run_options
from mixmim_ds.train.distributed import rank_before_connecting, share_of_cores
from mixmim_ds.train.slurm import adopt, expand

TASK = {
    "SLURM_PROCID": "9", "SLURM_LOCALID": "1", "SLURM_STEP_NUM_TASKS": "16", "SLURM_STEP_NODELIST": "gpu[03-04]",
    "SLURM_JOB_ID": "1234567",
}  # fmt: skip
NAMES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


@pytest.fixture(autouse=True)
def _bare(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither a launcher's variables nor SLURM's; what a test sets is gone after it."""
    for name in [*NAMES, *(name for name in os.environ if name.startswith("SLURM_"))]:
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)


def placed() -> tuple[str | None, ...]:
    adopt()
    return tuple(os.environ.get(name) for name in NAMES)


def test_a_task_of_srun_knows_its_rank_and_where_to_meet(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in TASK.items():
        monkeypatch.setenv(name, value)
    assert placed() == ("9", "16", "1", "gpu03", "14567")
    assert placed() == ("9", "16", "1", "gpu03", "14567"), "asked again"
    assert rank_before_connecting() == 9


def test_a_benchmark_of_several_tasks_knows_how_many_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in TASK.items():
        monkeypatch.setenv(name, value)
    assert run_options(["train.micro_batch=4"], {"data": "synthetic"}).train.global_batch == 64


def test_who_sets_the_meeting_point_knows_better(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (TASK | {"MASTER_ADDR": "10.0.0.7", "MASTER_PORT": "4444"}).items():
        monkeypatch.setenv(name, value)
    assert placed()[3:] == ("10.0.0.7", "4444")


@pytest.mark.parametrize(
    ("seen", "given", "local_rank"),
    [("1", "2", "0"), ("GPU-5e1f", "8", "0"), ("0,1", "2", "1"), ("0", "1", "1"), ("", "2", "1"), (None, None, "1")],
)
def test_a_gpu_of_its_own_is_a_tasks_first(
    seen: str | None, given: str | None, local_rank: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With --gpus-per-task=1, say. Two tasks that see the same GPU have none of their own."""
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    for name, value in (TASK | {"CUDA_VISIBLE_DEVICES": seen, "SLURM_GPUS_ON_NODE": given}).items():
        if value is not None:
            monkeypatch.setenv(name, value)
    assert placed()[:3] == ("9", "16", local_rank)


@pytest.mark.parametrize("others", [{"SLURM_STEP_NUM_TASKS": "1"}, {"SLURM_STEP_NUM_TASKS": ""}])
def test_a_shell_inside_a_job_is_no_rank(others: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    """`srun --pty bash`, and the batch script, which has SLURM_PROCID but no step."""
    for name, value in (TASK | others).items():
        monkeypatch.setenv(name, value)
        if not value:
            monkeypatch.delenv(name)
    assert placed() == (None,) * 5


def test_launchers_below_srun_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (TASK | {"RANK": "3", "WORLD_SIZE": "4"}).items():
        monkeypatch.setenv(name, value)
    assert placed()[:2] == ("3", "4")


def test_a_task_takes_the_cores_that_slurm_gave_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(96)))  # not bound: the whole node in sight
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    assert share_of_cores() == 96
    monkeypatch.setenv("SLURM_CPUS_PER_TASK", "12")
    assert share_of_cores() == 12
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)))
    assert share_of_cores() == 8
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
    assert share_of_cores() == 2, "which others of this node share"


def test_tasks_that_were_given_no_number_of_cores_share_those_of_their_node(monkeypatch: pytest.MonkeyPatch) -> None:
    """Eight on n1 and four on n2, started by srun without --cpus-per-task."""
    step = {"SLURM_STEP_NODELIST": "n[1-2]", "SLURM_STEP_TASKS_PER_NODE": "8,4", "SLURM_CPUS_ON_NODE": "96"}
    for name, value in step.items():
        monkeypatch.setenv(name, value)
    for name in ("LOCAL_WORLD_SIZE", "SLURM_CPUS_PER_TASK"):
        monkeypatch.delenv(name, raising=False)
    for node, seen, share in (("n1", 96, 12), ("n2", 96, 24), ("n2", 2, 2), ("elsewhere", 96, 96)):
        monkeypatch.setenv("SLURMD_NODENAME", node)
        monkeypatch.setattr(os, "sched_getaffinity", lambda pid, seen=seen: set(range(seen)))
        assert share_of_cores() == share, "and no more than it is bound to"


@pytest.mark.parametrize(
    "short, names",
    [
        ("n1", ["n1"]),
        ("n[1-2,8]", ["n1", "n2", "n8"]),
        ("n[08-11],login", ["n08", "n09", "n10", "n11", "login"]),
        ("rack[1-2]n[01,03]", ["rack1n01", "rack1n03", "rack2n01", "rack2n03"]),
        ("a-b-3,c[2-3]-ib", ["a-b-3", "c2-ib", "c3-ib"]),
    ],
)
def test_names_of_nodes(short: str, names: list[str]) -> None:
    assert expand(short) == names
