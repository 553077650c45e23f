"""Labelled sets in shards."""

from pathlib import Path

import pytest
from tars import picture, write_tar

from mixmim_ds.data.labelled import open_labelled
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
