"""The index on the disk: built once, noticed when outdated, whole whatever happens meanwhile."""

import itertools
import json
import os
import platform
import shutil
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from index_files import contents, names, place_of, write_image

from mixmim_ds.data import index as index_module
from mixmim_ds.data import storage
from mixmim_ds.data.index import Index, open_index


def test_a_second_open_reads_no_image(root: Path, index_dir: Path, headers_read: list[bytes]) -> None:
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
) -> None:
    open_index(root, index_dir)
    change(root)
    assert len(open_index(root, index_dir)) == images
    assert len(headers_read) == 5 + images
    assert place_of(index_dir).is_dir()


def test_a_change_right_after_the_scan_is_noticed(tmp_path: Path, index_dir: Path) -> None:
    for i in range(3):
        write_image(tmp_path / f"{i}.png")
        assert len(open_index(tmp_path, index_dir)) == i + 1


def test_an_index_in_use_outlives_its_replacement(root: Path, index_dir: Path) -> None:
    old = open_index(root, index_dir)
    write_image(root / "a.png")
    assert len(open_index(root, index_dir)) == 6
    assert names(old)[0] == "cat/z.Jpeg" and old.sizes.sum() == 170


def test_nodes_with_copies_of_their_own_share_an_index(
    root: Path, index_dir: Path, headers_read: list[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Copies that lie under the same name, made at other times."""
    copies = [shutil.copytree(root, root.with_name(f"n{number}")) for number in range(3)]
    for number, copy in enumerate(copies):
        for folder in [copy, *copy.rglob("*/")]:
            os.utime(folder, (0, number))

    def open_on(number: int) -> Index:
        monkeypatch.setattr(platform, "node", lambda: f"n{number}")
        copies[number].rename(root.with_name("scratch"))
        try:
            return open_index(root.with_name("scratch"), index_dir)
        finally:
            root.with_name("scratch").rename(copies[number])

    first = [open_on(number) for number in range(3)]
    assert len(headers_read) == 15 and len({index.fingerprint for index in first}) == 1
    held = os.stat(place_of(index_dir) / "paths.npy").st_ino
    for number in (1, 0, 2, 1):
        assert contents(open_on(number))[1:] == contents(first[0])[1:]
    assert len(headers_read) == 15 and os.stat(place_of(index_dir) / "paths.npy").st_ino == held
    write_image(copies[1] / "new.png")
    assert [len(open_on(number)) for number in (1, 2)] == [6, 5], "as it is there"


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
def test_damaged_indices_are_rebuilt(root: Path, index_dir: Path, damage: Callable[[Path], object]) -> None:
    whole = contents(open_index(root, index_dir))  # copied: damage would be seen through a memory map
    damage(place_of(index_dir))
    assert contents(open_index(root, index_dir)) == whole
    assert index_module._store(root.resolve(), index_dir).current() is not None


def test_an_index_that_is_replaced_while_it_is_read_is_not_used(
    root: Path, index_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    open_index(root, index_dir)
    place = place_of(index_dir)

    times_now = index_module._times_now

    def replaced(*arguments: Any) -> np.ndarray:
        edit(place / "meta.json", fingerprint="another")
        return times_now(*arguments)

    monkeypatch.setattr(index_module, "_times_now", replaced)
    assert index_module._store(root.resolve(), index_dir).current() is None


def test_leftovers_of_killed_builders_go_after_a_week(root: Path, index_dir: Path) -> None:
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
def test_a_kill_at_any_moment_leaves_no_index_or_a_whole_one(root: Path, index_dir: Path, outdated: bool) -> None:
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
def test_builders_that_meet_do_no_harm(root: Path, index_dir: Path, outdated: bool) -> None:
    if outdated:
        open_index(root, index_dir)
        os.utime(root, ns=(1, 1))

    def build() -> None:
        index = open_index(root, index_dir)
        assert names(index)[0] == "cat/z.Jpeg" and index.sizes.sum() == 170

    builders = [in_child(build) for _ in range(8)]
    assert [os.waitpid(builder, 0)[1] for builder in builders] == [0] * 8
    assert index_module._store(root.resolve(), index_dir).current() is not None


def test_the_index_of_a_faster_builder_stays(root: Path, index_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build = index_module._build

    def slow(*arguments) -> storage.Stored:
        stored = build(*arguments)
        monkeypatch.setattr(index_module, "_build", build)
        open_index(root, index_dir)
        return stored

    monkeypatch.setattr(index_module, "_build", slow)
    index = open_index(root, index_dir)
    assert Path(index.paths.filename).parent == place_of(index_dir).resolve()
