"""The largest micro-batch that a GPU's memory takes, found by trying where a line through earlier trials points to."""

from collections.abc import Callable
from dataclasses import replace

import torch

from mixmim_ds.config import PretrainConfig

LIMIT = 8192  # images; beyond it a larger micro-batch makes no step faster
FIRST = 32  # images, twice as many next: below, what does not grow with them hides the line


def with_micro_batch(config: PretrainConfig, size: int) -> PretrainConfig:
    """The run with steps of a single micro-batch of that size."""
    return replace(config, train=replace(config.train, micro_batch=size, global_batch=size))


def largest_micro_batch(config: PretrainConfig, step: Callable[[PretrainConfig], float]) -> int:
    """The largest even micro-batch of which `step` runs without torch.OutOfMemoryError, to within a hundredth.

    Args:
        step: makes everything anew and does whole training steps, leaves nothing of it behind, and returns the share
            of the GPU's memory that was taken, 0 to 1.

    Raises:
        ValueError: not even two images fit.
    """

    def share(size: int) -> float | None:
        try:
            return step(with_micro_batch(config, size))
        except torch.OutOfMemoryError:
            return None

    size = largest_even(share, LIMIT)
    if not size:
        raise ValueError(f"{config.model.encoder} does not fit this GPU with train.micro_batch=2; take a smaller one.")
    return size


def largest_even(share: Callable[[int], float | None], limit: int) -> int:
    """The largest even number up to the limit that fits, to within a hundredth or 2; 0 if none does.

    Args:
        share: of the room, as a number takes it, growing about as a line; None if it does not fit.
    """
    low, high, misses = 0, limit - limit % 2 + 2, 0
    taken: dict[int, float] = {}
    guess = FIRST
    while high - low > max(2, low // 100):
        guess = min(max(guess - guess % 2, low + 2), high - 2)
        found = share(guess)
        if found is None:
            high, misses = guess, misses + 1
        else:
            low, taken[guess] = guess, found
        if len(taken) < 2:
            guess = (low + high) // 2 if misses else 2 * low
            continue
        before = sorted(taken)[-2]
        slope = (taken[low] - taken[before]) / (low - before)
        guess = low + round((1 - taken[low]) / slope) if slope > 0 else high
        if guess >= high and misses:  # it does not fit though the line says so: some less, and then much less
            guess = max(high - high * 2**misses // 100, (low + high) // 2)
        elif guess <= 1.01 * low:  # as much as the line says: a little more should not fit
            guess = low + low // 50
    return low
