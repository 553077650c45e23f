"""The runs that are exported."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest


@pytest.fixture(scope="module")
def trained(stage_run: Callable[[str, str], Path]) -> Path:
    """A run in fp32 under the default stage."""
    return stage_run("zero1", "fp32")


@pytest.fixture
def own(trained: Path, tmp_path: Path) -> Path:
    """A copy of the run, to be damaged."""
    return Path(shutil.copytree(trained, tmp_path / "run"))
