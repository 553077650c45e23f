"""Broken images met during training: replaced, named, and the same for any number of ranks and after a resume."""

import errno
import itertools
import os
import random
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import pytest
import torch
from broken_files import DAMAGES, fuzzed
from loading import CPU, assert_same, config_of_loader, global_batches, loaders_of, read

from mixmim_ds.data import loader as loader_module
from mixmim_ds.data import recover
from mixmim_ds.data.dali import DecodeError, run_pipeline
from mixmim_ds.data.index import Index, open_index
from mixmim_ds.data.loader import Loader, MicroBatch, Share, open_loader
from mixmim_ds.data.pack import pack
from mixmim_ds.data.recover import UNEXPLAINED, DataFailed
from mixmim_ds.data.s3 import StorageDown
from mixmim_ds.data.shards import open_shards


@pytest.fixture
def index(photographs: Path, tmp_path: Path) -> Index:
    """Of a copy of the photographs, to be damaged; 9 steps of 32 images an epoch."""
    return open_index(shutil.copytree(photographs, tmp_path / "copy"), tmp_path / "index")


def directory(path: Path) -> None:
    path.unlink()
    path.mkdir()


def endless_link(path: Path) -> None:
    path.unlink()
    path.symlink_to(path.name)


BREAKS: dict[str, Callable[[Path], object]] = {
    **{name: lambda path, d=damage: path.write_bytes(d(path.read_bytes())) for name, damage in DAMAGES.items()},
    "vanished": Path.unlink,
    "directory": directory,
    "endless link": endless_link,
}


def break_each_way(index: Index, images: Iterable[int]) -> dict[int, str]:
    """Damages three images in every way; which ones, and how."""
    ways = dict(zip(images, itertools.islice(itertools.cycle(BREAKS), 3 * len(BREAKS)), strict=False))
    for i, way in ways.items():
        BREAKS[way](index.path(i))
    return ways


def ids_of(steps: list[list[MicroBatch]]) -> np.ndarray:
    return np.concatenate([batch.ids for step in steps for batch in step])


def assert_all_same(a: list[list[MicroBatch]], b: list[list[MicroBatch]]) -> None:
    for left, right in zip(a, b, strict=True):
        assert_same(left, right)


def known_to(loaders: list[Loader]) -> dict[int, str]:
    return {i: reason for loader in loaders for i, reason in loader.bad.items()}


def test_every_kind_is_replaced_and_named_the_same_on_any_number_of_ranks(index: Index) -> None:
    intact = global_batches(index, 1, start=0, steps=9)
    ways = break_each_way(index, range(5, 300, 10))
    alone = loaders_of(index, 1)
    expected = read(alone, start=0, steps=9)
    for ranks in (2, 4):
        loaders = loaders_of(index, ranks)
        assert_all_same(read(loaders, start=0, steps=9), expected)
        # Read ahead: the ranks have looked beyond the end by different amounts.
        assert known_to(loaders).keys() <= ways.keys()
    planned, got = ids_of(intact), ids_of(expected)
    cut_off = [i for i, way in ways.items() if way == "truncated"]
    broken = np.isin(planned, [i for i in ways if i not in cut_off])
    assert broken.sum() > 20 and not np.isin(got, planned[broken]).any()
    untouched = ~np.isin(planned, list(ways))
    assert (got[untouched] == planned[untouched]).all()
    for before, after in zip(itertools.chain(*intact), itertools.chain(*expected), strict=True):
        kept = ~np.isin(before.ids, list(ways))
        assert torch.equal(after.images[kept], before.images[kept]) and torch.equal(after.mask, before.mask)
    assert set(planned[broken]) <= alone[0].bad.keys() <= ways.keys()
    for i, reason in alone[0].bad.items():
        assert reason and "\n" not in reason, ways[i]
    gif = next(i for i, way in ways.items() if way == "GIF")
    assert alone[0].bad[gif] == "neither JPEG, PNG, WebP nor BMP"


def test_what_is_remembered_changes_nothing_but_the_time(index: Index) -> None:
    """A resume in the middle, with and without what was known; also of a JPEG that decodes above its end."""
    ways = break_each_way(index, range(0, 300, 4))
    jpegs = [i for i in range(len(index)) if index.path(i).suffix == ".jpg" and i not in ways]
    for i in jpegs[::2]:
        content = index.path(i).read_bytes()
        index.path(i).write_bytes(content[: len(content) * 3 // 4])
    before = loaders_of(index, 1)
    whole = read(before, start=0, steps=3)
    cut_off = set(jpegs[::2])
    assert cut_off & before[0].bad.keys() and cut_off & set(ids_of(whole).tolist()), "bad with some windows only"
    for remembered in ({}, known_to(before), dict.fromkeys(range(300), "said so")):
        loaders = loaders_of(index, 2)
        for loader in loaders:
            loader.bad |= remembered
        assert_all_same(read(loaders, start=2, steps=1), whole[2:])


def test_known_images_cost_no_pipelines_and_come_back_once_they_are_mended(
    index: Index, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = {i: index.path(i).read_bytes() for i in range(0, 300, 10)}
    for i in broken:
        index.path(i).write_bytes(DAMAGES["text"](b""))
    opened, build = [], loader_module.build_pipeline
    monkeypatch.setattr(loader_module, "build_pipeline", lambda *rest: opened.append(0) or build(*rest))
    (loader,) = loaders_of(index, 1)
    batches = loader.batches(0)

    def read_epoch(epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """The images of each micro-batch, and those planned, int [36, 8]."""
        got = np.array([batch.ids for batch in itertools.islice(batches, 36)])
        return got, np.array([loader.plan.micro_batch_at(9 * epoch + i // 4, i % 4).ids for i in range(36)])

    read_epoch(0), read_epoch(1)
    opened.clear()
    got, planned = read_epoch(2)
    assert np.isin(planned, list(broken)).any(1).sum() > 10 and not np.isin(got, list(broken)).any()
    assert len(opened) <= 2, "a window may end above all that have been tried"
    for i, content in broken.items():
        index.path(i).write_bytes(content)
    got, planned = read_epoch(3)
    assert (got[8:] == planned[8:]).all(), "and before that what was read ahead"


@pytest.mark.parametrize("damage", ["empty", "zero bytes", "text", "GIF"])
def test_in_a_batch_of_real_size_such_a_file_kills_no_process(index: Index, damage: str) -> None:
    """Without the guard in the graph it did, with SIGSEGV."""
    config = config_of_loader()
    config.train.global_batch = config.train.micro_batch = 128
    loader = open_loader(config, index, Share(0, 1, 1), CPU, cores=2)
    i = loader.plan.micro_batch_at(0, 0).ids[70]
    index.path(i).write_bytes(DAMAGES[damage](index.path(i).read_bytes()))
    batch = next(loader.batches(0))
    assert list(loader.bad) == [i] and i not in batch.ids


def test_files_that_shrink_while_they_are_in_use(index: Index) -> None:
    loader = loaders_of(index, 1)[0]
    batches = loader.batches(0)
    next(batches)
    for path in map(index.path, range(len(index))):
        if int(path.stem) % 3 == 0:
            path.write_bytes(path.read_bytes()[:300])
    for _ in range(30):
        next(batches)
    assert loader.bad and all(int(index.path(i).stem) % 3 == 0 for i in loader.bad)


def test_where_nothing_decodes_no_image_is_blamed(index: Index) -> None:
    index.root.rename(index.root.with_name("elsewhere"))
    loader = loaders_of(index, 1)[0]
    with pytest.raises(DataFailed, match=r"32 images in a row cannot be decoded, .*data\.root can be read"):
        next(loader.batches(0))
    assert not loader.bad


@pytest.mark.parametrize("shrunk", [True, False], ids=["shrunk", "vanished"])
def test_of_a_shard_that_is_lost_every_image_is_replaced(photographs: Path, tmp_path: Path, shrunk: bool) -> None:
    pack(open_index(photographs, tmp_path / "index"), tmp_path / "shards", per_shard=64)
    index = open_shards(f"{tmp_path}/shards/*.tar", tmp_path / "index")
    lost = tmp_path / "shards" / "train-000002.tar"
    if shrunk:
        os.truncate(lost, int(index.spans[index.spans[:, 0] == 2][0, 1]))
    else:
        lost.unlink()
    alone = loaders_of(index, 1)
    expected = read(alone, start=0, steps=3)
    assert_all_same(global_batches(index, 2, start=0, steps=3), expected)
    assert alone[0].bad and (index.spans[list(alone[0].bad), 0] == 2).all()
    assert not (index.spans[ids_of(expected), 0] == 2).any()
    assert set(alone[0].bad.values()) == {"empty file"} and index.name(min(alone[0].bad)).startswith(
        "train-000002.tar:"
    )


@pytest.mark.parametrize("blips", [{0}, {0, 1}, {0, 1, 3, 4}, {0, 1, 2}])
def test_a_failure_without_a_broken_image_is_tried_again(
    index: Index, blips: set[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """No file can be made to fail in company only, so DALI's failure is the one thing that is staged here."""
    expected, calls = global_batches(index, 1, start=0, steps=1), itertools.count()

    def run(*arguments: object) -> torch.Tensor:
        if next(calls) in blips:
            raise DecodeError("I/O error")
        return run_pipeline(*arguments)

    monkeypatch.setattr(loader_module, "run_pipeline", run)
    if not blips >= {0, 1, 2}:
        assert_all_same(global_batches(index, 1, start=0, steps=1), expected)
    else:
        with pytest.raises(DataFailed, match="DALI failed 3 times over images that it decodes alone: I/O error"):
            global_batches(index, 1, start=0, steps=1)


DOWN = StorageDown(errno.EIO, "S3 answers 503", "s3://b/k")


@pytest.mark.parametrize("error", [DecodeError("I/O error"), DOWN], ids=["DALI", "S3"])
def test_what_fails_alone_too_but_for_a_moment_is_not_held_against_an_image(
    index: Index, error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Staged as above: the batch, and then its first image alone."""
    (loader,), expected = loaders_of(index, 1), global_batches(index, 1, start=0, steps=1)
    for module, failure in ((loader_module, DecodeError("I/O error")), (recover, error)):
        left = [failure]

        def run(*arguments: object, left: list[Exception] = left) -> torch.Tensor:
            if left:
                raise left.pop()
            return run_pipeline(*arguments)

        monkeypatch.setattr(module, "run_pipeline", run)
    monkeypatch.setattr(recover, "DOWN_S", 0)
    assert_all_same(read([loader], start=0, steps=1), expected)
    assert loader.bad == ({} if error is DOWN else {expected[0][0].ids[0]: UNEXPLAINED})


def test_storage_that_is_down_does_not_make_a_remembered_image_a_broken_one(
    index: Index, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As S3 is, staged here for a moment in which the content of one is looked at."""
    (loader,), expected, left = loaders_of(index, 1), global_batches(index, 1, start=0, steps=1), [DOWN]
    open_file = Index.open

    def look(self: Index, i: int) -> object:
        if left:
            raise left.pop()
        return open_file(self, i)

    monkeypatch.setattr(Index, "open", look)
    monkeypatch.setattr(recover, "DOWN_S", 0)
    loader.bad |= dict.fromkeys(range(300), "said so")
    assert_all_same(read([loader], start=0, steps=1), expected)
    assert not left


@pytest.mark.parametrize("count", [60, pytest.param(500, marks=pytest.mark.exhaustive)])
def test_fuzzed_files_mixed_into_a_set(photographs: Path, tmp_path: Path, count: int) -> None:
    dice = random.Random(count)
    contents = [path.read_bytes() for path in sorted(photographs.glob("*/*.*"))]
    root = tmp_path / "mixed"
    root.mkdir()
    for i in range(2 * count):
        (root / f"{i:04}.jpg").write_bytes(contents[i % len(contents)])
    index = open_index(root, tmp_path / "index")
    for i in range(count):
        content = fuzzed(contents[2 * i % len(contents)], dice.choice(contents), dice)
        (root / f"{2 * i:04}.jpg").write_bytes(content)
    steps = 2 * (len(index) // 32)  # two epochs: what was tried in the first is remembered in the second
    alone = loaders_of(index, 1)
    expected = read(alone, start=0, steps=steps)
    two = loaders_of(index, 2)
    assert_all_same(read(two, start=0, steps=steps), expected)
    planned = np.concatenate([alone[0].plan.micro_batch_at(step, k).ids for step in range(steps) for k in range(4)])
    replaced = set(planned[planned != ids_of(expected)].tolist())
    for loaders in (alone, two):
        assert replaced <= known_to(loaders).keys() <= set(range(0, 2 * count, 2)) and len(replaced) > count // 4
