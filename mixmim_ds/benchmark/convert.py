"""The export of a run: launch/convert.py as a process of its own, for the time and peak memory that a user sees."""

import argparse
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from mixmim_ds.benchmark.disk import scratch, size_of
from mixmim_ds.benchmark.options import run_options
from mixmim_ds.benchmark.report import Measured
from mixmim_ds.benchmark.timing import in_turn, medians, spread
from mixmim_ds.config import ROOT
from mixmim_ds.train.distributed import RunFailed

# The least that leaves a checkpoint.
ONE_STEP = {
    "data": "synthetic", "train.micro_batch": 2, "train.max_steps": 1, "optim.warmup_epochs": 0,
    "train.picture_every": 0,
}  # fmt: skip


def add_options(parser: argparse.ArgumentParser) -> None:
    """What `convert` knows beside the run's own options."""
    parser.add_argument("--dtype", choices=["fp32", "bf16"], default="fp32", help="of the weights (default: fp32)")


def measure(arguments: argparse.Namespace) -> Measured:
    """Makes a run of one step on random pixels, then exports its encoder again and again.

    Raises:
        ValueError: the options do not go together, or the folder cannot be written.
    """
    config = run_options(arguments.words, ONE_STEP)
    if config.data.kind != "synthetic":
        raise ValueError("convert needs no images; leave data.root out.")
    with scratch(arguments.words) as name:
        run, out = Path(name) / "run", Path(name) / "exported"
        words = [word for word in arguments.words if not word.startswith("run_dir=")]
        given = {word.partition("=")[0] for word in words}
        defaults = ONE_STEP | {"train.global_batch": config.train.global_batch}
        own = (f"{name}={value}" for name, value in defaults.items() if name not in given)
        _call("launch/pretrain.py", *words, *own, f"run_dir={run}")

        def export() -> dict[str, float]:
            shutil.rmtree(out, ignore_errors=True)
            return _call("launch/convert.py", str(run), str(out), "--dtype", arguments.dtype)

        rows = in_turn({"export": export}, arguments.warmup, arguments.repeats)["export"]
        numbers: dict[str, Any] = {"model": config.model.encoder, "ds": config.ds, "precision": config.precision}
        numbers |= {"dtype": arguments.dtype, "repeats": arguments.repeats, "export_bytes": size_of(out)}
        numbers |= {"checkpoint_bytes": size_of(run / "checkpoints")}
    numbers |= {name: round(value, 3) for name, value in medians(rows).items()}
    numbers["convert_s_range"] = spread([row["convert_s"] for row in rows])
    return Measured(_said(numbers), numbers)


def _call(*words: str) -> dict[str, float]:
    """Runs a command of the project; seconds from start to end, imports included, and peak resident memory, GiB.

    This process must stay smaller than that one: what it holds when it starts a process counts as that one's peak
    (getrusage(2)). So the run is made in a process of its own too.
    """
    began = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, str(ROOT / words[0]), *words[1:]], stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    assert process.stdout is not None
    printed = process.stdout.read().decode(errors="replace")
    _, status, usage = os.wait4(process.pid, 0)  # the usage of this process alone, not of all that have ended
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise RunFailed(f"{words[0]} failed: {(printed.strip().splitlines() or ['without a word'])[-1]}")
    return {"convert_s": time.perf_counter() - began, "peak_memory_gib": usage.ru_maxrss / 2**20}


def _said(numbers: dict[str, Any]) -> str:
    """The cell of the row."""
    return (
        f"{numbers['convert_s']:.2f} s {numbers['convert_s_range']} with imports, peak memory "
        f"{numbers['peak_memory_gib']:.2f} GiB; from a checkpoint of {numbers['checkpoint_bytes'] / 1e9:.3f} GB to "
        f"{numbers['export_bytes'] / 1e9:.3f} GB; medians of {numbers['repeats']}"
    )
