"""The index: tells what was found, and a user's mistake in one sentence."""

import io
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from index_files import contents, names, write_image

from mixmim_ds.data.index import open_index

# What is found


def test_images_are_found_at_any_depth_in_the_order_of_their_bytes(root: Path, index_dir: Path) -> None:
    index = open_index(root, index_dir)
    assert names(index) == ["cat/z.Jpeg", "cat/é ü.webp", "dog/deep/er/x.JPG", "dog/y.png", "top.bmp"]
    assert index.sizes.tolist() == [[13, 23], [12, 22], [10, 20], [11, 21], [14, 24]]
    assert index.classes == ["cat", "dog"]
    assert index.labels.tolist() == [0, 0, 1, 1, -1]
    assert index.broken == []
    assert all(index.path(i).is_file() for i in range(len(index)))


def test_arrays_have_the_promised_types_and_are_memory_mapped(root: Path, index_dir: Path) -> None:
    for index in (open_index(root, index_dir), open_index(root, index_dir)):
        assert (index.paths.dtype, index.paths.shape) == (np.uint8, (5, len("dog/deep/er/x.JPG")))
        assert index.paths[3].tobytes() == b"dog/y.png".ljust(17, b"\0")
        assert (index.sizes.dtype, index.sizes.shape) == (np.int32, (5, 2))
        assert (index.labels.dtype, index.labels.shape) == (np.int32, (5,))
        assert all(isinstance(array, np.memmap) for array in (index.paths, index.sizes, index.labels))


def test_images_are_named_opened_and_given_as_a_table_of_paths(root: Path, index_dir: Path) -> None:
    index = open_index(root, index_dir)
    assert (index.gives, index.name(3)) == ("paths", "dog/y.png")
    with index.open(3) as file:
        assert file.read() == (root / "dog" / "y.png").read_bytes()
    table = index.give(np.array([3, 2]))
    assert table.dtype == np.uint8 and table.shape == (2, len(os.fsencode(root)) + 1 + len("dog/deep/er/x.JPG"))
    assert [os.fsdecode(row.tobytes().rstrip(b"\0")) for row in table] == [
        f"{root}/dog/y.png",
        f"{root}/dog/deep/er/x.JPG",
    ]


def test_classes_are_sorted_by_name_even_where_paths_sort_otherwise(tmp_path: Path, index_dir: Path) -> None:
    for name in ("a-b/1.png", "a/1.png", "Z/1.png", "empty/nothing.txt", "a!.png"):
        if name.endswith("txt"):
            (tmp_path / "data" / "empty").mkdir()
            (tmp_path / "data" / name).touch()
        else:
            write_image(tmp_path / "data" / name)
    index = open_index(tmp_path / "data", index_dir)
    assert names(index) == ["Z/1.png", "a!.png", "a-b/1.png", "a/1.png"]
    assert index.classes == ["Z", "a", "a-b"]
    assert index.labels.tolist() == [0, -1, 2, 1]


def test_names_that_are_no_utf8_are_kept(tmp_path: Path, index_dir: Path) -> None:
    folder = tmp_path / os.fsdecode(b"caf\xe9")
    write_image(folder / "x.png").rename(folder / os.fsdecode(b"\xff.png"))
    for index in (open_index(tmp_path, index_dir), open_index(tmp_path, index_dir)):
        assert index.path(0).is_file() and os.fsencode(index.path(0)).endswith(b"caf\xe9/\xff.png")
        assert os.fsencode(index.classes[0]) == b"caf\xe9"


def test_an_index_inside_the_data_is_not_data(root: Path) -> None:
    open_index(root, root / "index")
    write_image(root / "index" / "x.png")
    assert "index/x.png" not in names(open_index(root, root / "index"))


def test_an_index_in_the_folder_of_the_images_itself_is_refused(root: Path) -> None:
    with pytest.raises(ValueError, match=r"data\.index_dir=.* is data\.root itself"):
        open_index(root, root / "cat" / "..")


def test_a_link_to_the_root_is_the_same_data(
    root: Path, tmp_path: Path, index_dir: Path, headers_read: list[bytes]
) -> None:
    (tmp_path / "link").symlink_to(root)
    first = open_index(root, index_dir)
    assert open_index(tmp_path / "link", index_dir).fingerprint == first.fingerprint
    assert len(headers_read) == 5


def test_broken_files_are_told_and_left_out(root: Path, index_dir: Path) -> None:
    intact = open_index(root, index_dir)
    (root / "cat" / "text.jpg").write_text("text")
    (root / "empty.png").touch()
    for index in (open_index(root, index_dir), open_index(root, index_dir)):
        assert index.broken == [("cat/text.jpg", "neither JPEG, PNG, WebP nor BMP"), ("empty.png", "empty file")]
        assert contents(index)[:-1] == contents(intact)[:-1]


class Screen(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(
    ("screen", "progress", "drawn"), [(Screen, True, True), (Screen, False, False), (io.StringIO, True, False)]
)
def test_progress_is_drawn_on_request_and_never_into_a_log(
    screen: type[io.StringIO], progress: bool, drawn: bool, root: Path, index_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stderr", screen())
    open_index(root, index_dir, progress=progress)
    assert ("reading headers: 100%" in sys.stderr.getvalue()) == drawn


# The fingerprint


def test_a_copy_elsewhere_has_the_same_fingerprint(root: Path, tmp_path: Path, index_dir: Path) -> None:
    shutil.copytree(root, tmp_path / "copy")
    assert open_index(root, index_dir).fingerprint == open_index(tmp_path / "copy", index_dir).fingerprint


@pytest.mark.parametrize(
    "change",
    [
        lambda root: write_image(root / "cat" / "new.png"),
        lambda root: (root / "top.bmp").unlink(),
        lambda root: (root / "top.bmp").rename(root / "tip.bmp"),
        lambda root: write_image(root / "dog" / "y.png", 22, 11),
        lambda root: (root / "dog" / "y.png").write_bytes((root / "dog" / "y.png").read_bytes() + b"\0"),
    ],
    ids=["added", "removed", "renamed", "other pixels", "other bytes"],
)
def test_changed_data_has_another_fingerprint(root: Path, index_dir: Path, change: Callable[[Path], object]) -> None:
    before = open_index(root, index_dir).fingerprint
    change(root)
    shutil.rmtree(index_dir)
    assert open_index(root, index_dir).fingerprint != before


# Mistakes of users


def refusal(root: Path, index_dir: Path) -> str:
    with pytest.raises(ValueError) as refused:
        open_index(root, index_dir)
    sentence = str(refused.value)
    assert sentence.count(". ") == 0 and "\n" not in sentence and sentence.endswith(".")
    return sentence


def test_a_missing_folder_is_refused(tmp_path: Path, index_dir: Path) -> None:
    sentence = refusal(tmp_path / "none", index_dir)
    assert sentence == f"data.root={tmp_path}/none does not exist: give the folder that holds the images."


def test_a_file_is_refused(root: Path, index_dir: Path) -> None:
    sentence = refusal(root / "top.bmp", index_dir)
    assert sentence == f"data.root={root}/top.bmp is a file: give the folder that holds the images."


def test_a_folder_without_images_is_refused(tmp_path: Path, index_dir: Path) -> None:
    (tmp_path / "data" / "deep").mkdir(parents=True)
    for name in ("a.txt", "deep/b.tar", "deep/.hidden"):
        (tmp_path / "data" / name).touch()
    assert refusal(tmp_path / "data", index_dir) == (
        f"data.root={tmp_path}/data holds no image: .bmp, .jpeg, .jpg, .png, .webp are looked for at any depth, "
        "but there are only 2 other files; give the folder that holds the images, or data=shards if these are tar "
        "files."
    )
    assert list(index_dir.iterdir()) == []


def test_a_folder_of_broken_images_is_refused(tmp_path: Path, index_dir: Path) -> None:
    (tmp_path / "data").mkdir()
    for name in ("a.jpg", "b.jpg"):
        (tmp_path / "data" / name).write_text("text")
    assert refusal(tmp_path / "data", index_dir) == (
        f"data.root={tmp_path}/data holds no readable image: all 2 files with an image's extension are broken, "
        "the first is a.jpg (neither JPEG, PNG, WebP nor BMP); give a folder of intact images."
    )


def test_an_index_folder_that_cannot_be_written_is_refused(root: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    sentence = refusal(root, tmp_path / "file" / "index")
    assert sentence.startswith(f"data.index_dir={tmp_path}/file/index cannot be written (Not a directory)")


def test_a_full_disk_is_refused(root: Path, index_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments) -> None:
        raise OSError("30 requested and 10 written")  # as numpy reports it, without a number

    monkeypatch.setattr(np, "save", full)
    assert "cannot be written (30 requested and 10 written)" in refusal(root, index_dir)
    assert list(index_dir.iterdir()) == []
