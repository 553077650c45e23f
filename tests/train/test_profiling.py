"""Traces of a run's steps, read back. On a GPU tests/train/test_gpu.py looks at kernels and memory too."""

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
from launching import numbers, tasks
from tuning import PLAIN, SCRIPT

pytestmark = pytest.mark.slow


def named(path: Path) -> dict[str, int]:
    """How often each name that the loop gives is in a trace."""
    with gzip.open(path) as file:
        events: list[dict[str, Any]] = json.load(file)["traceEvents"]
    names = [event["name"] for event in events if event.get("cat") == "user_annotation"]
    return {name: names.count(name) for name in ("data", "forward", "backward", "update")}


def test_every_rank_traces_the_steps_asked_for_and_nothing_else_changes(small_run: list[str], tmp_path: Path) -> None:
    """Two micro-batches a step and rank."""
    plain, traced = tmp_path / "plain", tmp_path / "traced"
    tasks(*small_run, f"run_dir={plain}", "precision=fp32", "train.max_steps=5")
    printed = tasks(*small_run, f"run_dir={traced}", "precision=fp32", "train.max_steps=5", "train.profile=[3,4]")
    assert f"steps 3 to 4 are profiled in {traced / 'profile'}" in printed
    assert numbers(traced) == numbers(plain)
    for rank in (0, 1):
        stem = traced / "profile" / f"steps_3-4.rank_{rank}"
        assert named(Path(f"{stem}.trace.json.gz")) == {"data": 4, "forward": 4, "backward": 4, "update": 4}
        assert "mixmim_ds::grouped_attention" in Path(f"{stem}.operators.txt").read_text()
    assert len(list((traced / "profile").iterdir())) == 4


def test_a_stop_keeps_what_was_traced_and_the_next_start_traces_the_rest(
    labelled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = [
        "model=tiny", "model.img_size=64", f"data.root={labelled}", f"data.index_dir={labelled.parent / 'index'}",
        "init=random", "precision=fp32", "train.global_batch=32", "train.micro_batch=16", *PLAIN,
        f"run_dir={tmp_path}", "train.max_steps=4", "train.profile=[1,4]",
    ]  # fmt: skip
    monkeypatch.setenv("ASKED", "2")
    tasks(*options, processes=1, script="tests/asked.py", code=85)
    tasks(*options, processes=1, script=SCRIPT)
    for steps in ("1-2", "3-4"):
        found = named(tmp_path / "profile" / f"steps_{steps}.rank_0.trace.json.gz")
        assert found == {"data": 4, "forward": 4, "backward": 4, "update": 4}, steps
    assert "train.profile has no effect: this start does steps 5 to 5" in tasks(
        *options, "train.max_steps=5", processes=1, script=SCRIPT
    )


def test_a_run_that_fails_keeps_what_led_to_it(
    small_run: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a batch of the second step that is poisoned: in the first step that is traced, and in one after it."""
    monkeypatch.setenv("POISONED", "2")
    for first in (1, 2):
        run_dir = tmp_path / str(first)
        options = [f"run_dir={run_dir}", "train.max_steps=4", f"train.profile=[{first},4]"]
        printed = tasks(*small_run, *options, script="tests/poisoned.py", code=1)
        assert "is not finite at step 2" in printed
        for rank in (0, 1):
            found = named(run_dir / "profile" / f"steps_{first}-2.rank_{rank}.trace.json.gz")
            assert found["update"] == 2 * (3 - first)


def test_a_trace_that_cannot_be_written_costs_nothing_else(small_run: list[str], tmp_path: Path) -> None:
    (tmp_path / "profile").write_text("in the way")
    printed = tasks(*small_run, f"run_dir={tmp_path}", "train.max_steps=3", "train.profile=[2,2]", processes=1)
    assert f"{tmp_path / 'profile'} cannot be written (File exists)" in printed and "done after step 3" in printed
