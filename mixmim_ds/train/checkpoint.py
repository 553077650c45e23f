"""Saving a run so that no moment of death loses it, and going on from there."""

import json
import shutil
from pathlib import Path

import torch.distributed as dist
from deepspeed.runtime.engine import DeepSpeedEngine

from mixmim_ds.checkpoints import MARKER, newest_complete, sync, write_whole
from mixmim_ds.config import RunConfig
from mixmim_ds.train.distributed import World, on_first_rank
from mixmim_ds.train.engine import zero_stage


def save(engine: DeepSpeedEngine, config: RunConfig, world: World, step: int) -> None:
    """Writes the checkpoint of a step beside the older ones, then removes those that the keep rules let go.

    A process killed at any moment leaves the older checkpoints as they were: everything is written under another
    name, then the marker, then the folder gets its name, then `latest` points to it.
    """
    folder = Path(config.run_dir) / "checkpoints"
    path, unfinished = folder / f"step_{step:08d}", folder / f"step_{step:08d}.tmp"
    on_first_rank(world, lambda: _clear(folder, path))
    engine.save_checkpoint(str(folder), tag=unfinished.name, save_latest=False)
    on_first_rank(world, lambda: _complete(unfinished, path, step, world.size, zero_stage(config)))
    on_first_rank(world, lambda: _prune(folder, config.train.keep_last, config.train.keep_every))


def _clear(folder: Path, path: Path) -> None:
    """Removes what killed saves left behind, and a damaged checkpoint of the same step."""
    folder.mkdir(parents=True, exist_ok=True)
    for leftover in [*folder.glob("*.tmp"), path]:
        _remove(leftover)


def _complete(unfinished: Path, path: Path, step: int, world_size: int, stage: int) -> None:
    files = sorted(file for file in unfinished.rglob("*") if file.is_file())
    for file in [*files, unfinished]:
        sync(file)
    marker = {
        "step": step,
        "world_size": world_size,
        "zero_stage": stage,
        "files": {str(file.relative_to(unfinished)): file.stat().st_size for file in files},
    }
    write_whole(unfinished / MARKER, json.dumps(marker, indent=1))
    unfinished.rename(path)
    write_whole(path.parent / "latest", path.name)


def _prune(folder: Path, keep_last: int, keep_every: int) -> None:
    complete = sorted(path.parent for path in folder.glob(f"step_????????/{MARKER}"))
    for path in complete[:-keep_last]:
        if not keep_every or int(path.name.removeprefix("step_")) % keep_every:
            _remove(path)


def _remove(path: Path) -> None:
    if path.exists():
        (path / MARKER).unlink(missing_ok=True)
        shutil.rmtree(path)


def resume(engine: DeepSpeedEngine, config: RunConfig, world: World) -> int:
    """Loads the newest complete checkpoint of the run folder, if there is one; the number of steps it has done.

    Raises:
        ValueError: the checkpoint was written by another number of processes or under another ZeRO stage.
    """
    found = on_first_rank(world, lambda: newest_complete(Path(config.run_dir)))
    if found is None:
        return 0
    if (found.world_size, found.zero_stage) != (world.size, zero_stage(config)):
        raise ValueError(
            f"{found.path} was written by {found.world_size} processes under ZeRO-{found.zero_stage}; this start has "
            f"{world.size} under ds={config.ds}: start it as before, or with another run_dir."
        )
    engine.load_checkpoint(str(found.path.parent), tag=found.path.name)
    dist.barrier()
    return found.step
