"""Whole runs, started as a user starts them: real photographs, DALI and DeepSpeed with two processes."""

import json
import math
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from launching import ROOT, numbers, rows, run, tasks
from omegaconf import OmegaConf
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from mixmim_ds.compose import load_config
from mixmim_ds.data.index import open_index
from mixmim_ds.data.loader import Share, open_loader
from mixmim_ds.data.pack import pack
from mixmim_ds.models import MixMIM
from mixmim_ds.train.optim import parameter_groups

pytestmark = pytest.mark.slow

STAGES = ("zero2", "zero3", "zero3_offload")
TRAINING = ROOT / "docs" / "training.md"


@pytest.mark.parametrize("ds", STAGES)
def test_every_zero_stage_computes_the_same(ds: str, stage_run: Callable[[str, str], Path]) -> None:
    found, expected = numbers(stage_run(ds, "fp32")), numbers(stage_run("zero1", "fp32"))
    assert len({row[1] for row in expected}) == 4, "the loss moves"
    for row, other in zip(found, expected, strict=True):
        assert row == pytest.approx(other, rel=1e-5)  # norms are summed in another order


@pytest.mark.parametrize("ds", STAGES)
def test_in_bf16_every_zero_stage_loses_the_same_to_the_last_digit(
    ds: str, stage_run: Callable[[str, str], Path]
) -> None:
    found, expected = numbers(stage_run(ds, "bf16")), numbers(stage_run("zero1", "bf16"))
    assert [row[:3] for row in found] == [row[:3] for row in expected]
    assert [row[3] for row in found] == pytest.approx([row[3] for row in expected], rel=1e-5)  # as above


def test_any_launcher_and_number_of_processes_computes_the_same(small_run: list[str], tmp_path: Path) -> None:
    found = {}
    for launcher, processes in (("python", 1), ("torchrun", 2), ("deepspeed", 2)):
        folder = tmp_path / launcher
        run(launcher, *small_run, f"run_dir={folder}", "precision=fp32", "train.max_steps=3", processes=processes)
        found[launcher] = numbers(folder)
    assert found["torchrun"] == found["deepspeed"]
    for expected, row in zip(found["python"], found["deepspeed"], strict=True):
        # The same micro-batches, summed in another order.
        assert row[1:] == pytest.approx(expected[1:], rel=1e-5)


def test_fp32_is_plain_torch_to_six_digits(small_run: list[str], tmp_path: Path) -> None:
    """The same micro-batches through a loop of plain PyTorch on one process: no engine, no accumulation tricks."""
    overrides = [
        *small_run, f"run_dir={tmp_path / 'run'}", "precision=fp32", "train.max_steps=3", "train.seed=5",
        "optim.weight_decay=2", "optim.betas=[0.8,0.99]",
    ]  # fmt: skip
    tasks(*overrides)
    config = load_config(overrides)
    index = open_index(Path(config.data.root), Path(config.data.index_dir))
    batches = open_loader(config, index, Share(0, 1, 4), torch.device("cpu"), cores=2).batches(0)
    torch.manual_seed(config.train.seed)
    model = MixMIM("mixmim_tiny", 64, decoder_dim=256, decoder_depth=2, decoder_num_heads=8)
    peak = config.optim.base_lr * 32 / 256
    total = config.train.epochs * (len(index) // 32)
    optimizer = torch.optim.AdamW(parameter_groups(model, 2), betas=(0.8, 0.99))
    for step, (_, loss, lr, norm) in enumerate(numbers(tmp_path / "run")):
        assert lr == pytest.approx(peak * 0.5 * (1 + math.cos(math.pi * step / total)), rel=1e-12)
        for group in optimizer.param_groups:
            group["lr"] = lr
        losses = []
        for _ in range(4):
            batch = next(batches)
            part, _ = model(batch.images, batch.mask)
            (part / 4).backward()
            losses.append(part.item())
        assert loss == pytest.approx(sum(losses) / 4, rel=1e-6)
        whole = torch.nn.utils.get_total_norm([p.grad for p in model.parameters()])
        assert norm == pytest.approx(whole.item(), rel=1e-5)
        optimizer.step()
        optimizer.zero_grad()


def test_ten_and_ten_steps_are_twenty_to_the_last_digit(small_run: list[str], twenty: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    tasks(*small_run, f"run_dir={broken}", "train.max_steps=10")
    printed = tasks(*small_run, f"run_dir={broken}", "train.max_steps=20")
    assert "step 11/20" in printed and "step 10/20" not in printed, "it goes on where it stopped"
    assert numbers(broken) == numbers(twenty)
    again = tasks(*small_run, f"run_dir={broken}", "train.max_steps=20")
    assert "nothing is left to do" in again and numbers(broken) == numbers(twenty)


@pytest.mark.parametrize("ds", [pytest.param("zero2", marks=pytest.mark.exhaustive), "zero3"])
def test_two_and_two_steps_are_four_to_the_last_digit(
    ds: str, small_run: list[str], stage_run: Callable[[str, str], Path], tmp_path: Path
) -> None:
    broken = tmp_path / "broken"
    for steps in (2, 4):
        tasks(*small_run, f"run_dir={broken}", f"ds={ds}", f"train.max_steps={steps}")
    assert numbers(broken) == numbers(stage_run(ds, "bf16"))


def test_the_run_folder_is_what_the_documents_say(small_run: list[str], tmp_path: Path) -> None:
    folder = tmp_path / "run"
    common = [*small_run, f"run_dir={folder}", "train.save_every=2", "train.keep_every=4", "train.picture_every=3"]
    printed = tasks(
        *common, "train.max_steps=9", "precision=fp32", "optim.clip_grad=0.01",
        "activation_checkpointing=full", processes=1,
    )  # fmt: skip
    assert "8 img/process x 1 processes x 4 accumulation = 32 img/step" in printed
    kept = sorted(path.name for path in (folder / "checkpoints").glob("step_*"))
    assert kept == ["step_00000004", "step_00000008", "step_00000009"], "every fourth for ever, and the last two"
    assert json.loads((folder / "ds_config.json").read_text())["gradient_clipping"] == 0.01
    assert json.loads((folder / "environment.json").read_text())[0]["versions"]["deepspeed"]
    assert OmegaConf.load(folder / "config.yaml").train.global_batch == 32
    assert "step 9/9" in (folder / "train.log").read_text()
    assert (folder / "failures").is_dir(), "PyTorch's flight recorder makes none"
    board = EventAccumulator(str(folder / "tensorboard"), size_guidance={"images": 0}).Reload()
    assert [round(event.value, 5) for event in board.Scalars("loss")] == [round(row["loss"], 5) for row in rows(folder)]
    assert [event.step for event in board.Images("reconstructions")] == [3, 6, 9]
    picture = board.Images("reconstructions")[0]
    assert (picture.width, picture.height) == (6 * 68 - 4, 4 * 68 - 4)
    row = rows(folder)[3]
    listed = re.search(r"per log step: (.*?)\n  tensorboard/", TRAINING.read_text(), re.DOTALL)[1]
    assert list(row) == [name.split()[0] for name in listed.split(",")]
    assert (
        row["images_per_s"] == pytest.approx(32 / row["step_time_s"], rel=1e-3, abs=0.01) and 0 <= row["data_wait"] <= 1
    )
    assert row["mfu"] is None and row["memory_gib"] > 0


def test_shards_train_on_any_number_of_processes_and_may_move(
    photographs: Path, small_run: list[str], tmp_path: Path
) -> None:
    pack(open_index(photographs, tmp_path / "index"), tmp_path / "shards", per_shard=64)
    options = [*small_run, "data=shards", "precision=fp32", "train.save_every=3"]
    pattern, moved = f"{tmp_path}/shards/train-{{000000..000004}}.tar", tmp_path / "moved"
    tasks(*options, f"data.root={pattern}", f"run_dir={tmp_path / 'two'}", "train.max_steps=3")
    (tmp_path / "shards").rename(moved)
    tasks(*options, f"data.root={moved}/*.tar", f"run_dir={tmp_path / 'two'}", "train.max_steps=4")
    alone = [*options, f"data.root={moved}/*.tar", f"run_dir={tmp_path / 'one'}", "train.max_steps=4"]
    tasks(*alone, processes=1)
    found, expected = numbers(tmp_path / "two"), numbers(tmp_path / "one")
    assert [row[0] for row in found] == [1, 2, 3, 4] and len({row[1] for row in found}) == 4
    for row, other in zip(found, expected, strict=True):
        # The same micro-batches, summed in another order.
        assert row[1:] == pytest.approx(other[1:], rel=1e-5)
