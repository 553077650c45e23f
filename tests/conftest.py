"""What the whole suite shares: real photographs and short runs on them, made once."""

import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
from launching import ROOT, run, tasks


@pytest.fixture(scope="session")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """300 image files cut from real photographs: JPEG (grey and progressive ones too), PNG and WebP, 13 classes."""
    folder = tmp_path_factory.mktemp("data") / "photographs"
    command = [sys.executable, "launch/photographs.py", str(folder), "--count", "300"]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    return folder


@pytest.fixture(scope="session")
def small_run(photographs: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Options of a small run that logs every step; its learning rate is at full height from the first step on."""
    return [
        "model=tiny", "data=folder", f"data.root={photographs}", f"data.index_dir={tmp_path_factory.mktemp('index')}",
        "model.img_size=64", "train.global_batch=32", "train.micro_batch=8", "train.log_every=1",
        "train.save_every=100", "train.picture_every=0", "optim.warmup_epochs=0", "optim.base_lr=1e-3",
    ]  # fmt: skip


@pytest.fixture(scope="session")
def stage_run(small_run: list[str], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], Path]:
    """The folder of a run of four steps on two processes, for a file of ds_configs/ and a precision.

    Its live.pt holds the weights at the end as the live engine had them (tests/live.py).
    """

    @cache
    def make(ds: str, precision: str) -> Path:
        folder = tmp_path_factory.mktemp(f"{ds}-{precision}") / "run"
        overrides = [*small_run, f"run_dir={folder}", f"ds={ds}", f"precision={precision}", "train.max_steps=4"]
        if precision == "fp32":
            run("deepspeed", *overrides, script="tests/live.py")
        else:
            tasks(*overrides, script="tests/live.py")
        return folder

    return make


@pytest.fixture(scope="session")
def twenty(small_run: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of twenty steps on two processes that nothing disturbed."""
    folder = tmp_path_factory.mktemp("twenty") / "run"
    tasks(*small_run, f"run_dir={folder}", "train.max_steps=20")
    return folder


@pytest.fixture(autouse=True)
def _index_dir(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Indexes of test data stay out of the user's cache."""
    monkeypatch.setenv("HOME", str(tmp_path_factory.getbasetemp() / "home"))
