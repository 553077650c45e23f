"""The demo's own part, and how commands that start others end. `make demo` itself takes minutes."""

import importlib.util
import json
from pathlib import Path

import pytest
from launching import ROOT, typed

from mixmim_ds import commands


def test_a_step_that_is_refused_ends_the_demo(tmp_path: Path) -> None:
    (tmp_path / "photographs").mkdir()
    done = typed("launch/demo.py", tmp_path)
    assert done.returncode == 2 and done.stdout.startswith("$ python")
    assert done.stderr.startswith(f"error: OUT_DIR: {tmp_path / 'photographs'} exists and is not the set asked for")
    assert [path.name for path in tmp_path.iterdir()] == ["photographs"]


def test_a_loss_is_the_mean_of_the_steps_before_it(tmp_path: Path) -> None:
    spec = importlib.util.spec_from_file_location("demo", ROOT / "launch" / "demo.py")
    demo = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(demo)
    rows = [{"step": 10 * i, "loss": float(i)} for i in range(1, 9)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert demo.losses_of(tmp_path) == ([10 * i for i in range(1, 9)], [1, 1.5, 2, 2.5, 3, 4, 5, 6])


def test_an_interrupted_command_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    def work() -> int:
        raise KeyboardInterrupt

    assert commands.exit_code(work) == 130 and capsys.readouterr().err == "interrupted\n"


@pytest.mark.parametrize("gpu", [False, True])
def test_what_is_started_is_told_where_there_is_no_gpu(gpu: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DS_ACCELERATOR", raising=False)
    monkeypatch.setattr(commands, "on_gpu", lambda: gpu)
    assert commands.environment().get("DS_ACCELERATOR") == (None if gpu else "cpu")
