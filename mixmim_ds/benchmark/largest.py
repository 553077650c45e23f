"""The largest micro-batch that a GPU's memory takes, found by trying."""

from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace

import torch

from mixmim_ds.config import PretrainConfig

LIMIT = 8192  # images; beyond it a larger micro-batch makes no step faster


def with_micro_batch(config: PretrainConfig, size: int) -> PretrainConfig:
    """The run with steps of a single micro-batch of that size."""
    return replace(config, train=replace(config.train, micro_batch=size, global_batch=size))


def largest_micro_batch(config: PretrainConfig, step: Callable[[PretrainConfig], object]) -> int:
    """The largest even micro-batch of which `step` runs without torch.OutOfMemoryError.

    Args:
        step: makes everything anew and does whole training steps, and leaves nothing of it behind.

    Raises:
        ValueError: not even two images fit.
    """

    def fits(size: int) -> bool:
        done = False
        with suppress(torch.OutOfMemoryError):
            step(with_micro_batch(config, size))
            done = True
        return done

    size = largest_even(fits, LIMIT)
    if not size:
        raise ValueError(f"{config.model.encoder} does not fit this GPU with train.micro_batch=2; take a smaller one.")
    return size


def largest_even(fits: Callable[[int], bool], limit: int) -> int:
    """The largest even number up to the limit that fits, 0 if none does; what is smaller than a fitting one fits.

    Doubles until one does not fit, then halves the gap.
    """
    low, high = 0, 2
    while high <= limit and fits(high):
        low, high = high, 2 * high
    high = min(high, limit - limit % 2 + 2)
    while high - low > 2:
        middle = (low + high) // 4 * 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low
