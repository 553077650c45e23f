"""What a benchmark says: numbers for programs, a row of BENCHMARKS.md for people, and where they were measured."""

import json
import os
import shlex
import sys
import time
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from mixmim_ds.device import on_gpu

PACKAGES = ("torch", "torchvision", "deepspeed", "timm", "nvidia-dali-cuda130", "nvidia-dali-cuda120")
COLUMNS = ("command", "measured", "hardware", "versions", "date")


@dataclass(frozen=True)
class Measured:
    """The outcome of a subcommand."""

    said: str  # the cell `measured` of the row
    numbers: dict[str, Any]  # each name ends in its unit
    tables: list[str] = field(default_factory=list)  # lines to print before the row


def processor() -> str:
    """The CPU's name and the cores that this process may use (proc(5))."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return f"{len(os.sched_getaffinity(0))} cores of {next(names, 'an unnamed CPU')}"


def memory_of_machine() -> str:
    """All of the host's, GiB."""
    return f"{os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 2**30:.0f} GiB"


def hardware() -> str:
    """The GPU that is used, if there is one, and the host."""
    gpu = torch.cuda.get_device_name() if on_gpu() else "no GPU"
    return f"{processor()}, {memory_of_machine()}, {gpu}"


def versions() -> dict[str, str]:
    """Of the installed packages that speed depends on."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:  # one of the two DALIs, or a machine without it
            continue
    return found


def machine() -> dict[str, Any]:
    """What a row names beside its numbers."""
    return {"hardware": hardware(), "versions": versions(), "date": time.strftime("%Y-%m-%d")}


def command() -> str:
    """The command line of this process, to be repeated; of several, that of their launcher."""
    words = (word for word in sys.argv[1:] if not word.startswith("--local_rank"))
    processes = int(os.environ.get("WORLD_SIZE", 1))
    head = f"deepspeed --num_gpus {processes}" if processes > 1 else "python"
    return f"{head} {shlex.join([os.path.relpath(sys.argv[0]), *words])}"


def print_report(subcommand: str, measured: Measured) -> None:
    """Tables, the row with its header, and on the last line everything as JSON."""
    place = machine()
    packages = ", ".join(f"{name} {number}" for name, number in place["versions"].items())
    row = (f"`{command()}`", measured.said, place["hardware"], packages, place["date"])
    for line in (*measured.tables, "", _cells(COLUMNS), _cells(("---",) * len(COLUMNS)), _cells(row), ""):
        print(line)
    print(json.dumps({"benchmark": subcommand, "command": command(), **measured.numbers, **place}))


def _cells(texts: tuple[str, ...]) -> str:
    return "| " + " | ".join(text.replace("|", "\\|") for text in texts) + " |"
