"""The story of a pretraining run."""

import gc
import logging
from dataclasses import dataclass
from pathlib import Path

import torch
from deepspeed.runtime.engine import DeepSpeedEngine

from mixmim_ds.config import RunConfig
from mixmim_ds.data.index import open_index
from mixmim_ds.data.loader import Loader, Share, open_loader
from mixmim_ds.data.shards import Images, open_shards
from mixmim_ds.models import MixMIM, build_model
from mixmim_ds.train import checkpoint
from mixmim_ds.train.bad_images import BadImages
from mixmim_ds.train.distributed import (
    EXIT_REQUEUE,
    StopRequest,
    World,
    connect,
    disconnect,
    on_first_rank,
    share_of_cores,
    shorten_timeout,
)
from mixmim_ds.train.engine import accumulation, build_engine, set_lr
from mixmim_ds.train.metrics import Metrics
from mixmim_ds.train.optim import Schedule
from mixmim_ds.train.pictures import COLUMNS, draw
from mixmim_ds.train.restore import load_weights, restore
from mixmim_ds.train.run_folder import open_run_folder
from mixmim_ds.zero_files import read_saved

log = logging.getLogger("mixmim_ds")


def pretrain(config: RunConfig) -> int:
    """Trains until the last epoch, `train.max_steps` or a request to stop; returns the exit code of the process.

    Raises:
        ValueError: an option does not go with the others, the data or the run folder.
        FloatingPointError: the loss or the gradient is not finite.
        RunFailed: too many images are broken.
        DataFailed: this rank cannot read the data any more.
    """
    world = connect(config.train.start_timeout_s)
    try:
        stop = StopRequest(world)
        run = _prepare(config, world)
        if run.start >= run.last:
            log.info("this run has already done its %s steps; nothing is left to do", f"{run.last:,}")
            return 0
        return _train(run, stop)
    finally:
        disconnect()


@dataclass(frozen=True)
class Run:
    """What the loop works with."""

    config: RunConfig
    world: World
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
    index = _find_images(config, world)
    loader = open_loader(config, index, Share(world.rank, world.size, turns), world.device, share_of_cores())
    open_run_folder(config, world, "synthetic" if index is None else index.fingerprint)
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
    start, engine = _resume(config, model, world)
    bad_images = BadImages(config, world, index, loader.bad)
    return Run(config, world, loader, bad_images, engine, schedule, turns, start, last, flops)


def _resume(config: RunConfig, model: MixMIM, world: World) -> tuple[int, DeepSpeedEngine]:
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


def _find_images(config: RunConfig, world: World) -> Images | None:
    """The index of `data.root`, made by the first rank if need be and memory-mapped by the others after it."""
    if config.data.kind == "synthetic":
        return None
    root, index_dir = config.data.root or "", Path(config.data.index_dir).expanduser()

    def find(progress: bool) -> Images:
        if config.data.kind == "shards":
            return open_shards(root, index_dir, progress)
        return open_index(Path(root), index_dir, progress)

    on_first_rank(world, lambda: bool(find(progress=True)))
    return find(progress=False)


def _train(run: Run, stop: StopRequest) -> int:
    config, train, engine, world, start = run.config, run.config.train, run.engine, run.world, run.start
    metrics = Metrics(
        Path(config.run_dir), world, start, run.last, train.global_batch, run.flops_per_image, config.precision
    )
    batches = run.loader.batches(start)
    # Collected at the same steps everywhere, so that no rank waits for another one's collection.
    gc.disable()
    step = start
    while step < run.last:
        lr = run.schedule.lr_at(step)
        set_lr(engine, lr)
        losses = []
        for _ in range(run.turns):
            batch = next(batches)
            loss, prediction = engine(batch.images, batch.mask)
            engine.backward(loss)
            engine.step()
            losses.append(loss.detach())
        step += 1
        if step == start + 1:
            shorten_timeout(world, train.step_timeout_s)
        stopping = stop.agreed()
        saving = step % train.save_every == 0 or step == run.last or stopping
        reporting = step % train.log_every == 0 or step == run.last
        if reporting or saving:
            loss, grad_norm = torch.stack(losses).mean(), engine.get_global_grad_norm()
            bad = run.bad_images.exchange()
        if reporting:
            metrics.report(step, step / run.schedule.steps_per_epoch, loss, lr, grad_norm, run.loader.wait_s, bad)
            gc.collect()
        elif saving:
            metrics.check(step, loss, grad_norm)  # what is not finite must not be saved
        if world.first and train.picture_every and (step % train.picture_every == 0 or step == run.last):
            picture = draw(batch.images, batch.mask, prediction, config.model.norm_pix_loss, config.data)
            metrics.picture(step, picture, COLUMNS)
        if saving:
            checkpoint.save(engine, config, world, step)
            metrics.restart(step, run.loader.wait_s)
        if stopping:
            break
    stop.settle()
    metrics.close()
    log.info("%s after step %s; run folder: %s", "done" if step == run.last else "stopped", step, config.run_dir)
    return 0 if step == run.last else EXIT_REQUEUE
