"""What evaluations look at: every image once, shared out by ranks, but for those that are broken."""

import errno
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from broken_files import DAMAGES
from loading import CPU

from mixmim_ds.data import central, recover
from mixmim_ds.data.central import CentralBatches
from mixmim_ds.data.dali import DecodeError, run_pipeline
from mixmim_ds.data.index import Index, open_index
from mixmim_ds.data.loader import Normalise
from mixmim_ds.data.recover import DataFailed
from mixmim_ds.data.s3 import StorageDown

NORMALISE = Normalise([0.5] * 3, [0.5] * 3, CPU)


@pytest.fixture
def index(labelled: Path, tmp_path: Path) -> Index:
    """Of a copy of the 73 images to judge by, to be damaged."""
    return open_index(shutil.copytree(labelled / "val", tmp_path / "copy"), tmp_path / "index")


def batches_of(
    index: Index, batch: int, rank: int = 0, size: int = 1, broken: dict[int, str] | None = None
) -> CentralBatches:
    return CentralBatches(index, 32, NORMALISE, CPU, 1, batch, rank, size, broken)


def seen_by(batches: CentralBatches) -> dict[int, torch.Tensor]:
    """The pixels of each row, which is there once."""
    seen = [(row, image) for images, rows in batches for row, image in zip(rows.tolist(), images, strict=False)]
    assert len({row for row, _ in seen}) == len(seen)
    return dict(seen)


@pytest.mark.parametrize("size", [1, 2, 3, 5])
def test_ranks_share_out_the_same_batches(index: Index, size: int) -> None:
    """73 images in batches of 16: five, of which the last has nine."""
    alone = list(batches_of(index, 16))
    assert [rows.tolist() for _, rows in alone] == [list(range(k, min(k + 16, 73))) for k in range(0, 73, 16)]
    for rank in range(size):
        own = list(batches_of(index, 16, rank, size))
        for (pixels, rows), (expected, numbers) in zip(own, alone[rank::size], strict=True):
            assert torch.equal(pixels, expected) and rows.tolist() == numbers.tolist()


@pytest.mark.parametrize(("batch", "size"), [(8, 1), (8, 3), (16, 2), (1, 2), (100, 1)])
def test_broken_images_are_left_out_and_named_for_any_batch_and_number_of_ranks(
    index: Index, batch: int, size: int
) -> None:
    """Among them the first, the last, and a whole batch of eight."""
    whole = seen_by(batches_of(index, 16))
    broken = [0, 5, *range(16, 24), 40, 72]
    ways = [damage for name, damage in DAMAGES.items() if name != "truncated"]  # which decodes if it is long enough
    for i, row in enumerate(broken):
        index.path(row).write_bytes(ways[i % len(ways)](index.path(row).read_bytes()))
    index.path(41).unlink()
    ranks = [batches_of(index, batch, rank, size) for rank in range(size)]
    seen = {row: image for each in ranks for row, image in seen_by(each).items()}
    assert sorted(seen) == [row for row in range(73) if row not in [*broken, 41]]
    assert all(torch.equal(image, whole[row]) for row, image in seen.items())
    left_out = dict(each for rank in ranks for each in rank.left_out)
    assert sorted(left_out) == sorted(index.name(row) for row in [*broken, 41]) and all(left_out.values())
    assert left_out[index.name(41)] == "No such file or directory"


def test_what_is_known_to_be_broken_fails_no_batch_again_until_it_is_mended(
    index: Index, monkeypatch: pytest.MonkeyPatch
) -> None:
    failures = []

    def run(*arguments: object) -> torch.Tensor:
        try:
            return run_pipeline(*arguments)
        except DecodeError:
            failures.append(1)
            raise

    monkeypatch.setattr(central, "run_pipeline", run)
    whole, known = index.path(40).read_bytes(), {}
    for row in (0, 40):
        index.path(row).write_bytes(b"text")
    for times, told in ((2, [0, 40]), (0, [])):
        failures.clear()
        batches = batches_of(index, 16, broken=known)
        assert len(seen_by(batches)) == 71 and len(failures) == times and sorted(known) == [0, 40]
        assert [name for name, _ in batches.left_out] == [index.name(row) for row in told]
    index.path(40).write_bytes(whole)
    assert 40 in seen_by(batches_of(index, 16, broken=known)) and sorted(known) == [0]


@pytest.mark.parametrize("error", [DecodeError("I/O error"), StorageDown(errno.EIO, "S3 answers 503", "s3://b/k")])
@pytest.mark.parametrize("blips", [1, 2, 3])
def test_what_fails_for_a_moment_is_tried_again(
    error: Exception, blips: int, index: Index, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected, turns = seen_by(batches_of(index, 16)), iter(range(100))

    def run(*arguments: object) -> torch.Tensor:
        if 2 <= next(turns) < 2 + blips:
            raise error
        return run_pipeline(*arguments)

    monkeypatch.setattr(central, "run_pipeline", run)
    monkeypatch.setattr(recover, "DOWN_S", 0)
    batches = batches_of(index, 16)
    if blips < 3:
        seen = seen_by(batches)
        assert seen.keys() == expected.keys() and all(torch.equal(seen[row], expected[row]) for row in seen)
    else:
        with pytest.raises(DataFailed, match=f"failed 3 times .*{error.args[-1] if len(error.args) == 1 else '503'}"):
            seen_by(batches)
    assert not batches.left_out


def test_where_nothing_decodes_no_image_is_blamed(index: Index) -> None:
    index.root.rename(index.root.with_name("elsewhere"))
    batches = batches_of(index, 16)
    with pytest.raises(
        DataFailed, match=r"no image of the evaluation can be decoded any more, one is .*\(No such file"
    ):
        next(iter(batches))
    assert not batches.left_out


def test_windows_are_central_squares() -> None:
    windows = central.central_windows(np.array([[100, 60], [7, 9], [1, 1]], np.int32), 0.5)
    assert windows.tolist() == [[35, 15, 30, 30], [1, 2, 4, 4], [0, 0, 1, 1]]
