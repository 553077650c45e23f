"""What timm does to the training images of fine-tuning, as a function of (seed, step, place in the global batch).

timm draws from Python's and numpy's global generators; here they are started anew for every image or micro-batch. The
same versions of the libraries give the same images.

B images of a micro-batch    K classes
"""

import multiprocessing
import random
import signal
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from typing import Any

import numpy as np
import torch
from PIL import Image
from timm.data import Mixup
from timm.data.auto_augment import posterize, rand_augment_transform
from timm.data.mixup import mixup_target
from timm.data.random_erasing import RandomErasing
from torch import Tensor

from mixmim_ds.data.recover import DataFailed
from mixmim_ds.finetune_config import AugmentConfig
from mixmim_ds.libc import die_with_parent

Transform = Callable[[Image.Image], Image.Image]


def rand_augment(words: str, img_size: int, mean: list[float]) -> Transform:
    """timm's RandAugment, as its own training script makes it.

    Args:
        words: as `rand-m9-mstd0.5-inc1`.
        mean: of pixels in 0..1; what a moved image leaves behind is filled with it.

    Raises:
        ValueError: timm does not understand the words.
    """
    fill = tuple(min(255, round(255 * value)) for value in mean)
    hparams = {"translate_const": int(img_size * 0.45), "img_mean": fill, "interpolation": Image.Resampling.BICUBIC}
    try:
        transform: Any = rand_augment_transform(words, hparams)
    except (AssertionError, ValueError, KeyError) as error:
        raise ValueError(
            f"augment.rand_augment={words} is not what timm understands (rand-m9-mstd0.5-inc1 is); null turns it off."
        ) from error
    for operation in transform.ops:
        if operation.aug_fn is posterize:
            operation.aug_fn = _posterize
    return transform


def _posterize(image: Image.Image, bits: int, **options: object) -> Image.Image:
    """timm's, and a black image for 0 bits, as it was before Pillow refused them; strong augmentation asks for that."""
    return posterize(image, bits, **options) if bits else Image.new(image.mode, image.size)


class RandAugmentPool:
    """RandAugment in processes of its own, for PIL keeps one core busy with some hundred images a second.

    They are forked when the pool is made: make it before threads and CUDA are there.

    Args:
        words, img_size, mean: see `rand_augment`.

    Raises:
        ValueError: as `rand_augment`.
    """

    def __init__(self, words: str, img_size: int, mean: list[float], workers: int) -> None:
        transform = rand_augment(words, img_size, mean)
        self.words, self.workers = words, workers
        self.pool = ProcessPoolExecutor(workers, multiprocessing.get_context("fork"), _settle)
        self.augment = partial(_augment, transform)
        list(self.pool.map(int, range(workers)))

    def __call__(self, pixels: Tensor, seeds: np.ndarray) -> Tensor:
        """uint8 [B, 3, H, W] on any device and uint64 [B] -> uint8 [B, 3, H, W] on the CPU. DataFailed if it fails."""
        images = pixels.permute(0, 2, 3, 1).cpu().numpy()
        count = min(self.workers, len(images))  # a part without an image is none
        parts = zip(np.array_split(images, count), np.array_split(seeds, count), strict=True)
        try:
            done = np.concatenate(list(self.pool.map(self.augment, *zip(*parts, strict=True))))
        except Exception as error:  # whatever strikes in a process, or the process itself
            raise DataFailed(
                f"augment.rand_augment={self.words} failed ({type(error).__name__}: {error}); leave the operation out "
                "or turn it off with null, then start the same command again."
            ) from error
        return torch.from_numpy(done).permute(0, 3, 1, 2).contiguous()

    def close(self) -> None:
        """Ends the processes."""
        self.pool.shutdown(cancel_futures=True)


def _settle() -> None:
    """A process of the pool leaves requests to stop to its parent, and goes when that is gone."""
    die_with_parent(signal.SIGKILL)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)


def _augment(transform: Transform, images: np.ndarray, seeds: np.ndarray) -> np.ndarray:
    """uint8 [B, H, W, 3] and uint64 [B] -> uint8 [B, H, W, 3]."""
    return np.stack([_one(transform, image, int(seed)) for image, seed in zip(images, seeds, strict=True)])


def _one(transform: Transform, image: np.ndarray, seed: int) -> np.ndarray:
    _start(seed)
    return np.asarray(transform(Image.fromarray(image)))


def _start(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed % 2**32)


class BatchAugment:
    """Random erasing, mixup or cutmix, and smooth labels, of a micro-batch on its device."""

    def __init__(self, options: AugmentConfig, classes: int, device: torch.device) -> None:
        self.classes, self.smoothing = classes, options.label_smoothing
        self.erase = RandomErasing(options.erase, mode="pixel", device=device)
        self.mix = Mixup(
            mixup_alpha=options.mixup, cutmix_alpha=options.cutmix, label_smoothing=options.label_smoothing,
            num_classes=classes,
        )  # fmt: skip
        self.mixes = bool(options.mixup or options.cutmix)

    def __call__(self, images: Tensor, labels: Tensor, seed: int) -> tuple[Tensor, Tensor]:
        """float32 [B, 3, H, W], normalised, and int64 [B] -> the images, and targets float32 [B, K].

        It also starts torch's generators, from which the erased places get their noise and, in the forward pass that
        follows, the model its drop path.
        """
        _start(seed)
        torch.manual_seed(seed)
        images = self.erase(images)
        if self.mixes:
            images, targets = self.mix(images, labels)
        else:
            targets = mixup_target(labels, self.classes, smoothing=self.smoothing)
        return images, targets
