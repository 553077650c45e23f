"""What a run folder tells, whole or half empty, of a run that is over or still at work."""

import fcntl
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from mixmim_ds.checkpoints import read_checkpoint
from mixmim_ds.config import flatten
from mixmim_ds.json_lines import Row, read_rows

MARKS = ("config.yaml", "environment.json", "metrics.jsonl", "train.log")  # a folder with none of them holds no run
LINE = re.compile(r"(\d{4}-\d\d-\d\d \d\d:\d\d:\d\d) (.*)")  # of train.log
STEP = re.compile(r"step ([\d,]+)/([\d,]+) \| ")  # a line that repeats a row of metrics.jsonl
JUDGED = re.compile(r"step [\d,]+ \| ")  # ... of evaluations.jsonl


@dataclass(frozen=True)
class Story:
    """A run's files, read; what is missing or unreadable is empty."""

    run_dir: Path
    options: dict[str, Any]  # by dotted name
    engine: dict[str, Any]  # ds_config.json
    rows: list[Row]  # metrics.jsonl
    evaluations: list[Row]  # evaluations.jsonl, of fine-tuning
    starts: list[Row]  # environment.json
    events: list[tuple[str, str]]  # time and words of what train.log says beside the rows
    last: int | None  # the step that the run is to end after
    bad_images: list[Row]
    bad_steps: list[Row]
    checkpoints: list[tuple[str, str]]  # name, and its size or what is wrong with it
    state: str  # finished, stopped, failed, running, ended

    @property
    def step(self) -> int:
        """The newest that is known of."""
        return self.rows[-1]["step"] if self.rows else 0


def read_story(run_dir: Path) -> Story:
    """Reads a run folder.

    Raises:
        ValueError: there is no run in it.
    """
    if not any((run_dir / name).is_file() for name in MARKS):
        raise ValueError(f"RUN_DIR={run_dir} holds no run; give the run_dir of one, the folder with its metrics.jsonl.")
    events, last = _read_log(run_dir / "train.log")
    failures = run_dir / "failures"
    return Story(
        run_dir=run_dir,
        options=flatten(_read_options(run_dir / "config.yaml")),
        engine=_read_json(run_dir / "ds_config.json", {}),
        rows=read_rows(run_dir / "metrics.jsonl"),
        evaluations=read_rows(run_dir / "evaluations.jsonl"),
        starts=_read_json(run_dir / "environment.json", []),
        events=events,
        last=last,
        bad_images=read_rows(failures / "bad_images.jsonl"),
        bad_steps=[_read_json(path, {}) for path in sorted(failures.glob("step_*.json"))],
        checkpoints=[_checkpoint(path) for path in sorted((run_dir / "checkpoints").glob("step_*"))],
        state=_state(run_dir, events),
    )


def _read_options(path: Path) -> dict[str, Any]:
    options: Any = OmegaConf.to_container(OmegaConf.load(path)) if path.is_file() else {}
    return options


def _read_json(path: Path, missing: Any) -> Any:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return missing


def _read_log(path: Path) -> tuple[list[tuple[str, str]], int | None]:
    """What train.log says beside the rows, oldest first, and the last step as its rows name it."""
    events, last = [], None
    if not path.is_file():
        return [], None
    with path.open(errors="replace") as file:
        for line in file:
            found = LINE.match(line)
            if found is None:
                continue
            time, words = found.groups()
            if step := STEP.match(words):
                last = int(step[2].replace(",", ""))
            elif not JUDGED.match(words):
                events.append((time, words))
    return events, last


def _checkpoint(path: Path) -> tuple[str, str]:
    if path.suffix:
        return path.name, {".tmp": "unfinished", ".damaged": "damaged, set aside"}.get(path.suffix, path.suffix)
    try:
        size = sum(size for size, _ in read_checkpoint(path).files.values())
    except ValueError as error:
        return path.name, str(error)
    return path.name, f"{size / 1e6:,.0f} MB"


def _state(run_dir: Path, events: list[tuple[str, str]]) -> str:
    """By the last word of the log, and by the lock, which a run at work holds."""
    for _, words in reversed(events):
        if words.startswith(("done after step", "this run has already done")):
            return "finished"
        if words.startswith("stopped after step"):
            return "stopped"
        if words.startswith("error: "):
            return "failed"
        if " img/step | " in words:  # what every start says first
            break
    return "running" if _is_locked(run_dir / "lock") else "ended"


def _is_locked(path: Path) -> bool:
    try:
        with path.open() as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    return False
