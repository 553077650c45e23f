"""The index: tells what was found, is built once, and survives whatever happens meanwhile."""

import io
import itertools
import json
import os
import shutil
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mixmim_ds.data import index as index_module
from mixmim_ds.data import scan, storage
from mixmim_ds.data.index import Index, open_index


def write_image(path: Path, width: int = 8, height: int = 6) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    kind = {".jpg": "JPEG", ".jpeg": "JPEG"}.get(path.suffix.lower(), path.suffix[1:].upper())
    Image.new("RGB", (width, height), "teal").save(path, kind)
    return path


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Two classes, one of them nested, an image of each format, and one directly in the root."""
    for place, name in enumerate(["dog/deep/er/x.JPG", "dog/y.png", "cat/é ü.webp", "cat/z.Jpeg", "top.bmp"]):
        write_image(tmp_path / "data" / name, width=20 + place, height=10 + place)
    (tmp_path / "data" / "readme.txt").write_text("no image")
    return tmp_path / "data"


@pytest.fixture
def index_dir(tmp_path: Path) -> Path:
    return tmp_path / "made" / "when missing"


@pytest.fixture
def headers_read(monkeypatch: pytest.MonkeyPatch) -> list[bytes]:
    """The image files that have been opened since."""
    seen: list[bytes] = []
    measure = scan.measure_file

    def count(path: bytes) -> tuple[int, int, int]:
        seen.append(path)
        return measure(path)

    monkeypatch.setattr(scan, "measure_file", count)
    return seen


def names(index: Index) -> list[str]:
    return [str(index.path(i).relative_to(index.root)) for i in range(len(index))]


def contents(index: Index) -> tuple:
    """All that an index tells, in objects of their own."""
    return names(index), index.sizes.tolist(), index.labels.tolist(), index.classes, index.fingerprint, index.broken


def place_of(index_dir: Path) -> Path:
    """The one index in the folder, beside which nothing may be left."""
    (place,) = index_dir.iterdir()
    return place


# What is found


def test_images_are_found_at_any_depth_in_the_order_of_their_bytes(root: Path, index_dir: Path):
    index = open_index(root, index_dir)
    assert names(index) == ["cat/z.Jpeg", "cat/é ü.webp", "dog/deep/er/x.JPG", "dog/y.png", "top.bmp"]
    assert index.sizes.tolist() == [[13, 23], [12, 22], [10, 20], [11, 21], [14, 24]]
    assert index.classes == ["cat", "dog"]
    assert index.labels.tolist() == [0, 0, 1, 1, -1]
    assert index.broken == []
    assert all(index.path(i).is_file() for i in range(len(index)))


def test_arrays_have_the_promised_types_and_are_memory_mapped(root: Path, index_dir: Path):
    for index in (open_index(root, index_dir), open_index(root, index_dir)):
        assert (index.paths.dtype, index.paths.shape) == (np.uint8, (5, len("dog/deep/er/x.JPG")))
        assert index.paths[3].tobytes() == b"dog/y.png".ljust(17, b"\0")
        assert (index.sizes.dtype, index.sizes.shape) == (np.int32, (5, 2))
        assert (index.labels.dtype, index.labels.shape) == (np.int32, (5,))
        assert all(isinstance(array, np.memmap) for array in (index.paths, index.sizes, index.labels))


def test_images_are_named_opened_and_given_as_a_table_of_paths(root: Path, index_dir: Path):
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


def test_classes_are_sorted_by_name_even_where_paths_sort_otherwise(tmp_path: Path, index_dir: Path):
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


def test_names_that_are_no_utf8_are_kept(tmp_path: Path, index_dir: Path):
    folder = tmp_path / os.fsdecode(b"caf\xe9")
    write_image(folder / "x.png").rename(folder / os.fsdecode(b"\xff.png"))
    for index in (open_index(tmp_path, index_dir), open_index(tmp_path, index_dir)):
        assert index.path(0).is_file() and os.fsencode(index.path(0)).endswith(b"caf\xe9/\xff.png")
        assert os.fsencode(index.classes[0]) == b"caf\xe9"


def test_an_index_inside_the_data_is_not_data(root: Path):
    open_index(root, root / "index")
    write_image(root / "index" / "x.png")
    assert "index/x.png" not in names(open_index(root, root / "index"))


def test_a_link_to_the_root_is_the_same_data(root: Path, tmp_path: Path, index_dir: Path, headers_read: list[bytes]):
    (tmp_path / "link").symlink_to(root)
    first = open_index(root, index_dir)
    assert open_index(tmp_path / "link", index_dir).fingerprint == first.fingerprint
    assert len(headers_read) == 5


def test_broken_files_are_told_and_left_out(root: Path, index_dir: Path):
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
):
    monkeypatch.setattr(sys, "stderr", screen())
    open_index(root, index_dir, progress=progress)
    assert ("reading headers: 100%" in sys.stderr.getvalue()) == drawn


# The fingerprint


def test_a_copy_elsewhere_has_the_same_fingerprint(root: Path, tmp_path: Path, index_dir: Path):
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
def test_changed_data_has_another_fingerprint(root: Path, index_dir: Path, change: Callable[[Path], object]):
    before = open_index(root, index_dir).fingerprint
    change(root)
    shutil.rmtree(index_dir)
    assert open_index(root, index_dir).fingerprint != before


# The cache


def test_a_second_open_reads_no_image(root: Path, index_dir: Path, headers_read: list[bytes]):
    first = open_index(root, index_dir)
    assert len(headers_read) == 5
    second = open_index(root, index_dir)
    assert len(headers_read) == 5
    assert contents(second) == contents(first)
    assert second.root == first.root == root.resolve()


@pytest.mark.parametrize(
    ("change", "images"),
    [
        (lambda root: write_image(root / "dog" / "deep" / "er" / "new.png"), 6),
        (lambda root: write_image(root / "bird" / "new.png"), 6),
        (lambda root: (root / "cat" / "z.Jpeg").unlink(), 4),
        (lambda root: shutil.rmtree(root / "dog"), 3),
    ],
    ids=["file added", "folder added", "file removed", "folder removed"],
)
def test_changed_directories_are_noticed(
    root: Path, index_dir: Path, change: Callable[[Path], object], images: int, headers_read: list[bytes]
):
    open_index(root, index_dir)
    change(root)
    assert len(open_index(root, index_dir)) == images
    assert len(headers_read) == 5 + images
    assert place_of(index_dir).is_dir()


def test_a_change_right_after_the_scan_is_noticed(tmp_path: Path, index_dir: Path):
    for i in range(3):
        write_image(tmp_path / f"{i}.png")
        assert len(open_index(tmp_path, index_dir)) == i + 1


def test_an_index_in_use_outlives_its_replacement(root: Path, index_dir: Path):
    old = open_index(root, index_dir)
    write_image(root / "a.png")
    assert len(open_index(root, index_dir)) == 6
    assert names(old)[0] == "cat/z.Jpeg" and old.sizes.sum() == 170


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def edit(path: Path, **changes: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(
    "damage",
    [
        lambda place: (place / "meta.json").unlink(),
        lambda place: (place / "meta.json").write_text("{"),
        lambda place: (place / "meta.json").write_text("[]"),
        lambda place: edit(place / "meta.json", version=0),
        lambda place: edit(place / "meta.json", arrays={}),
        lambda place: edit(place / "meta.json", broken=[1]),
        lambda place: (place / "sizes.npy").unlink(),
        lambda place: truncate(place / "paths.npy"),
        lambda place: (place / "labels.npy").write_bytes(b""),
        lambda place: np.save(place / "labels.npy", np.zeros(4, np.int32)),
        lambda place: (place / "mtimes.npy").write_text("text"),
        lambda place: [file.unlink() for file in place.iterdir()],
    ],
)
def test_damaged_indices_are_rebuilt(root: Path, index_dir: Path, damage: Callable[[Path], object]):
    whole = contents(open_index(root, index_dir))  # copied: damage would be seen through a memory map
    damage(place_of(index_dir))
    assert contents(open_index(root, index_dir)) == whole
    assert index_module._store(root.resolve(), index_dir).current() is not None


def test_an_index_that_is_replaced_while_it_is_read_is_not_used(
    root: Path, index_dir: Path, monkeypatch: pytest.MonkeyPatch
):
    open_index(root, index_dir)
    place = place_of(index_dir)

    def replaced(*_: object) -> bool:
        edit(place / "meta.json", fingerprint="another")
        return True

    monkeypatch.setattr(index_module, "_directories_unchanged", replaced)
    assert index_module._store(root.resolve(), index_dir).current() is None


def test_leftovers_of_killed_builders_go_after_a_week(root: Path, index_dir: Path):
    open_index(root, index_dir)
    place = place_of(index_dir)
    old, new = index_dir / f"{place.name}.old", index_dir / f"{place.name}.new"
    for leftover in (old, new):
        leftover.mkdir()
        (leftover / "paths.npy").touch()
    os.utime(old, (0, 0))
    write_image(root / "a.png")
    open_index(root, index_dir)
    assert sorted(index_dir.iterdir()) == sorted([place, new])


def in_child(task: Callable[[], object]) -> int:
    """Starts a process that does the task and ends with 0 if it succeeds; its id."""
    child = os.fork()
    if child == 0:
        try:
            task()
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    return child


def killed_at(event: int, inside: Path, task: Callable[[], object]) -> Callable[[], object]:
    """The task, ended by kill -9 right before it does its event-th thing to files inside a folder."""

    def doomed() -> None:
        events = itertools.count()

        def watch(name: str, arguments: tuple) -> None:
            touched = any(isinstance(a, (str, os.PathLike)) and os.fspath(a).startswith(str(inside)) for a in arguments)
            if touched and next(events) == event:
                os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(watch)
        task()

    return doomed


@pytest.mark.parametrize("outdated", [False, True], ids=["first index", "outdated index there"])
def test_a_kill_at_any_moment_leaves_no_index_or_a_whole_one(root: Path, index_dir: Path, outdated: bool):
    """Every file operation in the index folder is once the last one that a builder does not live to do."""
    index_dir.mkdir(parents=True)
    for event in itertools.count():
        shutil.rmtree(index_dir)
        index_dir.mkdir()
        if outdated:
            open_index(root, index_dir)
            os.utime(root, ns=(event, event))
        _, status = os.waitpid(in_child(killed_at(event, index_dir, lambda: open_index(root, index_dir))), 0)
        for place in index_dir.glob("?" * 16):
            assert len(storage._read(place).arrays["sizes"]) == 5
        assert len(open_index(root, index_dir)) == 5
        if status == 0:
            break
        assert os.WTERMSIG(status) == signal.SIGKILL
    assert event > 15  # the moments that were tried


@pytest.mark.parametrize("outdated", [False, True], ids=["first index", "outdated index there"])
def test_builders_that_meet_do_no_harm(root: Path, index_dir: Path, outdated: bool):
    if outdated:
        open_index(root, index_dir)
        os.utime(root, ns=(1, 1))

    def build() -> None:
        index = open_index(root, index_dir)
        assert names(index)[0] == "cat/z.Jpeg" and index.sizes.sum() == 170

    builders = [in_child(build) for _ in range(8)]
    assert [os.waitpid(builder, 0)[1] for builder in builders] == [0] * 8
    assert index_module._store(root.resolve(), index_dir).current() is not None


def test_the_index_of_a_faster_builder_stays(root: Path, index_dir: Path, monkeypatch: pytest.MonkeyPatch):
    build = index_module._build

    def slow(*arguments) -> storage.Stored:
        stored = build(*arguments)
        monkeypatch.setattr(index_module, "_build", build)
        open_index(root, index_dir)
        return stored

    monkeypatch.setattr(index_module, "_build", slow)
    index = open_index(root, index_dir)
    assert Path(index.paths.filename).parent == place_of(index_dir).resolve()


# Mistakes of users


def refusal(root: Path, index_dir: Path) -> str:
    with pytest.raises(ValueError) as refused:
        open_index(root, index_dir)
    sentence = str(refused.value)
    assert sentence.count(". ") == 0 and "\n" not in sentence and sentence.endswith(".")
    return sentence


def test_a_missing_folder_is_refused(tmp_path: Path, index_dir: Path):
    sentence = refusal(tmp_path / "none", index_dir)
    assert sentence == f"data.root={tmp_path}/none does not exist: give the folder that holds the images."


def test_a_file_is_refused(root: Path, index_dir: Path):
    sentence = refusal(root / "top.bmp", index_dir)
    assert sentence == f"data.root={root}/top.bmp is a file: give the folder that holds the images."


def test_a_folder_without_images_is_refused(tmp_path: Path, index_dir: Path):
    (tmp_path / "data" / "deep").mkdir(parents=True)
    for name in ("a.txt", "deep/b.tar", "deep/.hidden"):
        (tmp_path / "data" / name).touch()
    assert refusal(tmp_path / "data", index_dir) == (
        f"data.root={tmp_path}/data holds no image: .bmp, .jpeg, .jpg, .png, .webp are looked for at any depth, "
        "but there are only 2 other files; give the folder that holds the images."
    )
    assert list(index_dir.iterdir()) == []


def test_a_folder_of_broken_images_is_refused(tmp_path: Path, index_dir: Path):
    (tmp_path / "data").mkdir()
    for name in ("a.jpg", "b.jpg"):
        (tmp_path / "data" / name).write_text("text")
    assert refusal(tmp_path / "data", index_dir) == (
        f"data.root={tmp_path}/data holds no readable image: all 2 files with an image's extension are broken, "
        "the first is a.jpg (neither JPEG, PNG, WebP nor BMP); give a folder of intact images."
    )


def test_an_index_folder_that_cannot_be_written_is_refused(root: Path, tmp_path: Path):
    (tmp_path / "file").touch()
    sentence = refusal(root, tmp_path / "file" / "index")
    assert sentence.startswith(f"data.index_dir={tmp_path}/file/index cannot be written (Not a directory)")


def test_a_full_disk_is_refused(root: Path, index_dir: Path, monkeypatch: pytest.MonkeyPatch):
    def full(*arguments) -> None:
        raise OSError("30 requested and 10 written")  # as numpy reports it, without a number

    monkeypatch.setattr(np, "save", full)
    assert "cannot be written (30 requested and 10 written)" in refusal(root, index_dir)
    assert list(index_dir.iterdir()) == []
