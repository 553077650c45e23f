"""What ranks make of each other: who they are, how they part, and how one that fails or differs is told of."""

import errno
import os
import shutil
import signal
import socket
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from forks import FORK, goes_with_its_parent
from launching import free_port, tasks

from mixmim_ds.compose import load_config
from mixmim_ds.finetune_config import LabelledDataConfig
from mixmim_ds.train import distributed, images, loop
from mixmim_ds.train.distributed import RunFailed, World, connect, connected, on_every_rank, on_first_rank, tell
from mixmim_ds.train.pretrain import pretrain

pytestmark = pytest.mark.slow


def test_pytorch_learns_where_to_dump_before_it_connects_and_nothing_is_written_yet(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def connected_so_far(timeout_s: int) -> AbstractContextManager[World]:
        raise RunFailed(os.environ["TORCH_FR_DUMP_TEMP_FILE"])

    for name in ("TORCH_FR_BUFFER_SIZE", "TORCH_NCCL_DUMP_ON_TIMEOUT", "TORCH_FR_DUMP_TEMP_FILE"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    monkeypatch.setenv("TORCH_FR_BUFFER_SIZE", "9")
    monkeypatch.setattr(loop, "connected", connected_so_far)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(RunFailed, match=f"^{tmp_path}/run/failures/flight_recorder_$"):
        pretrain(load_config(["data=synthetic", "run_dir=run"]))
    assert (os.environ["TORCH_FR_BUFFER_SIZE"], os.environ["TORCH_NCCL_DUMP_ON_TIMEOUT"]) == ("9", "1")
    assert not (tmp_path / "run").exists()


def test_an_error_of_a_library_is_shown_whole_by_any_rank(
    small_run: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MISTAKEN", "training")
    printed = tasks(*small_run, f"run_dir={tmp_path}", "train.max_steps=1", script="tests/mistaken.py", code=1)
    assert "Traceback" in printed and "ValueError: this rank alone knows" in printed
    (waited,) = (line for line in printed.splitlines() if line.startswith("error: rank 0 waited in vain for another"))
    assert waited.endswith(").") and waited.count(". ") == 0, "without gloo's advice"
    assert "error: rank 1: RuntimeError: training met an error that it should not" in printed.splitlines()
    kept = (tmp_path / "train.log").read_text()
    assert "error of rank 1: training met an error that it should not" in kept
    assert "ValueError: this rank alone knows" in kept and "error: rank 0 waited in vain" in kept
    assert (tmp_path / "failures").is_dir(), "where the flight recorder of a rank that waits on a GPU writes"


@pytest.mark.parametrize("what", ["images", "checkpoint"])
def test_a_mistake_that_one_rank_sees_is_told_once(
    what: str, small_run: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Images that its node lacks, say."""
    monkeypatch.setenv("MISTAKEN", what)
    options = [*small_run, f"run_dir={tmp_path}"]
    if what == "checkpoint":
        tasks(*options, "train.max_steps=1")
    printed = tasks(*options, script="tests/mistaken.py", code=2)
    assert [line for line in printed.splitlines() if "error:" in line] == ["error: this rank alone knows"]
    assert "Traceback" not in printed


def test_ranks_with_different_images_do_not_train(
    small_run: list[str], photographs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where data.root is on each node's own disk."""
    monkeypatch.setenv("MISTAKEN", "others")
    monkeypatch.setenv("OTHERS", str(shutil.copytree(photographs, tmp_path / "others")))
    next((tmp_path / "others").rglob("*.jpg")).unlink()
    printed = tasks(*small_run, f"run_dir={tmp_path / 'run'}", script="tests/mistaken.py", code=2)
    (said,) = [line for line in printed.splitlines() if "error:" in line]
    assert said.startswith(f"error: data.root={photographs} holds other images for rank 1 on ")
    assert not (tmp_path / "run").exists()


def test_ranks_that_judge_by_different_images_do_not_train(
    labelled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second rank's are what this process finds when it is asked again."""
    other = shutil.copytree(labelled, tmp_path / "other", symlinks=True)
    next((other / "val").glob("*/*")).unlink()
    found: list[Any] = []
    monkeypatch.setattr(images, "gather", lambda world, own: found.append(own) or found)
    with connected(60) as world:
        images.find_labelled(LabelledDataConfig(root=str(labelled), index_dir=str(tmp_path / "index")), world)
        with pytest.raises(ValueError, match=f"data.root={other} holds other images for rank 1 on "):
            images.find_labelled(LabelledDataConfig(root=str(other), index_dir=str(tmp_path / "index")), world)


def test_a_disk_that_fails_is_no_mistake() -> None:
    """A job of SLURM is queued again after it, and not after a mistake."""

    def fail() -> None:
        raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))

    with connected(60) as world:
        for call in (on_first_rank, on_every_rank):
            with pytest.raises(RunFailed, match="Stale file handle"):
                call(world, fail)


def test_without_a_rank_a_process_is_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever a shell has left of another launch, and again when it has parted."""
    for name, value in (("RANK", None), ("MASTER_ADDR", "nowhere.invalid"), ("WORLD_SIZE", "8"), ("LOCAL_RANK", "7")):
        monkeypatch.setenv(name, value or "")
        if value is None:
            monkeypatch.delenv(name)
    for _ in range(2):
        with connected(60) as world:
            assert (world.rank, world.size) == (0, 1)


def test_a_rank_goes_with_what_started_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """As with `torchrun` when it is killed."""
    place = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}
    for name, value in (place | {"MASTER_PORT": str(free_port())}).items():
        monkeypatch.setenv(name, value)

    def launch(tell: Callable[[int], object]) -> None:
        def rank() -> None:
            connect(60)
            tell(os.getpid())
            signal.pause()

        FORK.Process(target=rank).start()
        signal.pause()

    assert goes_with_its_parent(launch)


def test_a_port_that_is_taken_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        place = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}
        for name, value in (place | {"MASTER_PORT": str(other.getsockname()[1])}).items():
            monkeypatch.setenv(name, value)
        with pytest.raises(RunFailed, match=r"is taken, perhaps by another run; .* \(deepspeed --master_port"):
            connect(1)


@pytest.mark.parametrize("gpu", [False, True])
def test_a_rank_computes_on_its_share_of_the_cores(gpu: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside a GPU too; here it is made up."""

    class Connecting(Exception):
        pass

    def begin(*arguments: object, **options: object) -> None:
        raise Connecting

    threads, share = torch.get_num_threads(), torch.get_num_threads() + 1
    monkeypatch.setattr(distributed, "on_gpu", lambda: gpu)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(distributed, "share_of_cores", lambda: share)
    monkeypatch.setattr(dist, "init_process_group", begin)
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(Connecting):
        connect(1)
    assert torch.get_num_threads() == share
    torch.set_num_threads(threads)


def test_a_rank_without_a_gpu_says_so_once(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Where there are 4 GPUs; here they are made up."""
    monkeypatch.setattr(distributed, "on_gpu", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setenv("WORLD_SIZE", "6")
    for rank in (4, 5):
        monkeypatch.setenv("RANK", str(rank)), monkeypatch.setenv("LOCAL_RANK", str(rank))
        with pytest.raises(ValueError, match="than its 4 GPUs; start one per GPU") as raised:
            connect(1)
        assert tell(raised.value) == 2
    assert capsys.readouterr().err.count("error: more processes") == 1
