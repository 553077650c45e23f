"""Steps that are not finite: found at once, told, left out, and never saved."""

import errno
import json
import multiprocessing
import os
import shutil
import signal
import socket
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from launching import free_port, numbers, rows, tasks

from mixmim_ds.checkpoints import newest_complete, read_whole_checkpoint
from mixmim_ds.compose import load_config
from mixmim_ds.data.loader import Share, open_loader
from mixmim_ds.finetune_config import LabelledDataConfig
from mixmim_ds.models import build_model
from mixmim_ds.report.story import read_story
from mixmim_ds.train import distributed, images, loop
from mixmim_ds.train.distributed import RunFailed, World, connect, connected, on_every_rank, on_first_rank, tell
from mixmim_ds.train.engine import build_engine, set_lr
from mixmim_ds.train.failures import BadSteps
from mixmim_ds.train.pretrain import pretrain
from mixmim_ds.train.restore import master_vectors
from mixmim_ds.zero_files import AVERAGE, Scattered, read_saved

pytestmark = pytest.mark.slow


def masters_at(folder: Path, step: int) -> dict[str, Scattered]:
    return read_saved(read_whole_checkpoint(folder / "checkpoints" / f"step_{step:08d}").path).masters


@pytest.mark.parametrize(
    ("ds", "precision"), [("zero1", "bf16"), pytest.param("zero3", "fp32", marks=pytest.mark.exhaustive)]
)
def test_a_poisoned_batch_ends_the_run_or_is_left_out(
    ds: str, precision: str, small_run: list[str], photographs: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    options = [
        *small_run, f"run_dir={folder}", f"ds={ds}", f"precision={precision}", "train.max_steps=5",
        "train.save_every=1", "train.keep_last=9", "train.log_every=4",
    ]  # fmt: skip
    printed = tasks(*options, script="tests/poisoned.py", code=1)
    report = folder / "failures" / "step_00000003.json"
    reason = f"error: the loss of rank 1 is not finite at step 3, which was left out; see {report}"
    assert reason in printed and reason in (folder / "train.log").read_text().splitlines()[-1]
    assert read_story(folder).state == "failed"
    told = json.loads(report.read_text())
    assert (told["step"], told["newest_checkpoint"], told["ranks_not_finite"]) == (3, 2, [1])
    names = [name for rank in told["ranks"] for batch in rank["images"] for name in batch]
    assert len(set(names)) == 32 and all((photographs / name).is_file() for name in names)
    newest = newest_complete(folder)
    assert newest is not None and newest.step == 2

    printed = tasks(*options, "train.max_bad_steps=1", script="tests/poisoned.py")
    assert "going on from" in printed and "train.max_bad_steps=1 allows 0 more" in printed
    assert [row["step"] for row in rows(folder)] == [4, 5]
    for name, master in masters_at(folder, 2).items():
        assert torch.equal(master.contiguous(), masters_at(folder, 3)[name].contiguous()), "step 3 changed nothing"
    assert any(
        not torch.equal(master.contiguous(), masters_at(folder, 4)[name].contiguous())
        for name, master in masters_at(folder, 3).items()
    )
    assert read_saved(folder / "checkpoints" / "step_00000005").updates == 4


@pytest.mark.parametrize(("ds", "precision"), [("zero1", "bf16"), ("zero2", "fp32"), ("zero3", "fp32")])
def test_a_run_goes_on_from_before_its_first_update(
    ds: str, precision: str, small_run: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """When Adam has no state yet: the first step was left out, as fp16's often are."""
    monkeypatch.setenv("POISONED", "1")
    options = [*small_run, f"ds={ds}", f"precision={precision}", "train.max_bad_steps=1"]
    for name, ends in (("straight", [3]), ("broken", [1, 3])):
        for steps in ends:
            words = [*options, f"run_dir={tmp_path / name}", f"train.max_steps={steps}"]
            printed = tasks(*words, script="tests/poisoned.py")
    assert "going on from" in printed
    straight, broken = numbers(tmp_path / "straight"), numbers(tmp_path / "broken")
    assert [row[0] for row in broken] == [1, 2, 3] and broken[1:] == straight[1:]
    assert read_saved(tmp_path / "broken" / "checkpoints" / "step_00000001").updates == 0


def test_what_is_not_finite_is_not_saved(small_run: list[str], tmp_path: Path) -> None:
    """A learning rate that makes the weights infinite in a step whose loss and gradient are finite."""
    folder = tmp_path / "run"
    options = [*small_run, f"run_dir={folder}", "train.save_every=1", "train.max_steps=9", "precision=fp32"]
    printed = tasks(*options, "optim.base_lr=1e42", processes=1, code=1)
    assert "the checkpoint of step 1 cannot be saved (weights are not finite)" in printed
    assert "error: the loss of rank 0 is not finite at step 2" in printed.splitlines()[-1]
    assert newest_complete(folder) is None


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
    assert "error: rank 0 waited in vain for another one" in printed
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


def test_what_earlier_starts_left_out_counts(tmp_path: Path) -> None:
    (tmp_path / "failures").mkdir()
    for step in (3, 5, 9):
        (tmp_path / "failures" / f"step_{step:08d}.json").write_text("{}")
    options = load_config(["model=tiny", "data=synthetic", f"run_dir={tmp_path}", "train.max_bad_steps=3"])
    with connected(60) as world:
        steps = BadSteps(options, world, 5, str)  # step 9 was after the checkpoint, and comes again
        infinite = [torch.tensor(float("inf"))]
        steps.note(6, 1e-4, infinite, [np.arange(2)], 5)
        with pytest.raises(RunFailed, match="train.max_bad_steps=3 allows no more"):
            steps.note(7, 1e-4, infinite, [np.arange(2)], 5)


def test_in_fp16_a_step_with_finite_losses_only_had_too_high_a_loss_scale(tmp_path: Path) -> None:
    options = load_config(["model=tiny", "data=synthetic", f"run_dir={tmp_path}", "precision=fp16"])
    with connected(60) as world:
        steps = BadSteps(options, world, 0, str)
        steps.note(1, 1e-4, [torch.tensor(1.0)], [np.arange(2)], 0)
        assert not list(tmp_path.rglob("step_*"))
        with pytest.raises(RunFailed, match="the loss of rank 0 is not finite at step 2"):
            steps.note(2, 1e-4, [torch.tensor(float("inf"))], [np.arange(2)], 0)


def test_a_step_that_is_left_out_does_not_move_the_average_of_the_weights(tmp_path: Path) -> None:
    """Nor begins it, before Adam has a state."""
    words = ["model=tiny", "data=synthetic", "train.global_batch=8", "train.micro_batch=8", "precision=fp32"]
    config = load_config([f"run_dir={tmp_path}", *words])
    with connected(60) as world:
        engine = build_engine(config, build_model(config.model), world)
        run: Any = SimpleNamespace(engine=engine, turns=1, task=SimpleNamespace(ema_decay=0.5))
        whole = next(open_loader(config, None, Share(0, 1, 1), world.device, cores=1).batches(0))
        poisoned = replace(whole, images=whole.images * float("inf"))
        averages = []
        for batch in (poisoned, whole, whole, poisoned):
            set_lr(engine, 1e-3)
            loop._update(run, iter([batch]))
            states = engine.optimizer.optimizer.state
            averages.append([states[v][AVERAGE].clone() for v in master_vectors(engine) if AVERAGE in states[v]])
        assert not averages[0]
        assert all(map(torch.equal, averages[3], averages[2])) and not any(map(torch.equal, averages[2], averages[1]))
        engine.destroy()


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
    """As with `torchrun` when it is killed. The rank holds the other end of the pipe as long as it lives."""
    fork = multiprocessing.get_context("fork")
    ours, theirs = fork.Pipe(duplex=False)
    place = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}
    for name, value in (place | {"MASTER_PORT": str(free_port())}).items():
        monkeypatch.setenv(name, value)

    def rank() -> None:
        connect(60)
        theirs.send(os.getpid())
        signal.pause()

    def launch() -> None:
        fork.Process(target=rank).start()
        signal.pause()

    launcher = fork.Process(target=launch)
    launcher.start()
    theirs.close()
    assert ours.poll(60)
    pid = ours.recv()
    launcher.kill()
    launcher.join()
    gone = ours.poll(30)
    if not gone:
        os.kill(pid, signal.SIGKILL)
    assert gone


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
