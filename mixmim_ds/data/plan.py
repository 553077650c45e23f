"""What every micro-batch of a run holds: its images, their crops and flips, its mask.

All of it is a pure function of (seed, step, place in the global batch). No generator state exists, so any
step can be asked for at any time, on any rank, and a run resumed on more or fewer GPUs sees the same batches.

B     images of a micro-batch (even)       N     images of the data set
h, w  cells of the mask, H/32 and W/32     L     h * w
"""

from dataclasses import dataclass
from math import isqrt

import numpy as np

# Streams keep apart the draws that share the counters behind them. Changing one changes every run.
ORDER, CROP, FLIP, MASK, REPLACE, AUGMENT, MIX = range(7)

# Increment and multipliers of SplitMix64: Steele, Lea and Flood, "Fast splittable pseudorandom number
# generators", OOPSLA 2014, with the finaliser of Vigna's public-domain https://prng.di.unimi.it/splitmix64.c
GAMMA = np.uint64(0x9E3779B97F4A7C15)
MULTIPLIERS = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)

# Four rounds suffice for large sets (Luby and Rackoff, 1988). The smallest need more: in 60,000 epochs of 5
# to 10 images some pairs were too frequent with 8 and with 12 rounds (chi-square, p < 1e-3), none with 16.
FEISTEL_ROUNDS = 16
CROP_TRIES = 10  # of torchvision's RandomResizedCrop, before it falls back to a central crop


@dataclass(frozen=True)
class MicroBatchPlan:
    """One micro-batch; image i is mixed with image B-1-i."""

    ids: np.ndarray  # int64 [B], rows of the index
    windows: np.ndarray  # int32 [B, 4], top, left, height, width of the crop in pixels of the stored image
    flips: np.ndarray  # bool [B], True = mirrored left to right
    mask: np.ndarray  # bool [h, w], True = taken from the partner image


@dataclass(frozen=True)
class Plan:
    """The global batches of a run, in micro-batches that do not depend on how many ranks share them out.

    An epoch visits every image once, in an order of its own, except the last N % global_batch of that order.

    Raises:
        ValueError: fewer images than a step needs.
    """

    seed: int
    sizes: np.ndarray  # int32 [N, 2], height and width of the stored images in pixels; may be a memory map
    global_batch: int
    micro_batch: int  # even, divides global_batch
    mask_grid: tuple[int, int]  # h, w
    mask_ratio: float = 0.5
    crop_scale: tuple[float, float] = (0.2, 1.0)  # share of the image's area
    crop_ratio: tuple[float, float] = (3 / 4, 4 / 3)  # width / height
    flip: bool = True

    def __post_init__(self) -> None:
        if len(self.sizes) < self.global_batch:
            raise ValueError(
                f"There are {len(self.sizes):,} images (data.root), too few for one step of "
                f"train.global_batch={self.global_batch}: lower train.global_batch or give more images."
            )

    @property
    def steps_per_epoch(self) -> int:
        """Whole global batches of an epoch."""
        return len(self.sizes) // self.global_batch

    @property
    def micro_batches(self) -> int:
        """Micro-batches of a global batch."""
        return self.global_batch // self.micro_batch

    def micro_batch_at(self, step: int, k: int, choices: np.ndarray | None = None) -> MicroBatchPlan:
        """Micro-batch k of the global batch of `step`, both counted from 0.

        Args:
            choices: int [B], which choice of image each place gets: 0, as all do by default, is that of the
                epoch's order, 1 the replacement for that, 2 the one for the replacement, and so on. The window is
                cut for the size of the image chosen; flips and mask stay.

        Raises:
            IndexError: the step is negative or the global batch has no micro-batch k.
        """
        if step < 0 or not 0 <= k < self.micro_batches:
            raise IndexError(f"no micro-batch {k} of step {step} among {self.micro_batches} per step")
        places = np.arange(k * self.micro_batch, (k + 1) * self.micro_batch)
        epoch, step_of_epoch = divmod(step, self.steps_per_epoch)
        ids = order_at(self.seed, epoch, step_of_epoch * self.global_batch + places, len(self.sizes))
        if choices is not None and choices.any():
            ids = np.where(choices, replacements_at(self.seed, step, places, choices, len(self.sizes)), ids)
        windows = windows_at(self.seed, step, places, self.sizes[ids], self.crop_scale, self.crop_ratio)
        flips = flips_at(self.seed, step, places) if self.flip else np.zeros(len(places), bool)
        mask = mask_at(self.seed, step, k, self.mask_grid, self.mask_ratio)
        return MicroBatchPlan(ids, windows, flips, mask)


def splitmix64(state: np.ndarray, index: np.ndarray) -> np.ndarray:
    """Output number `index`, from 0, of the SplitMix64 generator started at `state`; uint64, broadcast."""
    with np.errstate(over="ignore"):  # arithmetic modulo 2**64 is meant, numpy warns of it for scalars
        z = state + (index + 1) * GAMMA
        z ^= z >> 30
        z *= MULTIPLIERS[0]
        z ^= z >> 27
        z *= MULTIPLIERS[1]
        z ^= z >> 31
        return z


def bits(seed: int, stream: int, *counters: int | np.ndarray) -> np.ndarray:
    """64 random bits for every combination of the counters, uint64 of their broadcast shape.

    Every counter names an output of the generator that the counters before it have started, so
    `splitmix64(bits(seed, stream, a), b)` is `bits(seed, stream, a, b)`.
    """
    state = np.asarray(seed, np.uint64)
    for counter in (stream, *counters):
        state = splitmix64(state, np.asarray(counter).astype(np.uint64))
    return state


def uniform(seed: int, stream: int, *counters: int | np.ndarray) -> np.ndarray:
    """Like `bits`, as float64 in [0, 1): the top 53 bits, which is what a float64 holds exactly."""
    return (bits(seed, stream, *counters) >> 11) * 2.0**-53


def order_at(seed: int, epoch: int, positions: np.ndarray, count: int) -> np.ndarray:
    """The images at these positions of an epoch's order, int64 of the positions' shape.

    The order is a keyed bijection of 0..count-1 and is evaluated for these positions alone: a Feistel network
    on the two digits of a number in the mixed base (a, b), where results beyond the count go through again
    (generalised Feistel and cycle walking, Black and Rogaway, "Ciphers with arbitrary finite domains", 2002).
    """
    keys = bits(seed, ORDER, epoch, np.arange(FEISTEL_ROUNDS))
    images = _feistel(np.asarray(positions, np.uint64), keys, count)
    while (beyond := images >= count).any():
        images[beyond] = _feistel(images[beyond], keys, count)
    return images.astype(np.int64)


def _feistel(numbers: np.ndarray, keys: np.ndarray, count: int) -> np.ndarray:
    """A keyed bijection of 0..a*b-1, which covers 0..count-1; uint64 of the shape of the numbers."""
    # Next to the root of the count, a and b leave fewer than a numbers beyond it. Digits of whole bits leave
    # up to three quarters (69 % for the 1.28 M images of ImageNet), and every batch would walk many times.
    a = isqrt(count - 1) + 1
    b = -(-count // a)
    left, right = numbers // b, numbers % b
    for even, odd in keys.reshape(-1, 2):
        # 63 bits of hash leave room for the sum: a wrap at 2**64 would break the bijection
        left = (left + (splitmix64(even, right) >> 1)) % a
        right = (right + (splitmix64(odd, left) >> 1)) % b
    return left * b + right


def replacements_at(
    seed: int, step: int | np.ndarray, places: np.ndarray, choices: np.ndarray, count: int
) -> np.ndarray:
    """The images that stand in for broken ones, drawn from all `count`; int64 of the arguments' broadcast shape."""
    return (uniform(seed, REPLACE, step, places, choices) * count).astype(np.int64)


def windows_at(
    seed: int,
    step: int,
    places: np.ndarray,
    sizes: np.ndarray,
    scale: tuple[float, float],
    ratio: tuple[float, float],
) -> np.ndarray:
    """Random crops, distributed as those of torchvision's RandomResizedCrop.get_params.

    Args:
        places: [B], places in the global batch of the step.
        sizes: [B, 2], height and width of the images in pixels.
        scale: bounds of the crop's share of the image's area, drawn uniformly.
        ratio: bounds of width / height, drawn uniformly in its logarithm.

    Returns:
        int32 [B, 4]: top, left, height, width.
    """
    # all tries at once, needed or not: here numpy's calls cost more than its numbers
    draws = uniform(seed, CROP, step, places, np.arange(2 * CROP_TRIES + 2)[:, None])
    height, width = np.asarray(sizes, np.float64).T
    area = height * width * (scale[0] + (scale[1] - scale[0]) * draws[:CROP_TRIES])
    low, high = np.log(ratio)
    aspect = np.exp(low + (high - low) * draws[CROP_TRIES:-2])
    tried_h, tried_w = np.rint(np.sqrt(area / aspect)), np.rint(np.sqrt(area * aspect))
    fits = (tried_h > 0) & (tried_h <= height) & (tried_w > 0) & (tried_w <= width)

    first, image = fits.argmax(0), np.arange(len(places))
    found = fits[first, image]
    central_h, central_w = _central_crop(height, width, ratio)
    crop_h = np.where(found, tried_h[first, image], central_h)
    crop_w = np.where(found, tried_w[first, image], central_w)
    room_h, room_w = height - crop_h, width - crop_w
    top = np.where(found, np.floor(draws[-2] * (room_h + 1)), room_h // 2)
    left = np.where(found, np.floor(draws[-1] * (room_w + 1)), room_w // 2)
    return np.stack([top, left, crop_h, crop_w], 1).astype(np.int32)


def _central_crop(height: np.ndarray, width: np.ndarray, ratio: tuple[float, float]) -> tuple[np.ndarray, np.ndarray]:
    """Height and width of the largest crop with width / height within the ratio; whole pixels as float64."""
    low, high = ratio
    shape = width / height
    crop_h = np.where(shape < low, np.rint(width / low), height)
    crop_w = np.where(shape > high, np.rint(height * high), width)
    return crop_h, crop_w


def flips_at(seed: int, step: int, places: np.ndarray) -> np.ndarray:
    """Which images are mirrored, each with probability 1/2; bool of the places' shape."""
    return bits(seed, FLIP, step, places) >> 63 == 1


def mask_at(seed: int, step: int, k: int, grid: tuple[int, int], ratio: float) -> np.ndarray:
    """The mask of micro-batch k, bool [h, w]: int(L * ratio) cells are True, taken from the partner image."""
    cells = grid[0] * grid[1]
    keys = bits(seed, MASK, step, k, np.arange(cells))
    mask = np.zeros(cells, bool)
    mask[np.argsort(keys, kind="stable")[: int(cells * ratio)]] = True
    return mask.reshape(grid)
