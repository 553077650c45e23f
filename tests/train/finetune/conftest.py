"""Runs of fine-tuning that several tests go on from."""

from pathlib import Path

import pytest
from launching import Shared, tasks
from tuning import PLAIN, SCRIPT


@pytest.fixture(scope="module")
def options(labelled: Path) -> list[str]:
    """A run with all that fine-tuning knows; its learning rate is at full height from the first step on."""
    return [
        "model=tiny", "model.img_size=64", f"data.root={labelled}", f"data.index_dir={labelled.parent / 'index'}",
        "precision=fp32", "train.global_batch=32", "train.micro_batch=16", "train.epochs=2", "train.log_every=1",
        "optim.warmup_epochs=0", "optim.base_lr=8e-3", "optim.ema_decay=0.5", "init=random",
    ]  # fmt: skip


@pytest.fixture(scope="module")
def straight(options: list[str], shared: Shared) -> Path:
    """The folder of a run that nothing disturbed."""
    return shared("tuned", lambda folder: tasks(*options, f"run_dir={folder}", script=SCRIPT))


@pytest.fixture(scope="module")
def larger(straight: Path, options: list[str]) -> list[str]:
    """A run on larger images than those of `init`: its tables are interpolated, which a new model's are not."""
    given = [option for option in options if not option.startswith(("init=", "model.img_size="))]
    return [*given, f"init={straight / 'timm'}", "model.img_size=96", "optim.ema_decay=null", *PLAIN]
