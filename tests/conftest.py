"""What the whole suite shares: real photographs, made once."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """300 image files cut from real photographs: JPEG (grey and progressive ones too), PNG and WebP, 13 classes."""
    folder = tmp_path_factory.mktemp("data") / "photographs"
    command = [sys.executable, "launch/photographs.py", str(folder), "--count", "300"]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    return folder


@pytest.fixture(autouse=True)
def _index_dir(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Indexes of test data stay out of the user's cache."""
    monkeypatch.setenv("HOME", str(tmp_path_factory.getbasetemp() / "home"))
