"""Saving a run's state and going on from it, as a run does both: checksums and the disk's acknowledgement included."""

import argparse
import gc
import time
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import torch

from mixmim_ds.benchmark.disk import scratch, size_of
from mixmim_ds.benchmark.options import run_options
from mixmim_ds.benchmark.report import Measured
from mixmim_ds.benchmark.timing import in_turn, medians, spread
from mixmim_ds.config import PretrainConfig
from mixmim_ds.data.loader import Share, open_loader
from mixmim_ds.models import build_model
from mixmim_ds.train import checkpoint
from mixmim_ds.train.distributed import World, connected, on_first_rank, share_of_cores
from mixmim_ds.train.engine import accumulation, build_engine


def add_options(parser: argparse.ArgumentParser) -> None:
    """`checkpoint` knows the run's own options alone."""


def measure(arguments: argparse.Namespace) -> Measured:
    """Times saving after one step, and resuming in the same process.

    Raises:
        ValueError: the options do not go together, or the folder cannot be written.
    """
    config = run_options(arguments.words, {"data": "synthetic", "train.micro_batch": 2})
    if config.data.kind != "synthetic":
        raise ValueError("checkpoint needs no images; leave data.root out.")
    with connected(config.train.start_timeout_s) as world:
        with ExitStack() as stack:
            folder = on_first_rank(world, lambda: stack.enter_context(scratch(arguments.words)))
            numbers = _time(arguments, replace(config, run_dir=folder), world)
        return Measured(_said(numbers), numbers)


def _time(arguments: argparse.Namespace, config: PretrainConfig, world: World) -> dict[str, Any]:
    engine = build_engine(config, build_model(config.model), world)
    turns = accumulation(config, world.size)
    batches = open_loader(config, None, Share(world.rank, world.size, turns), world.device, share_of_cores()).batches(0)
    for _ in range(turns):  # a whole step, with which Adam's state comes into being
        batch = next(batches)
        engine.backward(engine(batch.images, batch.mask)[0])
        engine.step()
    saver, step = checkpoint.Saver(engine, config, world, 0), 0

    def save() -> dict[str, float]:
        """Saves as the next step."""
        nonlocal step
        step += 1
        return {"save_s": saver.save(step, must=True)}

    def go_on() -> dict[str, float]:
        """Resumes with a model and an engine of its own."""
        model = build_model(config.model)
        began = time.perf_counter()
        checkpoint.resume(config, model, world)
        if world.device.type == "cuda":
            torch.cuda.synchronize()
        seconds = time.perf_counter() - began
        del model
        gc.collect()  # or the engines of all repeats would be held together
        return {"resume_s": seconds}

    saves = in_turn({"save": save}, arguments.warmup, arguments.repeats)["save"]
    resumes = in_turn({"resume": go_on}, arguments.warmup, arguments.repeats)["resume"]
    held = size_of(saver.path_of(step))
    middle = medians(saves) | medians(resumes)
    return {
        "model": config.model.encoder, "ds": config.ds, "precision": config.precision, "processes": world.size,
        "repeats": arguments.repeats, "bytes": held, **{name: round(value, 4) for name, value in middle.items()},
        "save_s_range": spread([row["save_s"] for row in saves]),
        "resume_s_range": spread([row["resume_s"] for row in resumes]),
        "save_gb_per_s": round(held / middle["save_s"] / 1e9, 4),
    }  # fmt: skip


def _said(numbers: dict[str, Any]) -> str:
    """The cell of the row."""
    return (
        f"save {numbers['save_s']:.2f} s {numbers['save_s_range']}, {numbers['bytes'] / 1e9:.3f} GB, "
        f"{numbers['save_gb_per_s']:.2f} GB/s with checksums and fsync; resume {numbers['resume_s']:.2f} s "
        f"{numbers['resume_s_range']}, with checksums and a new engine, files in the page cache; processes: "
        f"{numbers['processes']}; medians of {numbers['repeats']}"
    )
