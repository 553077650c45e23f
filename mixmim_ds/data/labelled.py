"""Labelled images: a set to learn from and one to judge by, and the latter's batches.

N images of a set    B images of a batch
"""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from mixmim_ds.data.dali import DecodeError, Fed, build_pipeline, run_pipeline
from mixmim_ds.data.loader import Normalise
from mixmim_ds.data.shards import Images, open_images
from mixmim_ds.finetune_config import LabelledDataConfig
from mixmim_ds.models.sizes import crop_of


@dataclass(frozen=True)
class Labelled:
    """Images and what they show."""

    images: Images
    labels: Tensor  # int64 [N], positions in `classes`
    classes: list[str]  # those of the set to learn from

    def __len__(self) -> int:
        return len(self.images)

    @property
    def digest(self) -> str:
        """sha256 of what the images show, which the fingerprint of shards does not tell."""
        return hashlib.sha256(json.dumps(self.classes).encode() + self.labels.numpy().tobytes()).hexdigest()


def open_labelled(data: LabelledDataConfig, option: str = "data.root") -> tuple[Labelled, Labelled]:
    """The images to learn from and those to judge by.

    Args:
        option: what the user calls `data.root`.

    Raises:
        ValueError: one is missing or has images without a label, there is one class only, or those of the second are
            not among those of the first.
    """
    train, val = (_open(part, option) for part in parts_of(data))
    if len(train.classes) < 2:
        raise ValueError(f"{option}={data.root} holds one class to learn from, {train.classes[0]}; give at least two.")
    strange = sorted(set(val.classes) - set(train.classes))
    if strange:
        raise ValueError(
            f"{option}={data.root}: the images to judge by have the class {strange[0]}, which those to learn from "
            "lack; name the classes of both alike."
        )
    classes = train.classes
    return Labelled(train, _labels(train, classes), classes), Labelled(val, _labels(val, classes), classes)


def parts_of(data: LabelledDataConfig) -> tuple[LabelledDataConfig, LabelledDataConfig]:
    """Where the images to learn from and those to judge by are."""
    root = str(data.root)
    learn = root if data.kind == "shards" else str(Path(root, "train"))
    return replace(data, root=learn), replace(data, root=data.val or str(Path(root, "val")))


def _open(part: LabelledDataConfig, option: str) -> Images:
    try:
        images = open_images(part, progress=True)
    except ValueError as error:
        raise ValueError(str(error).replace("data.root=", f"{option}: ", 1)) from error
    assert images is not None
    bare = np.flatnonzero(np.asarray(images.labels) < 0)
    if len(bare):
        raise ValueError(
            f"{option}: {len(bare):,} images of {part.root} have no class, the first is {images.name(int(bare[0]))}; "
            "put the images of each class into a folder of its own, or into shards with a .cls or .json beside each."
        )
    return images


def _labels(images: Images, classes: list[str]) -> Tensor:
    position = torch.tensor([classes.index(name) for name in images.classes])
    return position[torch.from_numpy(np.array(images.labels, np.int64))]


def central_windows(sizes: np.ndarray, share: float) -> np.ndarray:
    """Squares in the middle of images: sizes int [B, 2] -> top, left, height and width, int32 [B, 4]."""
    side = np.maximum(np.round(sizes.min(1) * share).astype(np.int32), 1)
    corner = (sizes - side[:, None]) // 2
    return np.column_stack([corner, side, side]).astype(np.int32)


def central_batches(
    images: Images, img_size: int, normalise: Normalise, device: torch.device, threads: int, batch: int,
    rank: int = 0, size: int = 1,
) -> Iterator[tuple[Tensor, np.ndarray]]:  # fmt: skip
    """The middle of every image, each once, in batches whose content does not depend on how many ranks share them.

    Yields:
        float32 [batch, 3, H, W] on the device, and the rows of the index, int64 [B]; the last batch is filled up with
        images of the beginning, which have no row.

    Raises:
        ValueError: an image cannot be decoded.
    """
    share = crop_of(img_size)
    numbers = range(rank, -(-len(images) // batch), size)
    if not numbers:
        return

    def rows_of(number: int) -> np.ndarray:
        return np.arange(number * batch, (number + 1) * batch)

    def feed(iteration: int) -> Fed:
        rows = rows_of(numbers[min(iteration, len(numbers) - 1)]) % len(images)  # the pipeline reads ahead
        windows = central_windows(images.sizes[rows], share)
        corner, sides = np.ascontiguousarray(windows[:, :2]), np.ascontiguousarray(windows[:, 2:])
        return images.give(rows), corner, sides, np.zeros(batch, np.int32)

    pipeline = build_pipeline(feed, images.gives, batch, img_size, device, threads, prefetch=2)
    for number in numbers:
        try:
            pixels = run_pipeline(pipeline, device)
        except DecodeError as error:
            first, last = (images.name(int(rows_of(number)[i] % len(images))) for i in (0, -1))
            raise ValueError(
                f"an image from {first} to {last} cannot be decoded; python launch/index.py DIR --verify names those "
                "that are broken: take them out."
            ) from error
        rows = rows_of(number)
        yield normalise(pixels), rows[rows < len(images)]
