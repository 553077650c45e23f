"""The hot loop: a whole training step of the project's engine, alone or in turn with the plain method."""

import argparse
import os
import sys
from collections.abc import Callable, Iterator
from functools import partial
from multiprocessing import get_context
from multiprocessing.connection import Connection
from typing import Any

import torch

from mixmim_ds.benchmark.largest import largest_micro_batch, with_micro_batch
from mixmim_ds.benchmark.options import run_options
from mixmim_ds.benchmark.plain import PlainMixMIM
from mixmim_ds.benchmark.profile import communication_s, profiled, table
from mixmim_ds.benchmark.report import Measured
from mixmim_ds.benchmark.sides import PHASES, Loop, Ours, Side, time_steps
from mixmim_ds.benchmark.timing import in_turn, medians, spread
from mixmim_ds.config import PretrainConfig
from mixmim_ds.data.loader import MicroBatch, Share, open_loader
from mixmim_ds.models import MixMIM, build_model
from mixmim_ds.train.distributed import RunFailed, World, connected, end, share_of_cores
from mixmim_ds.train.engine import accumulation
from mixmim_ds.train.images import find_images
from mixmim_ds.train.metrics import memory_gib, peak_flops

STEPS = {"cuda": 5, "cpu": 1}  # of a repeat: on a GPU the host runs ahead, which a single step would not show
OUT_OF_MEMORY = 3  # exit code of a trial
Build = Callable[[PretrainConfig, World], Side]
Row = dict[str, float]


def engine(config: PretrainConfig, world: World) -> Side:
    """Our model in the run's engine."""
    return Ours(config, _model(config), world)


def loop(config: PretrainConfig, world: World) -> Side:
    """Our model, eager, in the plain method's loop: what of the difference is the model's."""
    return Loop(config, _model(config), world.device)


def plain(config: PretrainConfig, world: World) -> Side:
    """The plain method."""
    return Loop(config, PlainMixMIM(_model(config)), world.device)


def _model(config: PretrainConfig) -> MixMIM:
    """With the run's first weights."""
    torch.manual_seed(config.train.seed)
    return build_model(config.model)


BUILDS: dict[str, Build] = {"ours": engine, "ours_in_plain_loop": loop, "plain": plain}


def add_options(parser: argparse.ArgumentParser) -> None:
    """What `train` knows beside the run's own options."""
    parser.add_argument("--against", choices=["reference"], help="the plain method in eager PyTorch, in turn with ours")
    parser.add_argument("--find-micro-batch", action="store_true", help="take the largest that fits (one GPU)")
    parser.add_argument("--profile", action="store_true", help="also the operators of one step")


def measure(arguments: argparse.Namespace) -> Measured:
    """Times steps on random pixels, or on real images if data.root says where they are.

    Raises:
        ValueError: the options do not go together.
    """
    config = run_options(arguments.words, {"data": "synthetic"})
    with connected(config.train.start_timeout_s) as world:
        _check(arguments, config, world)
        builds: dict[str, Build] = BUILDS if arguments.against else {"ours": engine}
        largest = {}
        if arguments.find_micro_batch:
            alone = {name: [build] for name, build in builds.items()}
            tried = alone | ({"together": list(builds.values())} if arguments.against else {})
            largest = {name: largest_micro_batch(config, partial(attempt, some)) for name, some in tried.items()}
            config = with_micro_batch(config, list(largest.values())[-1])
        numbers, tables = _time(arguments, config, world, builds)
        numbers["largest_micro_batch"] = largest
        return Measured(_said(numbers), numbers, tables)


def _check(arguments: argparse.Namespace, config: PretrainConfig, world: World) -> None:
    turns = accumulation(config, world.size)
    if arguments.find_micro_batch:
        given = next((word for word in arguments.words if word.startswith(("train.micro_b", "train.global_b"))), None)
        if given:
            raise ValueError(f"--find-micro-batch would not heed {given}; leave one of them out.")
        if world.device.type != "cuda":
            raise ValueError("--find-micro-batch needs a GPU: a process that takes all of the host's memory is killed.")
        if world.size > 1:
            raise ValueError("--find-micro-batch works in one process: one without memory would leave others waiting.")
    if arguments.against and (world.size > 1 or turns > 1):
        raise ValueError(
            "--against reference compares steps of one micro-batch in one process; leave train.global_batch out and "
            "start it with python."
        )
    if arguments.against and not (config.model.group_attention and config.model.dual_reconstruction):
        raise ValueError(
            "--against reference compares with the whole method; leave model.group_attention and "
            "model.dual_reconstruction at true."
        )


def micro_batches(config: PretrainConfig, world: World) -> Iterator[MicroBatch]:
    """This rank's, from step 0 on."""
    share = Share(world.rank, world.size, accumulation(config, world.size))
    return open_loader(config, find_images(config.data, world), share, world.device, share_of_cores()).batches(0)


def attempt(builds: list[Build], config: PretrainConfig) -> float:
    """Two steps of each, with all of them held: the second step has the optimizer's state beside the activations.
    Returns the share of the GPU's memory that they took at most.

    In a process of its own, for an engine of DeepSpeed's is never freed in the one that made it.

    Raises:
        torch.OutOfMemoryError: the GPU's memory does not suffice.
        RunFailed: it failed otherwise.
    """
    context = get_context("spawn")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_attempt, args=(builds, config, theirs))
    process.start()
    process.join()
    if process.exitcode == OUT_OF_MEMORY:
        raise torch.OutOfMemoryError
    if process.exitcode:
        raise RunFailed(f"a trial of train.micro_batch={config.train.micro_batch} failed, as told above.")
    return ours.recv()


def _attempt(builds: list[Build], config: PretrainConfig, told: Connection) -> None:
    os.environ.pop("RANK", None)  # it is no rank of its parent's run
    try:
        with connected(config.train.start_timeout_s) as world:
            batches = micro_batches(config, world)
            for side in [build(config, world) for build in builds]:
                time_steps(side, batches, 1, 2, world.device)
            told.send(torch.cuda.max_memory_allocated() / torch.cuda.get_device_properties(world.device).total_memory)
    except RuntimeError as error:
        # PyTorch's own error, or that of a library which finds no room beside PyTorch's pool.
        if not any(words in str(error) for words in ("out of memory", "ALLOC_FAILED")):
            raise
        sys.exit(end(OUT_OF_MEMORY))


def _time(
    arguments: argparse.Namespace, config: PretrainConfig, world: World, builds: dict[str, Build]
) -> tuple[dict[str, Any], list[str]]:
    """The numbers and the tables of operators."""
    turns, steps, batches = accumulation(config, world.size), STEPS[world.device.type], micro_batches(config, world)
    flops = build_model(config.model).flops_per_image()
    sides = {name: build(config, world) for name, build in builds.items()}
    numbers = _describe(config, world, turns) | {"repeats": arguments.repeats, "steps_per_repeat": steps}
    first = next(batches)
    # With gradients, of which no use is made: without them torch.compile would make other graphs.
    numbers["first_loss"] = {name: side.forward(first).item() for name, side in sides.items()}
    blocks = {name: partial(time_steps, side, batches, turns, steps, world.device) for name, side in sides.items()}
    rows = in_turn(blocks, arguments.warmup, arguments.repeats)
    for name, kept in rows.items():
        numbers[name] = _rates(config, world, kept, flops)
    numbers["memory_gib"] = round(memory_gib(), 3)
    if arguments.against:
        numbers |= _ratios(numbers)
    tables, numbers["communication_s"] = [], 0.0
    for name, side in sides.items():
        if world.size > 1 or arguments.profile:
            entries = profiled(partial(time_steps, side, batches, turns, 1, world.device), world.device)
            tables += table(name, entries, world.device) if arguments.profile else []
            if world.size > 1:
                numbers["communication_s"] = round(communication_s(entries, world.device), 5)
    return numbers, tables


def _ratios(numbers: dict[str, Any]) -> dict[str, float]:
    """How many times as long the plain method takes: of whole steps, and of forward and backward pass; by medians, and
    by the fastest of each, which others that use the machine disturb least."""

    def ratio(name: str, phases: tuple[str, ...]) -> float:
        plain_s, ours_s = (sum(numbers[side][phase] for phase in phases) for side in ("plain", name))
        return round(plain_s / ours_s, 4)

    passes = ("forward_s", "backward_s")
    return {
        "ratio": ratio("ours", ("step_s",)),
        "ratio_forward_backward": ratio("ours", passes),
        "ratio_of_fastest": ratio("ours", ("fastest_step_s",)),
        "ratio_in_plain_loop": ratio("ours_in_plain_loop", ("step_s",)),
        "ratio_in_plain_loop_forward_backward": ratio("ours_in_plain_loop", passes),
        "ratio_in_plain_loop_of_fastest": ratio("ours_in_plain_loop", ("fastest_step_s",)),
    }


def _describe(config: PretrainConfig, world: World, turns: int) -> dict[str, Any]:
    return {
        "model": config.model.encoder, "img_size": config.model.img_size, "precision": config.precision,
        "ds": config.ds, "compile": config.compile, "activation_checkpointing": config.activation_checkpointing,
        "data": config.data.kind, "micro_batch": config.train.micro_batch, "processes": world.size,
        "accumulation": turns,
    }  # fmt: skip


def _rates(config: PretrainConfig, world: World, rows: list[Row], flops: int) -> dict[str, Any]:
    """Medians of one side. MFU as in a run's metrics: 3 x forward FLOPs x images/s of a GPU over its peak."""
    middle, peak = medians(rows), peak_flops(config.precision)
    rate = config.train.global_batch / middle["step_s"]
    mfu = None if peak is None else round(3 * flops * rate / world.size / peak, 4)
    rounded: dict[str, Any] = {name: round(value, 5) for name, value in middle.items()}
    rates = {"images_per_s": round(rate, 3), "images_per_s_per_gpu": round(rate / world.size, 3), "mfu": mfu}
    steps = [row["step_s"] for row in rows]
    return rounded | rates | {"fastest_step_s": round(min(steps), 5), "step_s_range": spread(steps)}


def _said(numbers: dict[str, Any]) -> str:
    """The cell of the row."""
    parts = [_side_said(name, numbers[name]) for name in BUILDS if name in numbers]
    sent = "communication: none, one process"
    if numbers["processes"] > 1:
        sent = f"communication {numbers['communication_s']:.3f} s a step, within backward and optimizer"
    parts += [sent, f"memory of the process {numbers['memory_gib']:.1f} GiB", f"micro-batch {numbers['micro_batch']}"]
    if numbers["largest_micro_batch"]:
        sizes = (f"{name.replace('_', ' ')} {size}" for name, size in numbers["largest_micro_batch"].items())
        parts.append(f"largest that fits: {', '.join(sizes)}")
    if "ratio" in numbers:
        for title, ratio in (("plain / ours", "ratio"), ("plain / ours in the plain loop", "ratio_in_plain_loop")):
            passes, fastest = numbers[f"{ratio}_forward_backward"], numbers[f"{ratio}_of_fastest"]
            parts.append(f"{title} {numbers[ratio]:.2f}, forward and backward {passes:.2f}, fastest {fastest:.2f}")
    return "; ".join([*parts, f"medians of {numbers['repeats']}"])


def _side_said(name: str, side: dict[str, Any]) -> str:
    split = ", ".join(f"{phase} {side[f'{phase}_s']:.3f}" for phase in PHASES)
    mfu = "MFU not known" if side["mfu"] is None else f"MFU {side['mfu']:.1%}"
    more = f", {side['step_memory_gib']:.1f} GiB beyond what is held" if "step_memory_gib" in side else ""
    return (
        f"{name.replace('_', ' ')}: {side['images_per_s']:.4g} img/s, {mfu}{more}, step {side['step_s']:.3f} s "
        f"{side['step_s_range']}: {split}"
    )
