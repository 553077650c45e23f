"""Saving a run so that no moment of death loses it, and going on from what was saved."""

import json
import logging
import shutil
import time
from collections import ChainMap
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from deepspeed.runtime.checkpoint_engine.torch_checkpoint_engine import TorchCheckpointEngine
from deepspeed.runtime.engine import DeepSpeedEngine

from mixmim_ds.checkpoints import BEST, MARKER, Checkpoint, read_checkpoint, sha256, steps_of, sync, write_whole
from mixmim_ds.config import RunConfig
from mixmim_ds.train.distributed import RunFailed, World, gather, made_once, on_every_rank, on_first_rank
from mixmim_ds.train.engine import Trained, build_engine
from mixmim_ds.train.optim import ScaleOf, all_alike
from mixmim_ds.train.restore import load_weights, master_vectors, restore, set_masters
from mixmim_ds.zero_files import read_saved

log = logging.getLogger("mixmim_ds")


class Saver:
    """Saves a run so that neither a death at any moment nor a full disk costs a checkpoint that is there.

    A save that fails leaves the older checkpoints as they were, and training goes on to the next interval; after
    `train.max_failed_saves` in a row, or where nothing would follow, the run ends.

    Attributes:
        newest: the step of the newest complete checkpoint, 0 if there is none.
    """

    def __init__(self, engine: DeepSpeedEngine, config: RunConfig, world: World, newest: int) -> None:
        self.engine, self.config, self.world, self.newest = engine, config, world, newest
        self.folder = Path(config.run_dir) / "checkpoints"
        self.failures = 0
        self.writer = engine.checkpoint_engine = _Writer()
        # A script to join the files, which does not know ours; a failure to copy it would raise on one rank alone.
        engine._copy_recovery_script = lambda folder: None

    def save(self, step: int, must: bool) -> float:
        """Writes the checkpoint of a step beside the older ones, then removes those that the keep rules let go.

        Args:
            must: the run ends here, so there is no later try.

        Returns:
            The seconds that it took.

        Raises:
            RunFailed: it cannot be written and there is no further try.
        """
        began, train = time.perf_counter(), self.config.train
        try:
            self._write(step)
        except (ValueError, RunFailed) as error:
            self._give_up(step)
            self.failures += 1
            said = f"the checkpoint of step {step} cannot be saved ({error}); the newest is that of step {self.newest}"
            if must or self.failures >= train.max_failed_saves:
                raise RunFailed(f"{said}, failed tries: {self.failures}.") from error
            log.warning("%s; the run goes on and tries again after train.save_every=%s steps", said, train.save_every)
            return time.perf_counter() - began
        self.failures, self.newest = 0, step
        on_first_rank(self.world, lambda: _prune(self.folder, train.keep_last, train.keep_every))
        return time.perf_counter() - began

    def path_of(self, step: int) -> Path:
        """The folder of a step's checkpoint."""
        return self.folder / f"step_{step:08d}"

    def spare(self, step: int) -> None:
        """Names the checkpoint that stays as the best, whatever the keep rules say; call it on the first rank."""
        try:
            write_whole(self.folder / BEST, self.path_of(step).name)
        except OSError as error:
            log.warning("%s cannot be written (%s)", self.folder / BEST, error.strerror)

    def _write(self, step: int) -> None:
        """A process killed at any moment leaves the older checkpoints as they were: everything is written under another
        name, then the marker, then the folder gets its name, then `latest` points to it. ValueError if it fails."""
        path = self.path_of(step)
        unfinished = path.with_name(path.name + ".tmp")
        on_every_rank(self.world, lambda: _check_finite(self.engine))
        on_first_rank(self.world, lambda: _clear(self.folder, unfinished))
        self.writer.begin()
        self.engine.save_checkpoint(str(self.folder), tag=unfinished.name, save_latest=False)
        files = on_every_rank(self.world, lambda: _seal(unfinished, self.writer))
        on_first_rank(self.world, lambda: _complete(unfinished, path, step, dict(ChainMap(*files))))

    def _give_up(self, step: int) -> None:
        """Makes room: what was written of the checkpoint takes the last of a full disk."""
        with suppress(OSError):
            if self.world.first:
                shutil.rmtree(self.path_of(step).with_suffix(".tmp"))


class _Writer(TorchCheckpointEngine):
    """DeepSpeed's writer of files, except that a failure is remembered instead of raised: between the files DeepSpeed
    waits for all ranks, and one that has left would keep the others waiting."""

    def begin(self) -> None:
        """Forgets the checkpoint before."""
        self.written: list[Path] = []
        self.failure: OSError | None = None

    def save(self, state_dict: dict[str, Any], path: str) -> None:
        """See DeepSpeed's."""
        if "module" in state_dict:
            # Under ZeRO-1 and 2 these are also the weights in the working precision, which nobody reads: the masters
            # are in the files of all ranks, and all ranks would wait for this one.
            buffers = {name: state_dict["module"][name] for name in state_dict["buffer_names"]}
            state_dict = state_dict | {"module": buffers}
        try:
            with open(path, "wb") as file:  # given a path, PyTorch's writer does not tell that the disk is full
                torch.save(state_dict, file)
            self.written.append(Path(path))
        except (OSError, RuntimeError) as error:  # closing the file after a failure, PyTorch may raise another one
            self.failure = next(e for e in (error, error.__context__, OSError(str(error))) if isinstance(e, OSError))


def _check_finite(engine: DeepSpeedEngine) -> None:
    """ValueError if this rank's share of the masters is poisoned: then every older checkpoint is worth more."""
    if not all(bool(vector.isfinite().all()) for vector in master_vectors(engine)):
        raise ValueError("weights are not finite")


def _clear(folder: Path, unfinished: Path) -> None:
    """Makes the place to write to, without what killed saves left behind."""
    if not folder.is_dir():
        folder.mkdir()  # not the run folder as well: one that was moved away would be in two halves
        sync(folder.parent)
    for leftover in folder.glob("step_????????.tmp"):  # others' files are none of ours
        shutil.rmtree(leftover)
    unfinished.mkdir()


def _seal(unfinished: Path, writer: _Writer) -> dict[str, list[Any]]:
    """Sees the files of this rank onto the disk; size and digest of each."""
    if writer.failure is not None:
        raise writer.failure
    sealed = {}
    for file in writer.written:
        sync(file)
        sealed[str(file.relative_to(unfinished))] = [file.stat().st_size, sha256(file)]
    return sealed


def _complete(unfinished: Path, path: Path, step: int, files: dict[str, list[Any]]) -> None:
    sync(unfinished)
    write_whole(unfinished / MARKER, json.dumps({"step": step, "files": files}, indent=1))
    unfinished.rename(path)
    write_whole(path.parent / "latest", path.name)


def _prune(folder: Path, keep_last: int, keep_every: int) -> None:
    """Removes what the keep rules let go; what a disk refuses is left for the next time."""
    try:
        complete = sorted(path.parent for path in folder.glob(f"step_????????/{MARKER}"))
        best = folder / BEST
        spared = best.read_text() if best.exists() else ""
        for path in complete[:-keep_last]:
            if path.name != spared and (not keep_every or int(path.name.removeprefix("step_")) % keep_every):
                _remove(path)
    except OSError as error:
        log.warning("older checkpoints cannot be removed from %s (%s)", folder, error.strerror)


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


def resume(
    config: RunConfig,
    model: Trained,
    world: World,
    scale_of: ScaleOf = all_alike,
    begin: Callable[[], None] | None = None,
) -> tuple[int, DeepSpeedEngine]:
    """The steps done and the engine, in the state of the run folder's newest whole checkpoint if it has one.

    Args:
        begin: called where there is none, to give the model its first weights.
    """
    found = find(config, world)
    if found is None:
        if begin:
            begin()
        exact = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
        engine = build_engine(config, model, world, scale_of)
        set_masters(engine, exact)
        return 0, engine
    saved = made_once(world, lambda: read_saved(found.path))
    on_every_rank(world, lambda: load_weights(model, saved.weights))
    engine = build_engine(config, model, world, scale_of)
    restore(engine, saved, found.step)
    log.info("going on from %s", found.path)
    return found.step, engine


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
