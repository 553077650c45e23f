"""Whole runs over data in which files have broken since they were indexed."""

import json
import shutil
from collections.abc import Iterable
from pathlib import Path

import pytest
from broken_files import DAMAGES
from launching import numbers, rows, run, tasks

from mixmim_ds.compose import load_config
from mixmim_ds.data.index import Index, open_index
from mixmim_ds.data.plan import order_at
from mixmim_ds.train import bad_images
from mixmim_ds.train.distributed import connected

pytestmark = pytest.mark.slow


@pytest.fixture
def index(photographs: Path, tmp_path: Path) -> Index:
    """Of a copy of the photographs, to be damaged."""
    return open_index(shutil.copytree(photographs, tmp_path / "copy"), tmp_path / "index")


@pytest.fixture
def options(small_run: list[str], index: Index, tmp_path: Path) -> list[str]:
    return [*small_run, f"data.root={index.root}", f"data.index_dir={tmp_path / 'index'}", "precision=fp32"]


def break_files(index: Index, images: Iterable[int]) -> None:
    """Rewrites them in place, which the index does not notice."""
    damages = [damage for name, damage in DAMAGES.items() if name != "truncated"]  # those that no window evades
    for place, i in enumerate(images):
        content = index.path(i).read_bytes()
        index.path(i).write_bytes(damages[place % len(damages)](content))


def told(run_dir: Path) -> list[dict]:
    return [json.loads(line) for line in (run_dir / "failures" / "bad_images.jsonl").read_text().splitlines()]


def error_of(printed: str) -> str:
    """The one line that reports an error."""
    errors = [line for line in printed.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and "Traceback" not in printed, printed
    return errors[0]


def test_broken_files_are_replaced_named_and_counted_whoever_meets_them_and_across_a_resume(
    options: list[str], index: Index, tmp_path: Path
) -> None:
    broken = range(0, 300, 8)
    break_files(index, broken)
    met = set(order_at(0, 0, range(5 * 32), 300).tolist()) & set(broken)
    straight, resumed = tmp_path / "straight", tmp_path / "resumed"
    options = [*options, "data.max_bad_share=0.5"]
    printed = tasks(*options, f"run_dir={straight}", "train.max_steps=5")
    lines = told(straight)
    assert met <= {line["id"] for line in lines} <= set(broken), "and what was read ahead"
    assert len(lines) == len({line["id"] for line in lines})
    assert all(line["image"] == index.name(line["id"]) and line["reason"] for line in lines)
    counts = [row["bad_images"] for row in rows(straight)]
    assert counts == sorted(counts) and 0 < counts[0] < counts[-1] == len(lines)
    first = min(lines[: counts[0]], key=lambda line: line["id"])
    warning = f"{counts[0]} more broken images are replaced, {counts[0]} in all, first {first['image']}"
    assert warning in printed and f"| bad {counts[-1]} |" in printed

    tasks(*options, f"run_dir={resumed}", "train.max_steps=3", processes=1)
    before = told(resumed)
    with (resumed / "failures" / "bad_images.jsonl").open("a") as file:
        file.write('{"id": 7, "image": "killed in the middle of a li')
    tasks(*options, f"run_dir={resumed}", "train.max_steps=5")
    for row, expected in zip(numbers(resumed), numbers(straight), strict=True):
        assert row == pytest.approx(expected, rel=1e-5)  # the same micro-batches, summed in another order
    assert told(resumed)[: len(before)] == before and rows(resumed)[3]["bad_images"] >= len(before)
    assert len(told(resumed)) == len({line["id"] for line in told(resumed)}) == rows(resumed)[-1]["bad_images"]


def test_ranks_know_what_others_and_earlier_starts_have_met(
    options: list[str], index: Index, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Or each would try them all by itself. The other rank is made up."""
    config, bad = load_config([*options, f"run_dir={tmp_path}", "data.max_bad_share=0.01"]), {8: "mine"}
    (tmp_path / "failures").mkdir()
    (tmp_path / "failures" / "bad_images.jsonl").write_text(json.dumps({"id": 7, "image": "x", "reason": "r"}) + "\n")
    monkeypatch.setattr(bad_images, "gather", lambda world, own: [own, {9: "theirs"}])
    with connected(60) as world:
        met = bad_images.BadImages(config, world, index, bad)
        assert bad == {7: "r", 8: "mine"} and met.exchange() == 3
    assert bad == {7: "r", 8: "mine", 9: "theirs"} and [line["id"] for line in told(tmp_path)] == [7, 8, 9]


def test_more_than_the_share_ends_the_run_in_one_line(options: list[str], index: Index, tmp_path: Path) -> None:
    planned = order_at(0, 0, range(2 * 32), 300)
    break_files(index, planned[[3, 20, 40]])
    options = [*options, f"run_dir={tmp_path / 'run'}", "train.max_steps=2"]
    rarely = ["train.log_every=100", "train.save_every=1"]  # what is saved knows them, too
    printed = run("deepspeed", *options, *rarely, "data.max_bad_share=0.006", code=1)
    error = error_of(printed)
    assert "2 of 300 images are broken" in error or "3 of 300 images are broken" in error
    assert "data.max_bad_share=0.006" in error and "failures/bad_images.jsonl" in error
    assert 2 <= len(told(tmp_path / "run")) <= 3 and not (tmp_path / "run" / "checkpoints").exists()
    tasks(*options, "data.max_bad_share=0.01")
    assert rows(tmp_path / "run")[-1]["bad_images"] == 3, "three are not more than 0.01 of 300"


def test_files_unreadable_when_indexed_count_for_the_share(options: list[str], index: Index, tmp_path: Path) -> None:
    """Two of them, left out before training, and one that is met in it."""
    for i in (8, 9):
        index.path(i).rename(index.path(i).with_suffix(".gone"))
        index.path(i).write_text("text")
    options = [*options, f"run_dir={tmp_path / 'run'}", "train.max_steps=1"]
    first = f"first {index.name(8)} (neither JPEG, PNG, WebP nor BMP)"
    error = error_of(tasks(*options, "data.max_bad_share=0.006", processes=1, code=1))
    assert f"2 of 300 images are broken, more than data.max_bad_share=0.006 allows, {first}: repair" in error
    assert not (tmp_path / "run" / "metrics.jsonl").exists()
    again = open_index(index.root, tmp_path / "index")
    break_files(again, order_at(0, 0, range(32), 298)[[3]])
    printed = tasks(*options, "data.max_bad_share=0.007", processes=1, code=1)
    assert f"2 files of data.root are no readable images and left out, {first}" in printed
    assert "3 of 300 images are broken" in error_of(printed) and len(told(tmp_path / "run")) == 1


def test_where_no_file_can_be_read_the_run_ends_in_one_line(options: list[str], index: Index, tmp_path: Path) -> None:
    for i in range(300):
        index.path(i).write_bytes(b"")
    printed = tasks(*options, f"run_dir={tmp_path / 'run'}", processes=1, code=1)
    assert "32 images in a row cannot be decoded" in error_of(printed)
