"""A user's mistake ends in one sentence that names the option, with nothing written over."""

from pathlib import Path

import pytest
import torch
from launching import run, tasks

MISTAKES = {
    "missing folder": (["data.root=DIR/nowhere"], "data.root"),
    "empty folder": (["data.root=DIR/empty"], "data.root"),
    "no images": (["data.root=DIR/texts"], "data.root"),
    "a shard is missing": (["data=shards", "data.root=DIR/{0..3}.tar"], "/{0..3}.tar matches no file"),
    "a shard is no tar": (["data=shards", "data.root=DIR/texts/*"], "/texts/a.txt is no tar file"),
    "no data at all": (["data=folder"], "data.root"),
    "unknown option": (["train.epoch=3"], "train.epoch is no option; did you mean train.epochs?"),
    "wrong type": (["train.epochs=many"], "train.epochs: Value 'many'"),
    "batch that does not divide": (["train.global_batch=30"], "train.global_batch=30 must be a multiple"),
    "odd micro-batch": (["train.micro_batch=7", "train.global_batch=28"], "train.micro_batch=7 must be even"),
    "more than the images": (["train.global_batch=4096"], "train.global_batch"),
    "unknown model": (["model=giant"], "model=giant must be one of base, base_384, huge"),
    "image size without cells": (["model.img_size=100"], "img_size=100x100 must be a multiple of 32"),
    "a mask of nothing": (["model.mask_ratio=0.2"], "model.mask_ratio=0.2 hides 0 of the 4 cells of 32 pixels"),
    "unknown ds": (["ds=zero9"], "ds=zero9 is no DeepSpeed config; choose one of zero1, zero2"),
    "an option taken out": (["~train"], "~train takes an option out, which would give it its default"),
    "compile under zero3": (["compile=true", "ds=zero3"], "compile=true does not go with ZeRO-3"),
}


def last_line_of(options: list[str], launcher: str | None = None) -> str:
    """Runs into the mistake, on two processes of a launcher or alone; asserts that exactly one line reports it and that
    no traceback does."""
    printed = run(launcher, *options, code=2) if launcher else tasks(*options, processes=1, code=2)
    errors = [line for line in printed.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and "Traceback" not in printed, printed
    return errors[0]


@pytest.fixture
def options(photographs: Path, tmp_path: Path) -> list[str]:
    """A run in the test's folder, which also gets an empty folder and one without images."""
    (tmp_path / "empty").mkdir()
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.txt").write_text("no picture")
    return [
        "model=tiny", f"data.root={photographs}", f"data.index_dir={photographs.parent / 'index'}",
        f"run_dir={tmp_path / 'run'}",
        "model.img_size=64", "train.global_batch=16", "train.micro_batch=8", "train.max_steps=2",
    ]  # fmt: skip


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_sentence(mistake: str, options: list[str], tmp_path: Path) -> None:
    words, sentence = MISTAKES[mistake]
    if mistake == "no data at all":
        options = [option for option in options if not option.startswith("data.root")]
    assert sentence in last_line_of([*options, *(word.replace("DIR", str(tmp_path)) for word in words)])
    assert not (tmp_path / "run").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="this GPU trains in fp16")
def test_fp16_without_a_gpu_is_one_sentence(options: list[str]) -> None:
    assert "precision=fp16 is not supported by this device" in last_line_of([*options, "precision=fp16"])


@pytest.mark.slow
def test_processes_that_do_not_divide_the_batch_report_once(options: list[str], tmp_path: Path) -> None:
    overrides = [*options, "train.global_batch=24"]
    assert "train.global_batch=24 is no multiple of train.micro_batch=8 x 2 processes" in last_line_of(
        overrides, "deepspeed"
    )
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_the_first_rank_ends_with_a_mistake_only_when_all_have_met(options: list[str]) -> None:
    """Others were left meeting it, one in a few times; without a launcher nobody ends those."""
    for _ in range(3):
        printed = tasks(*options, "train.global_batch=40", processes=4, code=2)
        assert printed.count("error: ") == 1 and "Traceback" not in printed, printed


@pytest.mark.slow
def test_a_folder_of_another_run_stays_as_it_is(options: list[str], tmp_path: Path) -> None:
    tasks(*options, processes=1)
    folder = tmp_path / "run"
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    for change, sentence in (
        ("train.seed=1", "run_dir={} holds a run with train.seed=0, not 1"),
        ("train.global_batch=32", "run_dir={} holds a run with train.global_batch=16, not 32"),
        (f"data.root={other_images(tmp_path)}", "run_dir={} holds a run on other images than those of data.root="),
    ):
        assert sentence.format(folder) in last_line_of([*options, change])
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


def other_images(tmp_path: Path) -> Path:
    from PIL import Image

    folder = tmp_path / "others"
    folder.mkdir()
    for i in range(16):
        Image.new("RGB", (70 + i, 80)).save(folder / f"{i}.png")
    return folder
