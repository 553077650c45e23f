"""The run folder: whose it is, and the files that say what ran there."""

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

from mixmim_ds.checkpoints import newest_complete, write_whole
from mixmim_ds.config import ROOT, RunConfig, flatten, identity
from mixmim_ds.device import on_gpu
from mixmim_ds.train.distributed import World, gather, on_first_rank
from mixmim_ds.train.engine import engine_config
from mixmim_ds.version import __version__

PACKAGES = ("torch", "torchvision", "deepspeed", "timm", "hydra-core", "numpy", "tensorboard")
log = logging.getLogger("mixmim_ds")


def check_run_folder(config: RunConfig, fingerprint: str) -> None:
    """Refuses a folder that holds another run, before anything in it is touched.

    Raises:
        ValueError: the folder's run has another value of an option that decides what is computed, or other data.
    """
    difference = difference_to(config, fingerprint)
    if difference:
        name, held, wanted = difference
        raise ValueError(
            f"run_dir={config.run_dir} holds a run with {name}={held}, not {wanted}; give it that value to continue "
            "the run, choose another run_dir, or start anew from its weights with resume=weights."
        )


def difference_to(config: RunConfig, fingerprint: str) -> tuple[str, Any, Any] | None:
    """The first option that decides what is computed and is another in the run that the folder holds: its name, the
    value there and the value here. ValueError if run_dir is a file."""
    folder = Path(config.run_dir)
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"run_dir={folder} is a file; choose another run_dir.")
    if not (folder / "config.yaml").exists():
        return None
    held: Any = OmegaConf.to_container(OmegaConf.load(folder / "config.yaml"))
    # An option that is younger than the run had its default there.
    defaults: Any = OmegaConf.to_container(OmegaConf.structured(type(config)))
    before, now = flatten(defaults) | flatten(held), identity(config) | {"data.fingerprint": fingerprint}
    return next(((name, before.get(name), value) for name, value in now.items() if before.get(name) != value), None)


def earlier_weights(config: RunConfig, fingerprint: str) -> Path | None:
    """For resume=weights: the checkpoint to take the weights of, or None where the run goes on from its own.

    Raises:
        ValueError: there is no run to take weights from, or it has no complete checkpoint.
    """
    if config.resume != "weights":
        return None
    folder = Path(config.run_dir)
    if difference_to(config, fingerprint):
        source = folder
    elif newest_complete(folder):
        return None
    else:
        aside = _set_asides(folder)
        if not aside:
            raise ValueError(f"resume=weights has no effect: run_dir={folder} holds no earlier run; take it out.")
        source = aside[-1]
    newest = newest_complete(source)
    if newest is None:
        raise ValueError(f"resume=weights: {source} holds no complete checkpoint; choose another run_dir.")
    return newest.path


def _set_asides(folder: Path) -> list[Path]:
    """Runs that made way for others, oldest first."""
    return sorted(folder.glob("earlier_*"), key=lambda path: int(path.name.removeprefix("earlier_")))


def _set_aside(folder: Path) -> None:
    """Moves the run in a folder into a folder of its own there."""
    aside = _set_asides(folder)
    place = folder / f"earlier_{len(aside) + 1}"
    place.mkdir()
    for entry in set(folder.iterdir()) - {*aside, place, folder / "lock"}:
        entry.rename(place / entry.name)


def open_run_folder(
    config: RunConfig, world: World, fingerprint: str, classes: list[str] | None = None
) -> IO[str] | None:
    """Creates the run folder or accepts it as this run's, writes what the run is and opens its log.

    Args:
        fingerprint, classes: of the data; they are kept with the options, as data.fingerprint and data.classes.

    Returns:
        On the first rank the lock that keeps other runs out, for as long as it stays open.

    Raises:
        ValueError: see `check_run_folder`; or the folder is in use, or cannot be written.
    """
    joined = engine_config(config, world.size)
    hosts = gather(world, platform.node())
    locks: list[IO[str]] = []
    if not world.first:
        log.addHandler(logging.NullHandler())  # or Python prints the warnings of every rank
    on_first_rank(world, lambda: locks.append(_take(config, joined, fingerprint, classes, hosts)))
    return locks[0] if locks else None


def _take(
    config: RunConfig, joined: dict[str, Any], fingerprint: str, classes: list[str] | None, hosts: list[str]
) -> IO[str]:
    folder = Path(config.run_dir)
    if config.resume != "weights":
        check_run_folder(config, fingerprint)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = _lock(folder)
        if config.resume == "weights" and difference_to(config, fingerprint):
            _set_aside(folder)
        check_run_folder(config, fingerprint)  # the run that had the lock until now may have been the first here
        options = asdict(config)
        options["data"] |= {"fingerprint": fingerprint} | ({} if classes is None else {"classes": classes})
        _write_files(folder, options, joined, hosts)
        _open_log(folder / "train.log")
    except OSError as error:
        raise ValueError(f"run_dir={folder} cannot be written ({error.strerror}); choose another run_dir.") from error
    return lock


def _lock(folder: Path) -> IO[str]:
    """Keeps other runs out of a folder; the kernel lets go of it however this process ends (flock(2))."""
    file = (folder / "lock").open("a+")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        file.seek(0)
        raise ValueError(
            f"run_dir={folder} is in use by {file.read().strip()}; stop that run or choose another run_dir."
        ) from error
    file.truncate(0)
    file.write(f"process {os.getpid()} on {platform.node()} since {time.strftime('%Y-%m-%d %H:%M:%S')}")
    file.flush()
    return file


def _write_files(folder: Path, options: dict[str, Any], joined: dict[str, Any], hosts: list[str]) -> None:
    write_whole(folder / "config.yaml", OmegaConf.to_yaml(OmegaConf.create(options)))
    write_whole(folder / "ds_config.json", json.dumps(joined, indent=2))
    path = folder / "environment.json"
    starts = json.loads(path.read_text()) if path.exists() else []
    write_whole(path, json.dumps([*starts, _environment(hosts)], indent=2))


def _environment(hosts: list[str]) -> dict[str, Any]:
    """What this start of the run ran on."""
    git = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True)
    device = torch.cuda.get_device_name() if on_gpu() else platform.processor() or "cpu"
    return {
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "command": sys.argv,
        "git": git.stdout.strip() or None,
        "python": platform.python_version(),
        "versions": {"mixmim_ds": __version__} | {name: version(name) for name in PACKAGES},
        "device": device,
        "hosts": hosts,
    }


class _LogFile(logging.FileHandler):
    """train.log; what a full disk does not take is written later, or was in the console."""

    def handleError(self, record: logging.LogRecord) -> None:
        """A traceback for every line would bury what the console still shows."""


def _open_log(path: Path) -> None:
    log.setLevel(logging.INFO)
    log.propagate = False
    for handler in (logging.StreamHandler(sys.stdout), _LogFile(path)):
        handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%Y-%m-%d %H:%M:%S"))
        log.addHandler(handler)
