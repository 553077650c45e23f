"""What the whole suite shares: real photographs and short runs on them, made once for all of pytest's workers."""

import os
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

# Threads that wait for others of theirs must not spin: pytest's workers and the runs that they start share the cores.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import pytest
from filelock import FileLock
from launching import ROOT, Shared, run, tasks


def pytest_configure(config: pytest.Config) -> None:
    """But for `-m gpu`, a GPU is left alone: two processes would want two, and what is forked could not use it."""
    if config.option.markexpr != "gpu" and Path("/dev/nvidiactl").exists():
        os.environ |= {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Jobs of SLURM wait most of their time: they come first, so that other tests run meanwhile."""
    items.sort(key=lambda item: "slurm" not in item.keywords)


@pytest.fixture(scope="session")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Shared:
    """Gives the folder of a name, which the first test to ask for it, in whatever worker, makes for all."""
    base = tmp_path_factory.getbasetemp()
    # pytest-xdist gives every worker a folder in that of the whole test run
    base = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "shared"
    base.mkdir(exist_ok=True)

    def get(name: str, make: Callable[[Path], object]) -> Path:
        with FileLock(base / f"{name}.lock"):
            if not (base / f"{name}.made").exists():
                make(base / name)
                (base / f"{name}.made").touch()
        return base / name

    return get


@pytest.fixture(scope="session")
def photographs(shared: Shared) -> Path:
    """300 image files cut from real photographs: JPEG (grey and progressive ones too), PNG and WebP, 13 classes."""

    def cut(folder: Path) -> None:
        command = [sys.executable, "launch/photographs.py", str(folder), "--count", "300"]
        subprocess.run(command, cwd=ROOT, check=True, capture_output=True)

    return shared("photographs", cut)


@pytest.fixture(scope="session")
def labelled(photographs: Path, shared: Shared) -> Path:
    """225 crops of the photographs to learn from and 73 to judge by, a number that nothing divides; links to them."""

    def link(root: Path) -> None:
        paths = sorted(photographs.glob("*/*"))
        for part, some in (("val", paths[::4][:73]), ("train", [path for i, path in enumerate(paths) if i % 4])):
            for path in some:
                place = root / part / path.relative_to(photographs)
                place.parent.mkdir(parents=True, exist_ok=True)
                place.symlink_to(path)

    return shared("labelled", link)


@pytest.fixture(scope="session")
def small_run(photographs: Path) -> list[str]:
    """Options of a small run that logs every step; its learning rate is at full height from the first step on."""
    return [
        "model=tiny", "data=folder", f"data.root={photographs}", f"data.index_dir={photographs.parent / 'index'}",
        "model.img_size=64", "train.global_batch=32", "train.micro_batch=8", "train.log_every=1",
        "train.save_every=100", "train.picture_every=0", "optim.warmup_epochs=0", "optim.base_lr=1e-3",
    ]  # fmt: skip


@pytest.fixture(scope="session")
def stage_run(small_run: list[str], shared: Shared) -> Callable[[str, str], Path]:
    """The folder of a run of four steps on two processes, for a file of ds_configs/ and a precision.

    Its live.pt holds the weights at the end as the live engine had them, its ids.jsonl the images (tests/live.py).
    """

    def get(ds: str, precision: str) -> Path:
        start = partial(run, "deepspeed") if (ds, precision) == ("zero1", "fp32") else tasks  # seconds longer
        options = [*small_run, f"ds={ds}", f"precision={precision}", "train.max_steps=4"]
        return shared(f"{ds}-{precision}", lambda folder: start(*options, f"run_dir={folder}", script="tests/live.py"))

    return get


@pytest.fixture(scope="session")
def twenty(small_run: list[str], shared: Shared) -> Path:
    """The folder of a run of twenty steps on two processes that nothing disturbed."""
    return shared("twenty", lambda folder: tasks(*small_run, f"run_dir={folder}", "train.max_steps=20"))


@pytest.fixture(autouse=True)
def _index_dir(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Indexes of test data stay out of the user's cache."""
    monkeypatch.setenv("HOME", str(tmp_path_factory.getbasetemp() / "home"))
