"""The story of a run, of pretraining or fine-tuning: prepared, trained step by step, saved, stopped, gone on with."""

import gc
import logging
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from deepspeed.runtime.engine import DeepSpeedEngine
from torch import Tensor
from torch.profiler import record_function

from mixmim_ds.config import RunConfig
from mixmim_ds.data.loader import Batch, Loader
from mixmim_ds.data.recover import DataFailed
from mixmim_ds.data.shards import Images
from mixmim_ds.evaluate.pictures import Picture
from mixmim_ds.train import checkpoint
from mixmim_ds.train.bad_images import BadImages, tell_unreadable
from mixmim_ds.train.distributed import (
    EXIT_REQUEUE,
    AgreedMistake,
    PeerLost,
    RankFailed,
    World,
    connected,
    is_peer_lost,
    mean_over_ranks,
    on_every_rank,
    on_first_rank,
    shorten_timeout,
)
from mixmim_ds.train.engine import Trained, accumulation, set_lr
from mixmim_ds.train.failures import BadSteps, record_flights
from mixmim_ds.train.metrics import Metrics
from mixmim_ds.train.optim import ScaleOf, Schedule, all_alike
from mixmim_ds.train.profiling import Profiler
from mixmim_ds.train.restore import average_weights, load_weights
from mixmim_ds.train.run_folder import earlier_weights, open_run_folder
from mixmim_ds.train.run_log import log_failure
from mixmim_ds.train.stop import StopRequest
from mixmim_ds.zero_files import read_saved

log = logging.getLogger("mixmim_ds")


@dataclass(frozen=True)
class Judge:
    """What a checkpoint is worth, found out every so many steps and after the last one."""

    every: int  # steps
    scores: Callable[[Path], dict[str, float]]  # of a checkpoint; called on every rank, told by the first
    best_by: str | None = None  # the checkpoint with the highest of this score stays


@dataclass(frozen=True)
class Task:
    """What is trained, on what, and what is told of it."""

    config: RunConfig
    encoder: str  # its name
    model: Trained
    loader: Loader[Batch]
    index: Images | None
    facts: dict[str, Any]  # of the data, as by `facts_of`
    draw: Callable[[Any, Tensor], Picture]  # of a batch and what the model makes of it
    scale_of: ScaleOf = all_alike
    ema_decay: float | None = None
    judge: Judge | None = None
    begin: Callable[[], None] | None = None  # gives the model its first weights, unless the run goes on


@dataclass(frozen=True)
class Run:
    """What the loop works with."""

    task: Task
    world: World
    lock: IO[str] | None  # on the run folder, while it is open
    engine: DeepSpeedEngine
    schedule: Schedule
    metrics: Metrics
    saver: checkpoint.Saver
    profiler: Profiler
    turns: int  # micro-batches of a step on this rank
    start: int  # steps that an earlier start of the run has done
    last: int  # the step after which the run ends


def conduct(config: RunConfig, prepare: Callable[[World], Task]) -> int:
    """Trains until the last epoch, `train.max_steps` or a request to stop; returns the exit code of the process.

    Raises:
        ValueError: an option does not go with the others, the data or the run folder.
        RunFailed: it cannot go on: what it computes is not finite, it cannot be saved, too many images are broken.
        RankFailed: this rank cannot read the data any more, or another rank is gone.
    """
    # Imported modules are never garbage, but each full collection scans them for 0.3 s: ten while DeepSpeed starts,
    # then one whenever the run reports.
    gc.freeze()
    record_flights(config)
    try:
        with connected(config.train.start_timeout_s) as world:
            stop = StopRequest(world)
            try:
                return _whole_run(prepare, world, stop)
            except Exception as error:
                log_failure(error, world.rank)
                raise
            finally:
                stop.close()
    finally:
        gc.enable()
        gc.unfreeze()  # or nanobind, in Triton, tells of leaks when the interpreter ends


def _whole_run(prepare: Callable[[World], Task], world: World, stop: StopRequest) -> int:
    """With errors as `conduct` raises them."""
    try:
        task = prepare(world)
        stop.listen()
        run = _begin(task, world)
        _catch_up(run)
        if run.start >= run.last:
            done, last = f"{run.start:,}", f"{run.last:,}"
            log.info("this run has already done %s steps of %s; nothing is left to do", done, last)
            return 0
        try:
            with run.profiler:
                return _train(run, stop)
        except AgreedMistake:
            raise
        except ValueError as error:  # of a library, and perhaps on this rank alone
            raise RuntimeError("training met an error that it should not") from error
    except DataFailed as error:
        raise RankFailed(str(error)) from error
    except RuntimeError as error:
        if not is_peer_lost(error):
            raise
        reason = str(error).partition("\n")[0].partition(". ")[0]  # gloo's advice follows
        raise PeerLost(
            f"rank {world.rank} waited in vain for another one, which has died or hangs ({reason})."
        ) from error


def _begin(task: Task, world: World) -> Run:
    config, train = task.config, task.config.train
    turns = accumulation(config, world.size)
    weights = on_first_rank(world, lambda: earlier_weights(config, task.facts))
    if weights:
        on_every_rank(world, lambda: load_weights(task.model, read_saved(weights).weights))
    lock = open_run_folder(config, world, task.facts)
    plan = task.loader.plan
    schedule = Schedule(config.optim, train.global_batch, plan.steps_per_epoch, train.epochs)
    last = min(schedule.total_steps, train.max_steps or schedule.total_steps)
    log.info(
        "%s | %s images | %s img/process x %s processes x %s accumulation = %s img/step | %s steps, %s an epoch | "
        "peak lr %.3g | ZeRO %s, %s",
        task.encoder, f"{len(plan.sizes):,}", train.micro_batch, world.size, turns, train.global_batch,
        f"{last:,}", f"{schedule.steps_per_epoch:,}", schedule.peak, config.ds, config.precision,
    )  # fmt: skip
    if task.index is not None:
        tell_unreadable(config.data, task.index)
    if config.optim.warmup_epochs >= train.epochs:
        log.warning("all %s epochs are warm-up: optim.warmup_epochs=%s", train.epochs, config.optim.warmup_epochs)
    flops = task.model.flops_per_image()  # before ZeRO-3 takes the weights apart
    start, engine = checkpoint.resume(config, task.model, world, task.scale_of, None if weights else task.begin)
    if weights:
        log.info("starting anew from the weights of the earlier run's %s", weights.name)
    metrics = Metrics(Path(config.run_dir), world, start, last, train.global_batch, flops, config.precision)
    metrics.options(asdict(config))
    saver = checkpoint.Saver(engine, config, world, start)
    profiler = Profiler(config, world, start, last)
    return Run(task, world, lock, engine, schedule, metrics, saver, profiler, turns, start, last)


def _train(run: Run, stop: StopRequest) -> int:
    task, train, engine, world = run.task, run.task.config.train, run.engine, run.world
    bad_images = BadImages(task.config, world, task.index, task.loader.bad)
    bad_steps = BadSteps(task.config, world, run.start, str if task.index is None else task.index.name)
    batches = task.loader.batches(run.start)
    # Collected at the same steps everywhere, so that no rank waits for another one's collection.
    gc.disable()
    step, waited = run.start, 0.0
    while step < run.last:
        lr = run.schedule.lr_at(step)
        set_lr(engine, lr)
        done = _update(run, batches)
        waited += done.waited
        step += 1
        run.metrics.pause(run.profiler.step(step))
        if step == run.start + 1:
            shorten_timeout(train.step_timeout_s)
        stopping = stop.agreed()
        ending = stopping or step == run.last
        reporting = step % train.log_every == 0 or step == run.last
        judging = _is_judged(run, step)
        saving = ending or judging or step % train.save_every == 0
        mean = mean_over_ranks(world, torch.stack(done.losses).mean().item()) if reporting else 0.0
        if not (engine.was_step_applied() and math.isfinite(mean)):
            bad_steps.note(step, lr, done.losses, done.ids, run.saver.newest)
        if reporting or saving:
            bad = bad_images.exchange()
        if reporting:
            run.metrics.report(step, _epoch(run, step), mean, lr, engine.get_global_grad_norm(), waited, bad)
            gc.collect()
        if world.first and train.picture_every and (step % train.picture_every == 0 or step == run.last):
            run.metrics.picture(step, task.draw(done.batch, done.output))
        if saving:
            run.metrics.saved(run.saver.save(step, must=ending))
        if stopping:
            break
        if judging:
            _judge(run, step)
        del done  # or its images and output would lie beside those of the next step
    stop.settle()
    run.profiler.close()
    run.metrics.close()
    log.info("%s after step %s; run folder: %s", "done" if step == run.last else "stopped", step, task.config.run_dir)
    judged = not (stopping and judging)  # or the next start does it
    return 0 if step == run.last and judged else EXIT_REQUEUE


@dataclass(frozen=True)
class Update:
    """What one step saw and made of it, on this rank."""

    batch: Batch  # the last one
    output: Tensor  # of the model, for that
    losses: list[Tensor]  # of all, on the device
    ids: list[np.ndarray]  # of all
    waited: float  # seconds for data


def _update(run: Run, batches: Iterator[Batch]) -> Update:
    """Trains one step; the names are those of a trace (`train.profile`)."""
    engine, waited = run.engine, 0.0
    losses, ids = [], []
    for turn in range(run.turns):
        began = time.perf_counter()
        with record_function("data"):
            batch = next(batches)
        waited += time.perf_counter() - began
        with record_function("forward"):
            loss, output = engine(*batch.inputs)
        with record_function("backward"):
            engine.backward(loss)
        with record_function("update"):
            engine.step()
        losses.append(loss.detach())
        ids.append(batch.ids)
        if turn + 1 < run.turns:
            del batch, output  # or they would lie beside those of the next forward pass
    if run.task.ema_decay and engine.was_step_applied():
        average_weights(engine, run.task.ema_decay)
    return Update(batch, output, losses, ids, waited)


def _epoch(run: Run, step: int) -> float:
    return step / run.schedule.steps_per_epoch


def _is_judged(run: Run, step: int) -> bool:
    judge = run.task.judge
    return judge is not None and (step % judge.every == 0 or step == run.last)


def _judge(run: Run, step: int) -> None:
    """Judges the checkpoint of a step, which is what an export would hold, whatever the engine has made of it."""
    judge = run.task.judge
    assert judge is not None
    if run.saver.newest != step:
        log.warning("step %s is not judged: its checkpoint could not be saved", step)
        return
    began = time.perf_counter()
    scores = judge.scores(run.saver.path_of(step))
    run.metrics.scores(step, _epoch(run, step), scores, time.perf_counter() - began)
    by = judge.best_by
    if by is not None and run.world.first:
        there = [row for row in run.metrics.evaluated if run.saver.path_of(row["step"]).is_dir()]
        run.saver.spare(max(there, key=lambda row: row[by])["step"])


def _catch_up(run: Run) -> None:
    """Judges the checkpoint that is gone on from, if the run was stopped between saving and judging it."""
    judged = [row["step"] for row in run.metrics.evaluated]
    if run.start and _is_judged(run, run.start) and run.start not in judged:
        _judge(run, run.start)
