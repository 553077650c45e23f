"""Folders that are filled and then get their name: what a killed process leaves goes, and no more."""

import os
import platform
import signal
from pathlib import Path

import pytest

from mixmim_ds.checkpoints import whole_folder


def killed_while_it_fills(path: Path) -> None:
    child = os.fork()
    if child == 0:
        with whole_folder(path) as draft:
            (draft / "half").touch()
            os.kill(os.getpid(), signal.SIGKILL)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL


def beside(tmp_path: Path) -> list[Path]:
    return sorted(tmp_path.glob(".*"))


def test_what_killed_ones_left_goes_and_live_work_stays(tmp_path: Path) -> None:
    out = tmp_path / "out[1]"
    killed_while_it_fills(out)
    killed_while_it_fills(tmp_path / "other")
    (others, left) = beside(tmp_path)
    with whole_folder(out) as live:
        (live / "live").touch()
        assert beside(tmp_path) == [others, live.parent] and not left.exists()
        with pytest.raises(InterruptedError), whole_folder(out):
            assert len(beside(tmp_path)) == 3
            raise InterruptedError
    assert [file.name for file in out.iterdir()] == ["live"] and beside(tmp_path) == [others]


def test_what_another_machine_left_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    killed_while_it_fills(tmp_path / "out")
    left = beside(tmp_path)
    monkeypatch.setattr(platform, "node", lambda: "another")
    with whole_folder(tmp_path / "out"):
        pass
    assert beside(tmp_path) == left
