"""Tar shards: the same images, labels and pixels as the folder they were packed from, found once."""

import hashlib
import itertools
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from forks import in_fork
from tars import picture, write_tar

from mixmim_ds.data import shards as shards_module
from mixmim_ds.data.dali import build_pipeline, run_pipeline
from mixmim_ds.data.index import Index, open_index
from mixmim_ds.data.pack import pack
from mixmim_ds.data.plan import windows_at
from mixmim_ds.data.shards import Images, ShardIndex, open_shards

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def packed(photographs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The photographs as five shards."""
    folder = tmp_path_factory.mktemp("packed")
    pack(open_index(photographs, folder / "index"), folder / "shards", per_shard=64)
    return folder / "shards"


@pytest.fixture
def index_dir(tmp_path: Path) -> Path:
    return tmp_path / "index"


@pytest.fixture
def shards(tmp_path: Path) -> str:
    """The pattern of two shards of three images; one image has no label."""
    write_tar(tmp_path / "in" / "t-0.tar", {"a.jpg": picture(41), "a.cls": b"10", "b.png": picture(42, kind="PNG")})
    write_tar(tmp_path / "in" / "t-1.tar", {"c.json": b'{"label": 9}', "c.jpg": picture(43), "readme": b"text"})
    return f"{tmp_path}/in/t-{{0..1}}.tar"


@pytest.fixture
def shards_read(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The shards that have been looked through since."""
    seen: list[str] = []
    read = shards_module.read_contents

    def count(path: str) -> object:
        seen.append(os.path.basename(path))
        return read(path)

    monkeypatch.setattr(shards_module, "read_contents", count)
    return seen


def names(index: ShardIndex) -> list[str]:
    return [index.name(i) for i in range(len(index))]


# What is found


def test_shards_hold_the_images_of_their_folder_with_their_labels(
    photographs: Path, packed: Path, index_dir: Path
) -> None:
    folder, found = open_index(photographs, index_dir), open_shards(f"{packed}/*.tar", index_dir)
    assert len(found) == len(folder) == 300
    numbers = [str(folder.classes.index(name)) for name in folder.classes]
    assert found.classes == sorted(numbers, key=int) and found.broken == []

    def told(index: Images, i: int, class_of: Callable[[int], str]) -> tuple:
        with index.open(i) as file:
            content = hashlib.sha256(file.read()).hexdigest()
        return content, class_of(index.labels[i]), *index.sizes[i].tolist()

    in_shards = {told(found, i, lambda label: folder.classes[int(found.classes[label])]) for i in range(300)}
    assert in_shards == {told(folder, i, lambda label: folder.classes[label]) for i in range(300)}


def test_images_are_named_labelled_and_given(shards: str, index_dir: Path) -> None:
    for index in (open_shards(shards, index_dir), open_shards(shards, index_dir)):
        assert names(index) == ["t-0.tar:a.jpg", "t-0.tar:b.png", "t-1.tar:c.jpg"]
        assert index.sizes.tolist() == [[30, 41], [30, 42], [30, 43]]
        assert index.classes == ["9", "10"] and index.labels.tolist() == [1, -1, 0]
        assert index.gives == "bytes"
        assert [given.tobytes() for given in index.give(np.array([2, 0]))] == [picture(43), picture(41)]
        assert (index.sizes.dtype, index.labels.dtype, index.spans.dtype) == (np.int32, np.int32, np.int64)
        arrays = (index.names, index.ends, index.spans, index.sizes, index.labels)
        assert all(isinstance(array, np.memmap) for array in arrays)


def test_a_forked_process_opens_images(shards: str, index_dir: Path) -> None:
    """As torchvision's DataLoader forks its workers: the threads that read for the parent are not there."""
    index = open_shards(shards, index_dir)
    assert index.give(np.array([0]))[0].tobytes() == picture(41)
    assert in_fork(lambda: index.open(2).read()) == picture(43)


def test_classes_of_words_are_sorted(tmp_path: Path, index_dir: Path) -> None:
    labels = ["dog", "Cat", 10, None, "dog"]
    members = {f"{i}.json": json.dumps({"label": label}).encode() for i, label in enumerate(labels)}
    write_tar(tmp_path / "x.tar", members | {f"{i}.jpg": picture() for i in range(5)})
    index = open_shards(str(tmp_path / "x.tar"), index_dir)
    assert index.classes == ["10", "Cat", "dog"] and index.labels.tolist() == [2, 1, 0, -1, 2]


def test_broken_members_are_told_and_left_out(tmp_path: Path, index_dir: Path) -> None:
    write_tar(tmp_path / "x.tar", {"a.jpg": picture(), "b.jpg": b"text", "c.jpg": picture()})
    write_tar(tmp_path / "y.tar", {})
    for index in (open_shards(f"{tmp_path}/*.tar", index_dir), open_shards(f"{tmp_path}/*.tar", index_dir)):
        assert index.broken == [("x.tar:b.jpg", "neither JPEG, PNG, WebP nor BMP")]
        assert names(index) == ["x.tar:a.jpg", "x.tar:c.jpg"]


def test_a_copy_elsewhere_has_the_same_fingerprint(packed: Path, tmp_path: Path, index_dir: Path) -> None:
    """Whatever the pattern and the folders: the same images in the same rows."""
    original = open_shards(f"{packed}/train-{{000000..000004}}.tar", index_dir)
    for folder, moved in (("z", ("train-000000.tar", "train-000003.tar")), ("a", ("train-00000[124].tar",))):
        (tmp_path / folder).mkdir()
        for path in itertools.chain.from_iterable(packed.glob(pattern) for pattern in moved):
            shutil.copy(path, tmp_path / folder)
    copied = open_shards(f"{tmp_path}/{{z,a}}/*.tar", index_dir)
    assert copied.fingerprint == original.fingerprint and names(copied) == names(original)
    (tmp_path / "z" / "train-000000.tar").rename(tmp_path / "z" / "train-000009.tar")
    assert open_shards(f"{tmp_path}/{{z,a}}/*.tar", index_dir).fingerprint != original.fingerprint, "another order"


# The pixels


def decode(index: Index | ShardIndex, ids: np.ndarray, windows: np.ndarray) -> torch.Tensor:
    images, flips = index.give(ids), np.arange(len(ids), dtype=np.int32) % 2
    pipeline = build_pipeline(
        lambda _: (images, windows[:, :2].copy(), windows[:, 2:].copy(), flips), index.gives, len(ids), 64, CPU, 2, 2
    )
    return run_pipeline(pipeline, CPU).clone()


def test_bytes_of_a_shard_decode_as_the_file_they_came_from(photographs: Path, packed: Path, index_dir: Path) -> None:
    folder, found = open_index(photographs, index_dir), open_shards(f"{packed}/*.tar", index_dir)
    place = {folder.path(i).read_bytes(): i for i in range(300)}
    rows = np.arange(0, 300, 5)
    same = np.array([place[given.tobytes()] for given in found.give(rows)])
    windows = windows_at(0, 0, np.arange(len(rows)), found.sizes[rows], (0.2, 1.0), (3 / 4, 4 / 3))
    assert torch.equal(decode(found, rows, windows), decode(folder, same, windows))


# The cache


def test_a_second_open_reads_no_shard(shards: str, index_dir: Path, shards_read: list[str]) -> None:
    first = open_shards(shards, index_dir)
    assert sorted(shards_read) == ["t-0.tar", "t-1.tar"]
    second = open_shards(shards, index_dir)
    assert len(shards_read) == 2 and second.fingerprint == first.fingerprint and names(second) == names(first)


def rewrite(shard: Path) -> None:
    write_tar(shard, {"new.jpg": picture(50), "c.jpg": picture(43)})


@pytest.mark.parametrize(
    ("change", "images"),
    [
        (lambda folder: rewrite(folder / "t-1.tar"), 4),
        (lambda folder: os.utime(folder / "t-1.tar", (1, 1)), 3),
        (lambda folder: write_tar(folder / "t-2.tar", {"d.jpg": picture()}), 4),
        (lambda folder: (folder / "t-1.tar").unlink(), 2),
        (lambda folder: (folder / "t-1.tar").rename(folder / "t-2.tar"), 3),
    ],
    ids=["written again", "touched", "added", "removed", "renamed"],
)
def test_changed_shards_are_noticed(
    shards: str, index_dir: Path, shards_read: list[str], change: Callable[[Path], object], images: int
) -> None:
    folder = Path(shards).parent
    open_shards(f"{folder}/*.tar", index_dir)
    shards_read.clear()
    change(folder)
    assert len(open_shards(f"{folder}/*.tar", index_dir)) == images
    assert len(shards_read) == len(list(folder.glob("*.tar")))
    (place,) = index_dir.iterdir()
    assert {"sizes.npy", "spans.npy", "states.npy"} <= {file.name for file in place.glob("s*.npy")}
    shards_read.clear()
    open_shards(f"{folder}/*.tar", index_dir)
    assert not shards_read


def test_a_shard_that_changes_while_it_is_read_is_read_again(
    shards: str, index_dir: Path, shards_read: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    read = shards_module.read_contents

    def change(path: str) -> object:
        contents = read(path)
        os.utime(path, (1, 1))
        return contents

    with monkeypatch.context() as at_work:
        at_work.setattr(shards_module, "read_contents", change)
        open_shards(shards, index_dir)
    open_shards(shards, index_dir)
    assert len(shards_read) == 4


def test_a_folder_and_shards_do_not_share_a_place(shards: str, index_dir: Path) -> None:
    folder = Path(shards).parent
    (folder / "x.jpg").write_bytes(picture())
    open_index(folder, index_dir)
    open_shards(f"{folder}/*.tar", index_dir)
    assert len(list(index_dir.iterdir())) == 2


# Mistakes of users


def refusal(pattern: str, index_dir: Path) -> str:
    with pytest.raises(ValueError) as refused:
        open_shards(pattern, index_dir)
    sentence = str(refused.value)
    assert sentence.startswith(f"data.root={pattern}") and "\n" not in sentence and sentence.endswith(".")
    return sentence.removeprefix(f"data.root={pattern}")


def test_a_shard_that_is_no_whole_plain_tar_is_refused(shards: str, index_dir: Path) -> None:
    shard = Path(shards).parent / "t-1.tar"
    whole = shard.read_bytes()
    for content, phrase in (
        (b"text", "is no tar file (truncated header): take it out or pack it again."),
        (b"\x1f\x8b" + bytes(10), "is compressed, and samples could not be read one by one: unpack it"),
        (whole[:2000], "is cut off or damaged (unexpected end of data): copy or pack it again."),
    ):
        shard.write_bytes(content)
        assert refusal(shards, index_dir).startswith(f": {shard} {phrase}")
    assert list(index_dir.iterdir()) == []


def test_shards_without_images_are_refused(tmp_path: Path, index_dir: Path) -> None:
    write_tar(tmp_path / "x.tar", {"a.txt": b"text"})
    write_tar(tmp_path / "y.tar", {})
    assert refusal(f"{tmp_path}/*.tar", index_dir) == (
        " holds no image: .bmp, .jpeg, .jpg, .png, .webp are looked for, but there are only 1 other members; "
        "give shards of images."
    )
    write_tar(tmp_path / "y.tar", {"b.jpg": b"text"})
    assert refusal(f"{tmp_path}/*.tar", index_dir) == (
        " holds no readable image: all 1 members with an image's extension are broken, the first is y.tar:b.jpg "
        "(neither JPEG, PNG, WebP nor BMP); give shards of intact images."
    )
