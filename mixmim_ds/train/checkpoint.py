"""Saving a run so that no moment of death loses it, and finding what was saved."""

import json
import logging
import shutil
from collections import ChainMap
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

from deepspeed.runtime.engine import DeepSpeedEngine

from mixmim_ds.checkpoints import MARKER, Checkpoint, read_checkpoint, sha256, steps_of, sync, write_whole
from mixmim_ds.config import RunConfig
from mixmim_ds.train.distributed import World, gather, on_first_rank

log = logging.getLogger("mixmim_ds")


def save(engine: DeepSpeedEngine, config: RunConfig, world: World, step: int) -> None:
    """Writes the checkpoint of a step beside the older ones, then removes those that the keep rules let go.

    A process killed at any moment leaves the older checkpoints as they were: everything is written under another
    name, then the marker, then the folder gets its name, then `latest` points to it.
    """
    folder = Path(config.run_dir) / "checkpoints"
    path, unfinished = folder / f"step_{step:08d}", folder / f"step_{step:08d}.tmp"
    on_first_rank(world, lambda: _clear(folder, path))
    engine.save_checkpoint(str(folder), tag=unfinished.name, save_latest=False)
    files = _seal(unfinished, world)
    on_first_rank(world, lambda: _complete(unfinished, path, step, files))
    on_first_rank(world, lambda: _prune(folder, config.train.keep_last, config.train.keep_every))


def _clear(folder: Path, path: Path) -> None:
    """Removes what killed saves left behind, and an older checkpoint of the same step."""
    folder.mkdir(parents=True, exist_ok=True)
    for leftover in folder.glob("*.tmp"):
        shutil.rmtree(leftover)
    if path.exists():
        _remove(path)


def _seal(unfinished: Path, world: World) -> dict[str, list[Any]]:
    """Sees every file onto the disk; size and digest of each, the work shared by all ranks."""
    files = sorted(file for file in unfinished.rglob("*") if file.is_file())
    own = {}
    for file in files[world.rank :: world.size]:
        sync(file)
        own[str(file.relative_to(unfinished))] = [file.stat().st_size, sha256(file)]
    return dict(ChainMap(*gather(world, own)))


def _complete(unfinished: Path, path: Path, step: int, files: dict[str, list[Any]]) -> None:
    sync(unfinished)
    write_whole(unfinished / MARKER, json.dumps({"step": step, "files": files}, indent=1))
    unfinished.rename(path)
    write_whole(path.parent / "latest", path.name)


def _prune(folder: Path, keep_last: int, keep_every: int) -> None:
    complete = sorted(path.parent for path in folder.glob(f"step_????????/{MARKER}"))
    for path in complete[:-keep_last]:
        if not keep_every or int(path.name.removeprefix("step_")) % keep_every:
            _remove(path)


def _remove(path: Path) -> None:
    """In two steps: half a checkpoint must not bear a checkpoint's name."""
    condemned = path.with_name(path.name + ".tmp")
    path.rename(condemned)
    shutil.rmtree(condemned)


def find(config: RunConfig, world: World) -> Checkpoint | None:
    """The newest checkpoint of the run folder that is whole to the last byte, the reading shared by all ranks.

    Damaged ones are named in the log and set aside as step_N.damaged.
    """
    folder = Path(config.run_dir)
    found: Checkpoint | None = on_first_rank(world, lambda: _newest(folder))
    while found is not None:
        altered = sorted(chain.from_iterable(gather(world, found.altered(world.rank, world.size))))
        if not altered:
            break
        on_first_rank(world, partial(_set_aside, found.path, found.complaint(altered)))
        found = on_first_rank(world, lambda: _newest(folder))
    return found


def _newest(run_dir: Path) -> Checkpoint | None:
    for path in steps_of(run_dir):
        try:
            return read_checkpoint(path)
        except ValueError as error:
            _set_aside(path, str(error))
    return None


def _set_aside(path: Path, reason: str) -> None:
    aside = path.with_name(path.name + ".damaged")
    if aside.exists():
        shutil.rmtree(aside)
    path.rename(aside)
    log.warning("%s It is set aside as %s; the one before it is used.", reason, aside.name)
