"""The story of a pretraining run."""

import gc
import logging
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO

import torch
from deepspeed.runtime.engine import DeepSpeedEngine

from mixmim_ds.config import RunConfig
from mixmim_ds.data.loader import Loader, Share, open_loader
from mixmim_ds.data.quarantine import DataFailed
from mixmim_ds.data.shards import Images, open_images
from mixmim_ds.models import MixMIM, build_model
from mixmim_ds.train import checkpoint
from mixmim_ds.train.bad_images import BadImages
from mixmim_ds.train.distributed import (
    EXIT_REQUEUE,
    RankFailed,
    StopRequest,
    World,
    connect,
    disconnect,
    is_peer_lost,
    mean_over_ranks,
    on_first_rank,
    share_of_cores,
    shorten_timeout,
)
from mixmim_ds.train.engine import accumulation, build_engine, set_lr
from mixmim_ds.train.failures import BadSteps
from mixmim_ds.train.metrics import Metrics
from mixmim_ds.train.optim import Schedule
from mixmim_ds.train.pictures import COLUMNS, draw
from mixmim_ds.train.restore import load_weights, restore
from mixmim_ds.train.run_folder import earlier_weights, open_run_folder
from mixmim_ds.zero_files import read_saved

log = logging.getLogger("mixmim_ds")


def pretrain(config: RunConfig) -> int:
    """Trains until the last epoch, `train.max_steps` or a request to stop; returns the exit code of the process.

    Raises:
        ValueError: an option does not go with the others, the data or the run folder.
        RunFailed: it cannot go on: what it computes is not finite, it cannot be saved, too many images are broken.
        RankFailed: this rank cannot read the data any more, or another rank is gone.
    """
    world = connect(config.train.start_timeout_s)
    stop = StopRequest(world)
    try:
        run = _prepare(config, world)
        if run.start >= run.last:
            log.info("this run has already done its %s steps; nothing is left to do", f"{run.last:,}")
            return 0
        return _train(run, stop)
    except DataFailed as error:
        raise RankFailed(str(error)) from error
    except RuntimeError as error:
        if not is_peer_lost(error):
            raise
        reason = str(error).partition("\n")[0]
        raise RankFailed(
            f"rank {world.rank} waited in vain for another one, which has died or hangs ({reason})."
        ) from error
    finally:
        stop.close()
        disconnect()


@dataclass(frozen=True)
class Run:
    """What the loop works with."""

    config: RunConfig
    world: World
    lock: IO[str] | None  # on the run folder, while it is open
    index: Images | None
    loader: Loader
    bad_images: BadImages
    engine: DeepSpeedEngine
    schedule: Schedule
    turns: int  # micro-batches of a step on this rank
    start: int  # steps that an earlier start of the run has done
    last: int  # the step after which the run ends
    flops_per_image: int


def _prepare(config: RunConfig, world: World) -> Run:
    train, turns = config.train, accumulation(config, world.size)
    torch.manual_seed(train.seed)
    model = build_model(config.model)
    index = find_images(config, world)
    loader = open_loader(config, index, Share(world.rank, world.size, turns), world.device, share_of_cores())
    fingerprint = "synthetic" if index is None else index.fingerprint
    weights = on_first_rank(world, lambda: earlier_weights(config, fingerprint))
    if weights:
        load_weights(model, read_saved(weights))
    lock = open_run_folder(config, world, fingerprint)
    schedule = Schedule(config.optim, train.global_batch, loader.plan.steps_per_epoch, train.epochs)
    last = min(schedule.total_steps, train.max_steps or schedule.total_steps)
    log.info(
        "%s | %s images | %s img/process x %s processes x %s accumulation = %s img/step | %s steps, %s an epoch | "
        "peak lr %.3g | ZeRO %s, %s",
        config.model.encoder, f"{len(loader.plan.sizes):,}", train.micro_batch, world.size, turns, train.global_batch,
        f"{last:,}", f"{schedule.steps_per_epoch:,}", schedule.peak, config.ds, config.precision,
    )  # fmt: skip
    if index is not None and index.broken:
        name, reason = index.broken[0]
        log.warning(
            "%s files of data.root are no readable images and left out, first %s (%s)",
            f"{len(index.broken):,}",
            name,
            reason,
        )
    if config.optim.warmup_epochs >= train.epochs:
        log.warning("all %s epochs are warm-up: optim.warmup_epochs=%s", train.epochs, config.optim.warmup_epochs)
    flops = model.flops_per_image()  # before ZeRO-3 takes the weights apart
    start, engine = resume(config, model, world)
    bad_images = BadImages(config, world, index, loader.bad)
    if weights:
        log.info("starting anew from the weights of %s", weights)
    return Run(config, world, lock, index, loader, bad_images, engine, schedule, turns, start, last, flops)


def resume(config: RunConfig, model: MixMIM, world: World) -> tuple[int, DeepSpeedEngine]:
    """The engine, in the state of the run folder's newest whole checkpoint if it has one, and the steps done."""
    found = checkpoint.find(config, world)
    if found is None:
        return 0, build_engine(config, model, world)
    saved = read_saved(found.path)
    load_weights(model, saved)
    engine = build_engine(config, model, world)
    restore(engine, saved, found.step)
    log.info("going on from %s", found.path)
    return found.step, engine


def find_images(config: RunConfig, world: World) -> Images | None:
    """The index of `data.root`, made by the first rank if need be and memory-mapped by the others after it."""
    on_first_rank(world, lambda: open_images(config.data, progress=True) is not None)
    return open_images(config.data)


def _train(run: Run, stop: StopRequest) -> int:
    config, train, engine, world, start = run.config, run.config.train, run.engine, run.world, run.start
    metrics = Metrics(
        Path(config.run_dir), world, start, run.last, train.global_batch, run.flops_per_image, config.precision
    )
    metrics.options(asdict(config))
    saver = checkpoint.Saver(engine, config, world, start)
    bad_steps = BadSteps(config, world, str if run.index is None else run.index.name)
    batches = run.loader.batches(start)
    # Collected at the same steps everywhere, so that no rank waits for another one's collection.
    gc.disable()
    step = start
    while step < run.last:
        lr = run.schedule.lr_at(step)
        set_lr(engine, lr)
        losses, ids = [], []
        for _ in range(run.turns):
            batch = next(batches)
            loss, prediction = engine(batch.images, batch.mask)
            engine.backward(loss)
            engine.step()
            losses.append(loss.detach())
            ids.append(batch.ids)
        step += 1
        if step == start + 1:
            shorten_timeout(train.step_timeout_s)
        stopping = stop.agreed()
        ending = stopping or step == run.last
        reporting = step % train.log_every == 0 or step == run.last
        saving = ending or step % train.save_every == 0
        mean = mean_over_ranks(world, torch.stack(losses).mean().item()) if reporting else 0.0
        if not (engine.was_step_applied() and math.isfinite(mean)):
            bad_steps.note(step, lr, losses, ids, saver.newest)
        if reporting or saving:
            bad = run.bad_images.exchange()
        if reporting:
            epoch = step / run.schedule.steps_per_epoch
            metrics.report(step, epoch, mean, lr, engine.get_global_grad_norm(), run.loader.wait_s, bad)
            gc.collect()
        if world.first and train.picture_every and (step % train.picture_every == 0 or step == run.last):
            picture = draw(batch.images, batch.mask, prediction, config.model.norm_pix_loss, config.data)
            metrics.picture(step, picture, COLUMNS)
        if saving:
            metrics.saved(saver.save(step, must=ending))
        if stopping:
            break
    stop.settle()
    metrics.close()
    log.info("%s after step %s; run folder: %s", "done" if step == run.last else "stopped", step, config.run_dir)
    return 0 if step == run.last else EXIT_REQUEUE
