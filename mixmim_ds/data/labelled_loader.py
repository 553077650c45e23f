"""What the training loop sees of labelled images: this rank's micro-batches from a given step on, augmented."""

from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from mixmim_ds.data.ahead import ahead
from mixmim_ds.data.augment import BatchAugment, RandAugmentPool
from mixmim_ds.data.labelled import Labelled
from mixmim_ds.data.loader import DaliLoader, Normalise, Share, plan_of
from mixmim_ds.data.plan import AUGMENT, MIX, MicroBatchPlan, Plan, bits
from mixmim_ds.finetune_config import FinetuneConfig

AHEAD = 2  # micro-batches that wait, augmented


@dataclass(frozen=True)
class LabelledBatch:
    """Images of one forward pass of fine-tuning; see `Batch`."""

    images: Tensor
    targets: Tensor  # float32 [B, K] on the device, shares that sum up to 1
    ids: np.ndarray

    @property
    def inputs(self) -> tuple[Tensor, Tensor]:
        """See `Batch`."""
        return self.images, self.targets


@dataclass(frozen=True)
class _Cut:
    """A micro-batch decoded, cropped and flipped, perhaps augmented image by image."""

    pixels: Tensor  # uint8 [B, 3, H, W]
    ids: np.ndarray
    step: int
    k: int  # its number in the global batch


class LabelledLoader:
    """Micro-batches of a labelled set.

    Args:
        pool: for RandAugment, None = without.
        cores: CPU cores of this process, for as many decoding threads where `data.threads` is 0.
    """

    def __init__(
        self,
        config: FinetuneConfig,
        train: Labelled,
        share: Share,
        device: torch.device,
        cores: int,
        pool: RandAugmentPool | None,
    ) -> None:
        self.seed, self.share, self.device, self.pool = config.train.seed, share, device, pool
        data, size = config.data, config.model.img_size
        self.labels = train.labels.to(device)
        self.normalise = Normalise(data.mean, data.std, device)
        self.augment = BatchAugment(config.augment, len(train.classes), device)
        plan = plan_of(config, train.images.sizes, (1, 1), 0.5)  # its mask is not used
        self.dali = DaliLoader(train.images, plan, share, data, size, device, data.threads or cores, _cut)

    @property
    def plan(self) -> Plan:
        """See `Loader`."""
        return self.dali.plan

    @property
    def bad(self) -> dict[int, str]:
        """See `Loader`."""
        return self.dali.bad

    def batches(self, start: int) -> Iterator[LabelledBatch]:
        """See `Loader`; torch's generators stand where the micro-batch's forward pass finds them."""
        cuts = ahead(self._augmented(self.pool, start), AHEAD) if self.pool else self.dali.batches(start)
        for cut in cuts:
            labels = self.labels[torch.from_numpy(cut.ids).to(self.device, non_blocking=True)]
            images = self.normalise(cut.pixels.to(self.device, non_blocking=True))
            yield LabelledBatch(*self.augment(images, labels, int(bits(self.seed, MIX, cut.step, cut.k))), cut.ids)

    def _augmented(self, pool: RandAugmentPool, start: int) -> Iterator[_Cut]:
        """In a thread, so on a stream of its own: on the default one it would wait for the training step."""
        on_gpu = self.device.type == "cuda"
        with torch.cuda.stream(torch.cuda.Stream(self.device)) if on_gpu else nullcontext():
            for cut in self.dali.batches(start):
                places = cut.k * len(cut.ids) + np.arange(len(cut.ids))
                pixels = pool(cut.pixels, bits(self.seed, AUGMENT, cut.step, places))
                yield _Cut(pixels.pin_memory() if on_gpu else pixels, cut.ids, cut.step, cut.k)


def _cut(pixels: Tensor, batch: MicroBatchPlan, step: int, k: int) -> _Cut:
    return _Cut(pixels, batch.ids, step, k)
