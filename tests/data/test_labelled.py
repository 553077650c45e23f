"""Labelled sets: in shards, and batches that share a set out."""

from pathlib import Path

import pytest
import torch
from tars import picture, write_tar

from mixmim_ds.data.labelled import central_batches, open_labelled
from mixmim_ds.data.loader import Normalise
from mixmim_ds.finetune_config import LabelledDataConfig


def in_shards(folder: Path, learn: dict[str, bytes], judge: dict[str, bytes]) -> LabelledDataConfig:
    write_tar(folder / "learn-0.tar", learn)
    write_tar(folder / "judge-0.tar", judge)
    return LabelledDataConfig(
        kind="shards", root=f"{folder}/learn-*.tar", val=f"{folder}/judge-*.tar", index_dir=str(folder / "index")
    )


def numbered(*labels: int) -> dict[str, bytes]:
    """An image for each label."""
    files = {f"{i}.jpg": picture(40 + i) for i in range(len(labels))}
    return files | {f"{i}.cls": str(label).encode() for i, label in enumerate(labels)}


def test_labels_of_shards_are_positions_among_those_to_learn_from(tmp_path: Path) -> None:
    learn, judge = open_labelled(in_shards(tmp_path, numbered(7, 30, 7, 9), numbered(30, 30, 9)))
    assert learn.classes == judge.classes == ["7", "9", "30"]
    assert learn.labels.tolist() == [0, 2, 0, 1] and judge.labels.tolist() == [2, 2, 1]


def test_images_without_labels_are_one_sentence(tmp_path: Path) -> None:
    bare = {name: content for name, content in numbered(1, 2, 3).items() if name != "1.cls"}
    with pytest.raises(
        ValueError, match=r"data\.root: 1 images of .*judge-\*\.tar have no class, .*judge-0\.tar:1\.jpg"
    ):
        open_labelled(in_shards(tmp_path, numbered(1, 2, 3), bare))


@pytest.mark.parametrize("size", [1, 2, 3, 5])
def test_ranks_share_out_the_same_batches(labelled: Path, tmp_path: Path, size: int) -> None:
    """73 images in batches of 16: five, of which the last has nine."""
    data = LabelledDataConfig(root=str(labelled), index_dir=str(tmp_path))
    images, normalise = open_labelled(data)[1].images, Normalise(data.mean, data.std, torch.device("cpu"))
    alone = list(central_batches(images, 32, normalise, torch.device("cpu"), 1, 16))
    assert [rows.tolist() for _, rows in alone] == [list(range(k, min(k + 16, 73))) for k in range(0, 73, 16)]
    for rank in range(size):
        own = list(central_batches(images, 32, normalise, torch.device("cpu"), 1, 16, rank, size))
        for (pixels, rows), (expected, numbers) in zip(own, alone[rank::size], strict=True):
            assert torch.equal(pixels, expected) and rows.tolist() == numbers.tolist()
