"""What the training loop sees of the data: this rank's micro-batches from a given step on, prefetched."""

import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from mixmim_ds.config import DataConfig, RunConfig
from mixmim_ds.data.dali import build_pipeline, run_pipeline
from mixmim_ds.data.index import Index
from mixmim_ds.data.plan import MicroBatchPlan, Plan
from mixmim_ds.data.scan import image_size, reason_of
from mixmim_ds.data.shards import ShardIndex
from mixmim_ds.models.grids import CELL

Images = Index | ShardIndex  # two kinds of storage, one contract


@dataclass(frozen=True)
class MicroBatch:
    """Images of one forward pass; the partner of image i is image B-1-i."""

    images: Tensor  # float32 [B, 3, H, W] on the device, normalised by the data's mean and std
    mask: Tensor  # bool [H/32, W/32] on the device, True = taken from the partner
    ids: np.ndarray  # int64 [B], rows of the index


class Loader(Protocol):
    """Source of micro-batches."""

    plan: Plan

    wait_s: float  # seconds that the loop has waited for `batches` so far

    def batches(self, start: int) -> Iterator[MicroBatch]:
        """This rank's micro-batches of step `start`, of the next, and so on without end."""


@dataclass(frozen=True)
class Share:
    """Which micro-batches of a global batch are this rank's: every size-th, from the rank-th on."""

    rank: int
    size: int
    accumulation: int  # micro-batches of a step on one rank

    def place(self, turn: int) -> tuple[int, int]:
        """Step and number in the global batch of this rank's micro-batch number `turn` since step 0."""
        step, k = divmod(turn, self.accumulation)
        return step, k * self.size + self.rank


def open_loader(config: RunConfig, index: Images | None, share: Share, device: torch.device, cores: int) -> Loader:
    """The loader that `data.kind` names, over the images of the index (None = synthetic ones).

    Args:
        cores: CPU cores of this process, for as many decoding threads where `data.threads` is 0.

    Raises:
        ValueError: the data set does not hold one global batch.
    """
    train, model, data = config.train, config.model, config.data
    size = (model.img_size, model.img_size)
    plan = Plan(
        seed=train.seed,
        sizes=np.broadcast_to(np.array(size, np.int32), (data.synthetic_images, 2)) if index is None else index.sizes,
        global_batch=train.global_batch,
        micro_batch=train.micro_batch,
        mask_grid=(size[0] // CELL, size[1] // CELL),
        mask_ratio=model.mask_ratio,
        crop_scale=(data.crop_scale[0], data.crop_scale[1]),
        crop_ratio=(data.crop_ratio[0], data.crop_ratio[1]),
        flip=data.flip,
    )
    if index is None:
        return SyntheticLoader(plan, share, data, model.img_size, device)
    return DaliLoader(index, plan, share, data, model.img_size, device, data.threads or cores)


class Normalise:
    """uint8 [B, 3, H, W] -> float32: (pixels / 255 - mean) / std per channel.

    Its constants lie on the device: making them for each batch would make the host wait for the GPU.
    """

    def __init__(self, data: DataConfig, device: torch.device) -> None:
        self.mean, self.std = (torch.tensor(v, device=device)[:, None, None] for v in (data.mean, data.std))

    def __call__(self, pixels: Tensor) -> Tensor:
        return (pixels / 255 - self.mean) / self.std


class DaliLoader:
    """Micro-batches of image files or tar shards, cut and decoded by DALI as the plan says."""

    def __init__(
        self,
        index: Images,
        plan: Plan,
        share: Share,
        data: DataConfig,
        img_size: int,
        device: torch.device,
        threads: int,
    ) -> None:
        self.index, self.plan, self.share, self.data = index, plan, share, data
        self.img_size, self.device, self.threads = img_size, device, threads
        self.normalise = Normalise(data, device)
        self.wait_s = 0.0

    def batches(self, start: int) -> Iterator[MicroBatch]:
        """See `Loader`.

        Raises:
            RuntimeError: an image cannot be decoded; the message names it.
        """
        planned: dict[int, MicroBatchPlan] = {}
        first = start * self.share.accumulation

        def feed(iteration: int) -> tuple[np.ndarray | list[np.ndarray], np.ndarray, np.ndarray, np.ndarray]:
            batch = self.plan.micro_batch_at(*self.share.place(first + iteration))
            planned[iteration] = batch
            images = self.index.give(batch.ids)
            corner, size = batch.windows[:, :2], batch.windows[:, 2:]
            return images, np.ascontiguousarray(corner), np.ascontiguousarray(size), batch.flips.astype(np.int32)

        pipeline = build_pipeline(
            feed,
            self.index.gives,
            self.plan.micro_batch,
            self.img_size,
            self.device,
            self.threads,
            self.data.prefetch,
        )
        iteration = 0
        while True:
            began = time.perf_counter()
            try:
                pixels = run_pipeline(pipeline, self.device)
            except RuntimeError as error:
                raise self._explain(planned[iteration], error) from error
            batch = planned.pop(iteration)
            mask = torch.from_numpy(batch.mask).to(self.device, non_blocking=True)
            self.wait_s += time.perf_counter() - began
            yield MicroBatch(self.normalise(pixels), mask, batch.ids)
            iteration += 1

    def _explain(self, batch: MicroBatchPlan, error: RuntimeError) -> RuntimeError:
        """DALI's message carries no name, so look for the culprit among the images of the batch."""
        for i in batch.ids:
            reason = _why_broken(self.index, i)
            if reason:
                name = self.index.name(i)
                return RuntimeError(f"{name} cannot be decoded ({reason}); repair it or take it out of data.root.")
        return RuntimeError(f"DALI failed although every image of the batch can be decoded by PIL: {error}")


def _why_broken(index: Images, i: int) -> str:
    try:
        with index.open(i) as file:
            image_size(file)  # tells what is no image at all in better words than PIL
            file.seek(0)
            with Image.open(file) as image:
                image.load()
    except Exception as error:
        return reason_of(error)
    return ""


class SyntheticLoader:
    """The same random pixels for every micro-batch, with the masks of the plan: training without a data path."""

    def __init__(self, plan: Plan, share: Share, data: DataConfig, img_size: int, device: torch.device) -> None:
        self.plan, self.share = plan, share
        generator = torch.Generator(device).manual_seed(plan.seed)
        shape = (plan.micro_batch, 3, img_size, img_size)
        pixels = torch.randint(256, shape, generator=generator, device=device, dtype=torch.uint8)
        self.images = Normalise(data, device)(pixels)
        self.wait_s = 0.0

    def batches(self, start: int) -> Iterator[MicroBatch]:
        """See `Loader`."""
        turn = start * self.share.accumulation
        while True:
            batch = self.plan.micro_batch_at(*self.share.place(turn))
            mask = torch.from_numpy(batch.mask).to(self.images.device, non_blocking=True)
            yield MicroBatch(self.images, mask, batch.ids)
            turn += 1
