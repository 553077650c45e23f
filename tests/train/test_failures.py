"""Steps that are not finite: found at once, told, left out, and never saved."""

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from launching import numbers, rows, tasks

from mixmim_ds.checkpoints import newest_complete, read_whole_checkpoint
from mixmim_ds.compose import load_config
from mixmim_ds.data.loader import Share, open_loader
from mixmim_ds.models import build_model
from mixmim_ds.report.story import read_story
from mixmim_ds.train import loop
from mixmim_ds.train.distributed import RunFailed, connected
from mixmim_ds.train.engine import build_engine, set_lr
from mixmim_ds.train.failures import BadSteps
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
