"""The run folder: whose it is, and the files that say what ran there."""

import json
import logging
import platform
import subprocess
import sys
import time
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf

from mixmim_ds.checkpoints import write_whole
from mixmim_ds.config import ROOT, RunConfig, flatten, identity
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
    folder = Path(config.run_dir)
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"run_dir={folder} is a file; choose another run_dir.")
    if not (folder / "config.yaml").exists():
        return
    held: Any = OmegaConf.to_container(OmegaConf.load(folder / "config.yaml"))
    before, now = flatten(held), identity(config) | {"data.fingerprint": fingerprint}
    for name, value in now.items():
        if before.get(name) != value:
            raise ValueError(
                f"run_dir={folder} holds a run with {name}={before.get(name)}, not {value}; "
                "give it that value to continue the run, or choose another run_dir."
            )


def open_run_folder(config: RunConfig, world: World, fingerprint: str) -> Path:
    """Creates the run folder or accepts it as this run's, writes what the run is and opens its log.

    Raises:
        ValueError: see `check_run_folder`; or the folder cannot be written.
    """
    folder = Path(config.run_dir)
    joined = engine_config(config, world.size)
    hosts = gather(world, platform.node())
    on_first_rank(world, lambda: check_run_folder(config, fingerprint))
    on_first_rank(world, lambda: _write_files(folder, config, joined, fingerprint, hosts))
    if world.first:
        _open_log(folder / "train.log")
    return folder


def _write_files(folder: Path, config: RunConfig, joined: dict[str, Any], fingerprint: str, hosts: list[str]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    options = asdict(config)
    options["data"]["fingerprint"] = fingerprint
    write_whole(folder / "config.yaml", OmegaConf.to_yaml(OmegaConf.create(options)))
    write_whole(folder / "ds_config.json", json.dumps(joined, indent=2))
    path = folder / "environment.json"
    starts = json.loads(path.read_text()) if path.exists() else []
    write_whole(path, json.dumps([*starts, _environment(hosts)], indent=2))


def _environment(hosts: list[str]) -> dict[str, Any]:
    """What this start of the run ran on."""
    git = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True)
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or "cpu"
    return {
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "command": sys.argv,
        "git": git.stdout.strip() or None,
        "python": platform.python_version(),
        "versions": {"mixmim_ds": __version__} | {name: version(name) for name in PACKAGES},
        "device": device,
        "hosts": hosts,
    }


def _open_log(path: Path) -> None:
    log.setLevel(logging.INFO)
    log.propagate = False
    for handler in (logging.StreamHandler(sys.stdout), logging.FileHandler(path)):
        handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%Y-%m-%d %H:%M:%S"))
        log.addHandler(handler)
