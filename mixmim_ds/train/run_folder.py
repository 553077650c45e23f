"""The run folder: whose it is, and the files that say what ran there."""

import errno
import fcntl
import json
import logging
import os
import platform
import subprocess
import sys
import time
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import IO, Any

import torch
from omegaconf import OmegaConf

from mixmim_ds.checkpoints import newest_complete, steps_of, write_whole
from mixmim_ds.config import ROOT, RunConfig, flatten, identity
from mixmim_ds.data.labelled import Labelled
from mixmim_ds.data.shards import Images
from mixmim_ds.device import on_gpu
from mixmim_ds.json_lines import read_rows
from mixmim_ds.train.distributed import World, gather, on_first_rank
from mixmim_ds.train.engine import engine_config
from mixmim_ds.train.run_log import open_log
from mixmim_ds.version import __version__

PACKAGES = ("torch", "torchvision", "deepspeed", "timm", "hydra-core", "numpy", "tensorboard")
CONFIG = "config.yaml"
MISTAKES = {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.ENAMETOOLONG}  # a disk does not mend them
SHAPES = {"model.encoder", "model.img_size", "model.decoder_dim", "model.decoder_depth"}  # of the weights
NO_LOCKS = {errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK}  # as of Lustre mounted without flock
log = logging.getLogger("mixmim_ds")


def facts_of(data: Images | Labelled | None) -> dict[str, Any]:
    """What tells a run's data apart, wherever they lie; config.yaml keeps it as data.fingerprint, and with labels
    data.labels, their digest, and data.classes. None is synthetic images."""
    if isinstance(data, Labelled):
        return {"fingerprint": data.images.fingerprint, "labels": data.digest, "classes": data.classes}
    return {"fingerprint": "synthetic" if data is None else data.fingerprint}


def check_run_folder(config: RunConfig, facts: dict[str, Any]) -> None:
    """Refuses a folder that holds another run, before anything in it is touched.

    Args:
        facts: of the data, as by `facts_of`.

    Raises:
        ValueError: the folder's run has another value of an option that decides what is computed, or other data.
    """
    difference = difference_to(config, facts)
    if difference:
        name, held, wanted = difference
        if name == "data.fingerprint":
            raise ValueError(
                f"run_dir={config.run_dir} holds a run on other images than those of data.root={config.data.root}, or "
                "these have changed since; give those that it began with, choose another run_dir, or start anew from "
                "its weights with resume=weights."
            )
        if name in ("data.labels", "data.classes"):
            raise ValueError(
                f"run_dir={config.run_dir} holds a run whose images had other labels than those of data.root="
                f"{config.data.root} have; give them the old ones to continue the run, or choose another run_dir."
            )
        anew = "choose another run_dir, or start anew from its weights with resume=weights."
        if name in SHAPES:  # which these weights do not fit
            anew = "or choose another run_dir."
        raise ValueError(
            f"run_dir={config.run_dir} holds a run with {name}={held}, not {wanted}; give it that value to continue "
            f"the run, {anew}"
        )


def difference_to(config: RunConfig, facts: dict[str, Any]) -> tuple[str, Any, Any] | None:
    """The first option, or fact of the data, that decides what is computed and is another in the run that the folder
    holds: its name, the value there and the value here. A run that has neither a checkpoint nor reported a step holds
    nothing.

    Raises:
        ValueError: run_dir is a file.
    """
    folder = Path(config.run_dir)
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"run_dir={folder} is a file; choose another run_dir.")
    begun = steps_of(folder) or read_rows(folder / "metrics.jsonl")
    if not begun or not (folder / CONFIG).exists():
        return None
    held: Any = OmegaConf.to_container(OmegaConf.load(folder / CONFIG))
    # An option that is younger than the run had its default there.
    defaults: Any = OmegaConf.to_container(OmegaConf.structured(type(config)))
    before, now = flatten(defaults) | flatten(held), identity(config) | flatten({"data": facts})
    # A fact that was not kept yet when the run began counts as the same.
    return next(((name, before[name], value) for name, value in now.items() if before.get(name, value) != value), None)


def earlier_weights(config: RunConfig, facts: dict[str, Any]) -> Path | None:
    """For resume=weights: the checkpoint to take the weights of, or None where the run goes on from its own.

    Raises:
        ValueError: there is no run to take weights from, or it has no complete checkpoint.
    """
    if config.resume != "weights":
        return None
    folder = Path(config.run_dir)
    aside = _set_asides(folder)
    if difference_to(config, facts) and not _half_aside(folder):
        source = folder
    elif newest_complete(folder):
        return None
    elif aside:
        source = aside[-1]
    else:
        raise ValueError(f"resume=weights has no effect: run_dir={folder} holds no earlier run; take it out.")
    newest = newest_complete(source)
    if newest is None:
        raise ValueError(f"resume=weights: {source} holds no complete checkpoint; choose another run_dir.")
    return newest.path


def _set_asides(folder: Path) -> list[Path]:
    """Runs that made way for others, oldest first."""
    numbers = {path: path.name.removeprefix("earlier_") for path in folder.glob("earlier_*")}
    ours = [path for path, number in numbers.items() if number.isdecimal()]  # others may bear the user's names
    return sorted(ours, key=lambda path: int(numbers[path]))


def _half_aside(folder: Path) -> Path | None:
    """Where a run was moving another one to when it was killed: checkpoints go first, what says whose they are last."""
    newest = next(reversed(_set_asides(folder)), None)
    return newest if newest and not (newest / CONFIG).exists() and not steps_of(folder) else None


def _set_aside(folder: Path) -> None:
    """Moves the run in a folder into a folder of its own there, or the rest of it where that was interrupted."""
    aside = _set_asides(folder)
    place = _half_aside(folder) or folder / f"earlier_{len(aside) + 1}"
    place.mkdir(exist_ok=True)
    entries = set(folder.iterdir()) - {*aside, place, folder / "lock"}
    for entry in sorted(entries, key=lambda entry: (entry.name == CONFIG, entry.name != "checkpoints")):
        entry.rename(place / entry.name)


def open_run_folder(config: RunConfig, world: World, facts: dict[str, Any]) -> IO[str] | None:
    """Creates the run folder or accepts it as this run's, writes what the run is and opens its log.

    Args:
        facts: of the data, as by `facts_of`; they are kept with the options.

    Returns:
        On the first rank the lock that keeps other runs out, for as long as it stays open.

    Raises:
        ValueError: see `check_run_folder`; or the folder is in use, or the user may not write there.
        RunFailed: it cannot be written for now.
    """
    joined = engine_config(config, world.size)
    hosts = gather(world, platform.node())
    locks: list[IO[str]] = []
    if not world.first:
        open_log(Path(config.run_dir), first=False)
    on_first_rank(world, lambda: locks.append(_take(config, joined, facts, hosts)))
    return locks[0] if locks else None


def _take(config: RunConfig, joined: dict[str, Any], facts: dict[str, Any], hosts: list[str]) -> IO[str]:
    folder = Path(config.run_dir)
    if config.resume != "weights":
        check_run_folder(config, facts)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = _lock(folder)
        if config.resume == "weights" and (difference_to(config, facts) or _half_aside(folder)):
            _set_aside(folder)
        check_run_folder(config, facts)  # the run that had the lock until now may have been the first here
        (folder / "failures").mkdir(exist_ok=True)  # PyTorch's flight recorder makes none
        options = asdict(config)
        options["data"] |= facts
        _write_files(folder, options, joined, hosts)
        open_log(folder, first=True)
    except OSError as error:
        raise unwritable(folder, error) from error
    return lock


def unwritable(folder: Path, error: OSError) -> Exception:
    """What to raise where a run folder cannot be written: a ValueError, or an OSError where that may pass."""
    said = f"run_dir={folder} cannot be written ({error.strerror}); "
    if error.errno in MISTAKES:
        return ValueError(f"{said}choose another run_dir.")
    return OSError(f"{said}make room there, or choose another run_dir.")


def _lock(folder: Path) -> IO[str]:
    """Keeps other runs out of a folder; the kernel lets go of it however this process ends (flock(2))."""
    file = (folder / "lock").open("a+")
    try:
        _lock_within(file, 2.0)  # a report that looks whether a run is at work here holds it for a moment
    except BlockingIOError as error:
        file.seek(0)
        raise ValueError(
            f"run_dir={folder} is in use by {file.read().strip()}; stop that run or choose another run_dir."
        ) from error
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
        log.warning("run_dir=%s is on a disk without locks (%s): keep other runs out of it", folder, error.strerror)
    file.truncate(0)
    file.write(f"process {os.getpid()} on {platform.node()} since {time.strftime('%Y-%m-%d %H:%M:%S')}")
    file.flush()
    return file


def _lock_within(file: IO[str], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while True:
        try:
            return fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > deadline:
                raise
        time.sleep(0.05)


def _write_files(folder: Path, options: dict[str, Any], joined: dict[str, Any], hosts: list[str]) -> None:
    write_whole(folder / CONFIG, OmegaConf.to_yaml(OmegaConf.create(options)))
    write_whole(folder / "ds_config.json", json.dumps(joined, indent=2))
    path = folder / "environment.json"
    starts = json.loads(path.read_text()) if path.exists() else []
    write_whole(path, json.dumps([*starts, _environment(hosts)], indent=2))


def _environment(hosts: list[str]) -> dict[str, Any]:
    """What this start of the run ran on."""
    device = torch.cuda.get_device_name() if on_gpu() else platform.processor() or "cpu"
    return {
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "command": sys.argv,
        "git": _revision(),
        "python": platform.python_version(),
        "versions": {"mixmim_ds": __version__} | {name: version(name) for name in PACKAGES},
        "device": device,
        "hosts": hosts,
    }


def _revision() -> str | None:
    """Of the code, where git knows it; containers often lack git."""
    try:
        told = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True)
    except OSError:
        return None
    return told.stdout.strip() or None
