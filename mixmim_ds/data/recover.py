"""What to do about a batch of images that cannot be had: find the images to blame, each tried alone, or try again.

DALI fails as a batch and does not say which file it was, and storage fails for a moment with no image to blame.
"""

import time
from collections.abc import Callable, Iterator
from typing import TypeVar

import numpy as np
import torch
from nvidia.dali.pipeline import Pipeline

from mixmim_ds.data.dali import DecodeError, Fed, Feed, run_pipeline
from mixmim_ds.data.s3 import StorageDown
from mixmim_ds.data.scan import open_image, reason_of
from mixmim_ds.data.shards import Images

RETRIES = 3  # of a batch whose images all decode alone, or that S3 does not give
DOWN_S = 30  # that S3 gets to come back before a retry; the client soon makes none of its own (its retry quota)
UNEXPLAINED = "DALI does not decode it, although PIL does"

T = TypeVar("T")
OpenPipeline = Callable[[Feed, int, int], Pipeline]  # of a feed, for a number of images a batch and of batches ahead


class DataFailed(Exception):
    """No batch can be had, and not because of single images; one sentence for the user."""


def recovering(read: Callable[[int], Iterator[T]], examine: Callable[[int], bool], turn: int) -> Iterator[T]:
    """What `read` gives from number `turn` on, without a gap, however often it fails.

    Args:
        read: from a number on; raises DecodeError or StorageDown for one that it cannot give.
        examine: looks for the broken images of a number, which `read` avoids from then on; whether there was one that
            was not known.

    Raises:
        DataFailed: a number fails too often without a broken image, or as `examine`.
    """
    failures = 0
    while True:
        try:
            for item in read(turn):
                yield item
                turn, failures = turn + 1, 0
            return
        except (DecodeError, StorageDown) as error:
            failures = _recover(error, examine, turn, failures)


def _recover(error: DecodeError | StorageDown, examine: Callable[[int], bool], turn: int, failures: int) -> int:
    """How often in a row a number that failed has done so without a broken image, this time too."""
    try:
        if isinstance(error, DecodeError) and examine(turn):
            return 0
    except StorageDown as down:
        error = down
    # Where no image is to blame, storage may have failed for a moment.
    if failures + 1 == RETRIES:
        if isinstance(error, DecodeError):
            raise DataFailed(f"DALI failed {RETRIES} times over images that it decodes alone: {error}") from error
        raise DataFailed(
            f"S3 failed {RETRIES} times in a row: {error.strerror}, then start the same command again."
        ) from error
    if isinstance(error, StorageDown):
        time.sleep(DOWN_S)
    return failures + 1


def find_broken(fed: Callable[[int], Fed], count: int, open_pipeline: OpenPipeline, device: torch.device) -> np.ndarray:
    """Which of `count` images cannot be decoded alone, int64 [n]; a pipeline serves until it has failed.

    Args:
        fed: what a pipeline is fed for image 0, 1, ... alone.
    """
    broken = []
    tried = 0
    while tried < count:
        pipeline = open_pipeline(_from(tried, fed, count), 1, 1)
        try:
            while tried < count:
                tried += 1
                run_pipeline(pipeline, device)
        except DecodeError:
            broken.append(tried - 1)
    return np.array(broken, np.int64)


def _from(first: int, fed: Callable[[int], Fed], count: int) -> Feed:
    def feed(iteration: int) -> Fed:
        return fed(min(first + iteration, count - 1))  # the pipeline reads ahead

    return feed


def why_broken(images: Images, i: int) -> str:
    """Why image i, which DALI does not decode, is broken; DALI itself does not tell it for a file."""
    try:
        with images.open(i) as file, open_image(file) as image:
            image.load()
        return UNEXPLAINED
    except Exception as error:  # whatever strikes a parser that meets arbitrary bytes
        return reason_of(error)
