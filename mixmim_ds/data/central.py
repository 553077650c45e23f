"""The middle of every image of a set, each once: what an evaluation looks at.

B images of a batch
"""

import logging
from collections.abc import Iterable, Iterator

import numpy as np
import torch
from nvidia.dali.pipeline import Pipeline
from torch import Tensor

from mixmim_ds.data.dali import Fed, Feed, build_pipeline, run_pipeline
from mixmim_ds.data.loader import Normalise
from mixmim_ds.data.recover import UNEXPLAINED, DataFailed, find_broken, recovering, why_broken
from mixmim_ds.data.shards import Images
from mixmim_ds.models.mixmim_sizes import crop_of

LeftOut = list[tuple[str, str]]  # names and reasons of images that cannot be decoded
log = logging.getLogger("mixmim_ds")
SAMPLE = 32  # images all over the set; where none of them decodes, no image is to blame


def central_windows(sizes: np.ndarray, share: float) -> np.ndarray:
    """Squares in the middle of images: sizes int [B, 2] -> top, left, height and width, int32 [B, 4]."""
    side = np.maximum(np.round(sizes.min(1) * share).astype(np.int32), 1)
    corner = (sizes - side[:, None]) // 2
    return np.column_stack([corner, side, side]).astype(np.int32)


class CentralBatches:
    """The middle of every image, each once, in batches whose content does not depend on how many ranks share them.

    Images that cannot be decoded are left out, the same ones for any batch and number of ranks.

    Args:
        broken: those that earlier looks have found, by row of the index, and why. They are left out from the start,
            so that no batch fails over them, unless they are mended; what this look finds is added.
    """

    def __init__(
        self, images: Images, img_size: int, normalise: Normalise, device: torch.device, threads: int, batch: int,
        rank: int = 0, size: int = 1, broken: dict[int, str] | None = None,
    ) -> None:  # fmt: skip
        self.images, self.img_size, self.normalise = images, img_size, normalise
        self.device, self.threads, self.batch = device, threads, batch
        self.numbers = range(rank, -(-len(images) // batch), size)
        self.broken = {} if broken is None else broken
        for i in list(self.broken):
            if why_broken(images, i) == UNEXPLAINED:
                del self.broken[i]
        self.known = set(self.broken)

    def __iter__(self) -> Iterator[tuple[Tensor, np.ndarray]]:
        """float32 [batch, 3, H, W] on the device, and the rows of the index, int64 [B]; where images are left out, and
        at the end of the set, a batch is filled up with images of its own, which have no row.

        Raises:
            DataFailed: nothing can be decoded any more.
        """
        for found in recovering(self._read, self._examine, 0):
            if found:
                pixels, rows = found
                yield self.normalise(pixels), rows

    @property
    def left_out(self) -> LeftOut:
        """The images of this rank's batches that were left out, but for those known before."""
        return [(self.images.name(i), reason) for i, reason in sorted(self.broken.items()) if i not in self.known]

    def _rows(self, number: int) -> np.ndarray:
        rows = np.arange(number * self.batch, min((number + 1) * self.batch, len(self.images)))
        return np.setdiff1d(rows, list(self.broken))

    def _read(self, turn: int) -> Iterator[tuple[Tensor, np.ndarray] | None]:
        """This rank's batches from number `turn` on, None for one of which nothing is left."""
        batches = [self._rows(number) for number in self.numbers[turn:]]
        full = [np.resize(rows, self.batch) for rows in batches if rows.size]

        def feed(iteration: int) -> Fed:
            return self._fed(full[min(iteration, len(full) - 1)])  # the pipeline reads ahead

        if full:
            pipeline = self._open_pipeline(feed, self.batch, 2)
            for rows in batches:
                yield (run_pipeline(pipeline, self.device), rows) if rows.size else None

    def _examine(self, turn: int) -> bool:
        """Tries the images of a batch alone; whether one is broken.

        Raises:
            DataFailed: all are, and so are others all over the set.
        """
        rows = self._rows(self.numbers[turn])
        broken = {i: why_broken(self.images, i) for i in self._failing(rows).tolist()}
        if len(broken) == len(rows):
            sample = np.unique(np.linspace(0, len(self.images) - 1, SAMPLE).astype(int))
            if len(self._failing(sample)) == len(sample):
                i, reason = next(iter(broken.items()))
                raise DataFailed(
                    f"no image of the evaluation can be decoded any more, one is {self.images.name(i)} ({reason}): see "
                    "that they can be read and have not changed since the run began, then start the same command again."
                )
        self.broken |= broken
        return bool(broken)

    def _failing(self, rows: np.ndarray) -> np.ndarray:
        """Those of the rows whose image cannot be decoded alone."""
        return rows[find_broken(lambda i: self._fed(rows[[i]]), len(rows), self._open_pipeline, self.device)]

    def _fed(self, rows: np.ndarray) -> Fed:
        """What the pipeline is fed for these images."""
        windows = central_windows(self.images.sizes[rows], crop_of(self.img_size))
        corner, sides = np.ascontiguousarray(windows[:, :2]), np.ascontiguousarray(windows[:, 2:])
        return self.images.give(rows), corner, sides, np.zeros(len(rows), np.int32)

    def _open_pipeline(self, feed: Feed, batch: int, prefetch: int) -> Pipeline:
        return build_pipeline(feed, self.images.gives, batch, self.img_size, self.device, self.threads, prefetch)


def tell_left_out(parts: Iterable[LeftOut]) -> None:
    """Warns of the images that the ranks have left out; for the first rank, whose log is the run's."""
    for name, reason in (each for part in parts for each in part):
        log.warning("%s is left out of the evaluation, for it cannot be decoded (%s)", name, reason)
