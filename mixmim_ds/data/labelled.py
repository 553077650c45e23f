"""Labelled images: a set to learn from and one to judge by.

N images of a set
"""

import hashlib
import json
import os
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from mixmim_ds.data.shards import Images, open_images
from mixmim_ds.finetune_config import LabelledDataConfig


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


def open_labelled(
    data: LabelledDataConfig, option: str = "data.root", progress: bool = True
) -> tuple[Labelled, Labelled]:
    """The images to learn from and those to judge by.

    Args:
        option: what the user calls `data.root`.
        progress: draw bars with rate and time left while looking through the images.

    Raises:
        ValueError: one is missing or has images without a label, there is one class only, or those of the second are
            not among those of the first.
    """
    train, val = (_open(part, option, progress) for part in parts_of(data))
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
    root = str(data.root)  # a Path would make one slash of the two in s3://
    learn = root if data.kind == "shards" else os.path.join(root, "train")
    return replace(data, root=learn), replace(data, root=data.val or os.path.join(root, "val"))


def _open(part: LabelledDataConfig, option: str, progress: bool) -> Images:
    try:
        images = open_images(part, progress)
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
    numbers = {name: number for number, name in enumerate(classes)}
    position = torch.tensor([numbers[name] for name in images.classes])
    return position[torch.from_numpy(np.array(images.labels, np.int64))]
