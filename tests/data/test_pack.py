"""Packing: the layout of WebDataset, the same bytes anywhere, and nothing half done or written over."""

import json
import shutil
import subprocess
from pathlib import Path

import pytest
from launching import typed
from tars import members_of, picture

from mixmim_ds.data.index import Index, open_index
from mixmim_ds.data.pack import pack


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Names that would be one key, or two, if dots and folders were taken as they are; one image without a class."""
    for i, name in enumerate(["dog/a.b.JPG", "dog/a.c.jpg", "dog/x/y.jpg", "cat/x_y.jpg", "cat/é ü.jpg", "top.png"]):
        path = tmp_path / "data" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(picture(40 + i, kind="PNG" if name.endswith("png") else "JPEG"))
    (tmp_path / "data" / "dog" / "broken.jpg").write_text("text")
    return tmp_path / "data"


def index_of(root: Path) -> Index:
    return open_index(root, root.parent / "index")


def test_every_image_is_a_sample_of_its_own_beside_its_label(root: Path, tmp_path: Path) -> None:
    index = index_of(root)
    assert [shard.name for shard in pack(index, tmp_path / "out", per_shard=4)] == [
        "train-000000.tar",
        "train-000001.tar",
    ]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "classes.json", "train-000000.tar", "train-000001.tar",
    ]  # fmt: skip
    first, second = (members_of(tmp_path / "out" / f"train-00000{i}.tar") for i in range(2))
    members = first | second
    assert len(members) == len(first) + len(second)
    assert json.loads((tmp_path / "out" / "classes.json").read_text()) == index.classes == ["cat", "dog"]
    images = {name: content for name, content in members.items() if not name.endswith(".cls")}
    assert sorted(images) == sorted(images, key=lambda name: int(name[:9])) and len(images) == 6
    labels = {name.removesuffix(".cls"): content for name, content in members.items() if name.endswith(".cls")}
    told = {}
    for name, content in images.items():
        key, dot, extension = name.partition(".")
        assert "/" not in name and extension in ("jpg", "png")
        told[content] = (key[9:], labels.pop(key, None))
    assert labels == {}
    assert told == {
        (root / name).read_bytes(): found
        for name, found in {
            "dog/a.b.JPG": ("-dog_a_b", b"1"),
            "dog/a.c.jpg": ("-dog_a_c", b"1"),
            "dog/x/y.jpg": ("-dog_x_y", b"1"),
            "cat/x_y.jpg": ("-cat_x_y", b"0"),
            "top.png": ("-top", None),
        }.items()
    } | {(root / "cat/é ü.jpg").read_bytes(): ("-cat_é ü", b"0")}


def test_classes_are_mixed(photographs: Path, tmp_path: Path) -> None:
    """In the order of the paths, a tenth of the images would hold two of the 13 classes; in a random one, most."""
    shards = pack(open_index(photographs, tmp_path / "index"), tmp_path / "out", per_shard=30)
    labels = {content for name, content in members_of(shards[0]).items() if name.endswith(".cls")}
    assert len(labels) > 6


def test_a_copy_elsewhere_gives_the_same_bytes(root: Path, tmp_path: Path) -> None:
    shutil.copytree(root, tmp_path / "elsewhere" / "copy")
    written = []
    for folder, out in ((root, tmp_path / "a"), (tmp_path / "elsewhere" / "copy", tmp_path / "b" / "deep")):
        shards = pack(index_of(folder), out, per_shard=4)
        written.append([shard.read_bytes() for shard in shards])
    assert written[0] == written[1]


def test_an_empty_folder_is_taken_and_any_other_is_left(root: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    pack(index_of(root), out, per_shard=10)
    before = {path: path.read_bytes() for path in out.iterdir()}
    for taken in (out, next(iter(before))):
        with pytest.raises(ValueError, match=r"^OUT=.* is there already and not an empty folder: name another"):
            pack(index_of(root), taken, per_shard=10)
    assert {path: path.read_bytes() for path in out.iterdir()} == before


def test_nothing_is_left_of_a_packing_that_fails(root: Path, tmp_path: Path) -> None:
    index = index_of(root)
    (root / "dog" / "x" / "y.jpg").unlink()
    before = sorted(tmp_path.iterdir())
    with pytest.raises(ValueError, match=r"^DIR=.*: dog/x/y.jpg cannot be read \(No such file or directory\)"):
        pack(index, tmp_path / "out", per_shard=4)
    with pytest.raises(ValueError, match=r"^OUT=.* cannot be written \(Not a directory\)"):
        pack(index, root / "top.png" / "deep" / "out", per_shard=4)
    assert sorted(tmp_path.iterdir()) == before


def test_the_command_packs_and_tells_how_to_go_on(root: Path, tmp_path: Path) -> None:
    def call(*arguments: object) -> subprocess.CompletedProcess[str]:
        return typed("launch/index.py", *arguments, "--index-dir", tmp_path / "index")

    done = call("--pack", root, tmp_path / "out", "--per-shard", 4)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [
        f"{root} -> {tmp_path}/out: 6 images of 2 classes in 2 shards (1 broken files left out)",
        f"train with: data=shards 'data.root={tmp_path}/out/train-{{000000..000001}}.tar'",
    ]
    for arguments, sentence in (
        (("--pack", root), "error: --pack wants two folders: DIR, of the images, and OUT, to be made for the shards."),
        (("--pack", root, tmp_path / "out"), f"error: OUT={tmp_path}/out is there already"),
        (("--pack", root, tmp_path / "b", "--per-shard", 0), "error: --per-shard=0 must be a positive number"),
        (("--pack", "s3://bucket/x", tmp_path / "b"), "error: --pack reads and writes folders on disk: copy from"),
        (("--pack", tmp_path / "none", tmp_path / "b"), f"error: data.root={tmp_path}/none does not exist"),
    ):
        done = call(*arguments)
        assert done.returncode == 2 and done.stderr.startswith(sentence) and done.stderr.count("\n") == 1, done.stderr
