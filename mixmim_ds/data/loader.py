"""What the training loop sees of the data: this rank's micro-batches from a given step on, prefetched."""

import itertools
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

import numpy as np
import torch
from nvidia.dali.pipeline import Pipeline
from torch import Tensor

from mixmim_ds.config import DataConfig, PretrainConfig, RunConfig
from mixmim_ds.data.ahead import ahead
from mixmim_ds.data.dali import Fed, Feed, build_pipeline, run_pipeline
from mixmim_ds.data.plan import MicroBatchPlan, Plan
from mixmim_ds.data.quarantine import Quarantine
from mixmim_ds.data.recover import recovering
from mixmim_ds.data.shards import Images
from mixmim_ds.models.grids import CELL


class Batch(Protocol):
    """Images of one forward pass."""

    @property
    def images(self) -> Tensor:
        """float32 [B, 3, H, W] on the device, normalised by the data's mean and std."""

    @property
    def ids(self) -> np.ndarray:
        """int64 [B], rows of the index."""

    @property
    def inputs(self) -> tuple[Tensor, Tensor]:
        """What the model is called with: the images, and what goes with them."""


@dataclass(frozen=True)
class MicroBatch:
    """Images of one forward pass of pretraining; the partner of image i is image B-1-i."""

    images: Tensor  # see `Batch`
    mask: Tensor  # bool [H/32, W/32] on the device, True = taken from the partner
    ids: np.ndarray  # see `Batch`

    @property
    def inputs(self) -> tuple[Tensor, Tensor]:
        """See `Batch`."""
        return self.images, self.mask


B = TypeVar("B", covariant=True)


class Loader(Protocol[B]):
    """Source of micro-batches."""

    @property
    def plan(self) -> Plan:
        """What the micro-batches hold."""

    @property
    def bad(self) -> dict[int, str]:
        """Broken images known, by row of the index, and why; what other ranks have met may be added."""

    def batches(self, start: int) -> Iterator[B]:
        """This rank's micro-batches of step `start`, of the next, and so on without end.

        Broken images are replaced by the plan's next choice, whatever `bad` holds.

        Raises:
            DataFailed: nothing can be decoded any more.
        """


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


def open_loader(
    config: PretrainConfig, index: Images | None, share: Share, device: torch.device, cores: int
) -> Loader[MicroBatch]:
    """The loader that `data.kind` names, over the images of the index (None = synthetic ones).

    Args:
        cores: CPU cores of this process, for as many decoding threads where `data.threads` is 0.

    Raises:
        ValueError: the data set does not hold one global batch.
    """
    model, data = config.model, config.data
    grid = model.img_size // CELL
    if index is None:
        sizes = np.broadcast_to(np.array([model.img_size] * 2, np.int32), (data.synthetic_images, 2))
        plan = plan_of(config, sizes, (grid, grid), model.mask_ratio)
        return SyntheticLoader(plan, share, data, model.img_size, device)
    plan = plan_of(config, index.sizes, (grid, grid), model.mask_ratio)
    normalise = Normalise(data.mean, data.std, device)

    def finish(pixels: Tensor, batch: MicroBatchPlan, step: int, k: int) -> MicroBatch:
        mask = torch.from_numpy(batch.mask).to(device, non_blocking=True)
        return MicroBatch(normalise(pixels), mask, batch.ids)

    return DaliLoader(index, plan, share, data, model.img_size, device, data.threads or cores, finish)


def plan_of(config: RunConfig, sizes: np.ndarray, mask_grid: tuple[int, int], mask_ratio: float) -> Plan:
    """The plan that a run's options describe.

    Args:
        sizes: int32 [N, 2], height and width of the images.

    Raises:
        ValueError: the data set does not hold one global batch.
    """
    train, data = config.train, config.data
    return Plan(
        seed=train.seed,
        sizes=sizes,
        global_batch=train.global_batch,
        micro_batch=train.micro_batch,
        mask_grid=mask_grid,
        mask_ratio=mask_ratio,
        crop_scale=(data.crop_scale[0], data.crop_scale[1]),
        crop_ratio=(data.crop_ratio[0], data.crop_ratio[1]),
        flip=data.flip,
    )


class Normalise:
    """uint8 [B, 3, H, W] -> float32: (pixels / 255 - mean) / std per channel, in one piece of memory.

    Its constants lie on the device: making them for each batch would make the host wait for the GPU.
    """

    def __init__(self, mean: Sequence[float], std: Sequence[float], device: torch.device) -> None:
        center, width = (torch.tensor(v, dtype=torch.float64)[:, None, None] for v in (mean, std))
        self.scale, self.shift = (1 / (255 * width)).float().to(device), (-center / width).float().to(device)

    def __call__(self, pixels: Tensor) -> Tensor:
        return pixels.float().mul_(self.scale).add_(self.shift)


class DaliLoader(Generic[B]):
    """Micro-batches of images, as files or in tar shards, cut and decoded by DALI as the plan says.

    Args:
        finish: makes a batch of pixels, uint8 [B, 3, H, W] on the device, the plan of the micro-batch, its step and its
            number in the global batch.
    """

    def __init__(
        self,
        index: Images,
        plan: Plan,
        share: Share,
        data: DataConfig,
        img_size: int,
        device: torch.device,
        threads: int,
        finish: Callable[[Tensor, MicroBatchPlan, int, int], B],
    ) -> None:
        self.index, self.plan, self.share, self.data = index, plan, share, data
        self.img_size, self.device, self.threads = img_size, device, threads
        self.finish = finish
        self.quarantine = Quarantine(index, plan, device, self._open_pipeline, self._fed)
        self.bad = self.quarantine.bad

    def batches(self, start: int) -> Iterator[B]:
        """See `Loader`."""
        first = start * self.share.accumulation
        return recovering(self._read, lambda turn: self.quarantine.examine(*self.share.place(turn)), first)

    def _read(self, first: int) -> Iterator[B]:
        """This rank's micro-batches from number `first` on; DecodeError once one cannot be decoded."""
        planned: deque[MicroBatchPlan] = deque()

        def read() -> Iterator[tuple[MicroBatchPlan, Fed]]:
            for turn in itertools.count(first):
                batch = self.quarantine.micro_batch_at(*self.share.place(turn))
                yield batch, self._fed(batch)

        # DALI asks for what it is fed in the loop's thread, which would wait there for the storage of shards.
        with closing(ahead(read(), 1)) as readings:

            def feed(_: int) -> Fed:
                batch, fed = next(readings)
                planned.append(batch)
                return fed

            pipeline = self._open_pipeline(feed, self.plan.micro_batch, self.data.prefetch)
            for turn in itertools.count(first):
                pixels = run_pipeline(pipeline, self.device)
                yield self.finish(pixels, planned.popleft(), *self.share.place(turn))

    def _open_pipeline(self, feed: Feed, batch: int, prefetch: int) -> Pipeline:
        return build_pipeline(feed, self.index.gives, batch, self.img_size, self.device, self.threads, prefetch)

    def _fed(self, batch: MicroBatchPlan) -> Fed:
        """What the pipeline is fed for these images."""
        images = self.index.give(batch.ids)
        corner, size = batch.windows[:, :2], batch.windows[:, 2:]
        return images, np.ascontiguousarray(corner), np.ascontiguousarray(size), batch.flips.astype(np.int32)


class SyntheticLoader:
    """The same random pixels for every micro-batch, with the masks of the plan: training without a data path."""

    def __init__(self, plan: Plan, share: Share, data: DataConfig, img_size: int, device: torch.device) -> None:
        self.plan, self.share = plan, share
        generator = torch.Generator(device).manual_seed(plan.seed)
        shape = (plan.micro_batch, 3, img_size, img_size)
        pixels = torch.randint(256, shape, generator=generator, device=device, dtype=torch.uint8)
        self.images = Normalise(data.mean, data.std, device)(pixels)
        self.bad: dict[int, str] = {}

    def batches(self, start: int) -> Iterator[MicroBatch]:
        """See `Loader`."""
        turn = start * self.share.accumulation
        while True:
            batch = self.plan.micro_batch_at(*self.share.place(turn))
            mask = torch.from_numpy(batch.mask).to(self.images.device, non_blocking=True)
            yield MicroBatch(self.images, mask, batch.ids)
            turn += 1
