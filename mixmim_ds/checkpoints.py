"""What a run folder holds for good: files written as a whole, and checkpoints.

A checkpoint exists when its COMPLETE.json does, which is written last and deleted first.
"""

import json
import logging
import os
from dataclasses import dataclass
from pathlib import Path

MARKER = "COMPLETE.json"
log = logging.getLogger(__name__)


def write_whole(path: Path, text: str) -> None:
    """Replaces a file: whoever reads it, even after a power cut, finds the old text or the new, never a part."""
    draft = path.with_name(path.name + ".new")
    draft.write_text(text)
    sync(draft)
    draft.replace(path)
    sync(path.parent)


def sync(path: Path) -> None:
    """Waits until a file, or a folder's list of names, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint folder and what its marker says."""

    path: Path
    step: int
    world_size: int
    zero_stage: int


def read_checkpoint(path: Path) -> Checkpoint:
    """The checkpoint in a folder.

    Raises:
        ValueError: its marker is missing, or a file that the marker names is missing or has another size.
    """
    try:
        marker = json.loads((path / MARKER).read_text())
    except (OSError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is no complete checkpoint: {MARKER} is missing or unreadable.") from error
    for name, size in marker["files"].items():
        file = path / name
        if not file.is_file() or file.stat().st_size != size:
            raise ValueError(f"{path} is damaged: {name} is missing or not of {size} bytes.")
    return Checkpoint(path, marker["step"], marker["world_size"], marker["zero_stage"])


def newest_complete(run_dir: Path) -> Checkpoint | None:
    """The newest checkpoint of a run folder that is complete; damaged ones are named in the log and passed over."""
    for path in sorted((run_dir / "checkpoints").glob("step_????????"), reverse=True):
        try:
            return read_checkpoint(path)
        except ValueError as error:
            log.warning("%s It is passed over.", error)
    return None
