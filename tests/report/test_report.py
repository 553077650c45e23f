"""The page of a run: what it holds, of runs long, broken and half empty; and a browser that opens it."""

import fcntl
import io
import json
import math
import os
import re
import shutil
import subprocess
import time
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from launching import typed
from PIL import Image

from mixmim_ds.evaluate.pictures import Picture
from mixmim_ds.report.curves import POINTS, Curve, nice_ticks, panel, thin
from mixmim_ds.report.page import render
from mixmim_ds.report.pictures import read_pictures
from mixmim_ds.report.story import read_story
from mixmim_ds.train.board import Board

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
EVIL = "<script>alert(1)</script>&\"'.jpg"


class Page(HTMLParser):
    """The tags of a page with their attributes, and its text."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data

    def named(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


@pytest.fixture(scope="module")
def eventful(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a long run to which everything has happened, some of it maliciously named."""
    folder = tmp_path_factory.mktemp("runs") / "eventful"
    (folder / "failures").mkdir(parents=True)
    rows = [
        {"step": 20 * i, "epoch": i / 5, "loss": 1 / i if i != 777 else 9.5, "lr": 1e-3, "grad_norm": 0.5,
         "images_per_s": 900.0, "step_time_s": 0.5, "data_wait": 0.01, "mfu": None, "memory_gib": 40.0}
        for i in range(1, 100_001)
    ]  # fmt: skip
    rows[50_000:50_200] = [row | {"loss": None} for row in rows[50_000:50_200]]
    (folder / "metrics.jsonl").write_text("".join(map("{}\n".format, map(json.dumps, rows))) + '{"step": 2000')
    (folder / "evaluations.jsonl").write_text(
        "".join(
            json.dumps({"step": s, "epoch": s, "top1": s / 10, "knn": 0.5, "top5": 0.5, "loss": 2.0}) + "\n"
            for s in range(4)
        )
    )
    (folder / "train.log").write_text(
        "2026-01-01 10:00:00 mixmim_base | 1,281,167 images | 128 img/process x 8 processes x 2 accumulation = "
        "2048 img/step | 2,000,000 steps, 625 an epoch | peak lr 0.0012 | ZeRO zero1, bf16\n"
        "2026-01-01 11:00:00 the checkpoint of step 1000 cannot be saved (No space left on device)\n"
        "2026-01-02 10:00:00 going on from runs/x/checkpoints/step_00400000\n"
        "2026-01-02 10:00:09 step 2,000,000/2,000,000 | epoch 1 | loss 0.1\n"
        "2026-01-02 10:00:10 done after step 2,000,000; run folder: runs/x\n"
    )
    bad = [{"id": i, "image": EVIL if i == 0 else f"{i}.jpg", "reason": "cut off"} for i in range(300)]
    (folder / "failures" / "bad_images.jsonl").write_text("".join(json.dumps(row) + "\n" for row in bad))
    report = {"step": 4321, "lr": 1e-3, "newest_checkpoint": 4000, "ranks_not_finite": [3, 5], "ranks": []}
    (folder / "failures" / "step_00004321.json").write_text(json.dumps(report))
    (folder / "checkpoints" / "step_00400000.damaged").mkdir(parents=True)
    board = Board(folder / "tensorboard", 0)
    for step in (1, 2, 3, 4, 5):
        pixels = torch.full((3, 64, 96), 40 * step, dtype=torch.uint8).random_(40 * step, 255)
        board.picture(step, Picture("reconstructions", pixels, "columns"))
        board.scalars({"loss": 1.0}, step)
    board.close(finished=True)
    return folder


def test_the_page_of_an_eventful_run_tells_all_of_it_and_runs_nothing(eventful: Path) -> None:
    began = time.process_time()
    html = render(read_story(eventful))
    assert time.process_time() - began < 10 and len(html) < 3e6, "100,000 rows are read in a moment, and thinned"
    page = Page(html)
    for words in (
        "finished", "2,000,000 of 2,000,000", "128 img/process x 8 processes x 2 accumulation = 2048 img/step",
        "cannot be saved (No space left on device)", "200 more are in the run folder", "loss of rank 3, 5",
        "damaged, set aside", "each point of a line is the mean of 100 rows", EVIL, "top-1, validation",
        "went on from step 400,000", "top-1 of 20 neighbours",
    ):  # fmt: skip
        assert words in page.text, words
    assert re.findall(r"<td class=warn>([^<]*)", html) == ["save failed"]
    assert not page.named("script") and not page.named("link")
    sources = [value for _, attributes in page.tags for name, value in attributes.items() if name in ("src", "href")]
    assert len(sources) == 3 and all(source.startswith("data:image/webp;base64,") for source in sources)
    assert "http:" not in html and "https:" not in html and "url(" not in html


def test_thin_curves_keep_means_and_every_peak() -> None:
    rows = [{"step": i, "loss": float(i % 7)} for i in range(12_345)]
    rows[6_000]["loss"] = 99.0
    rows[7_000]["loss"] = None
    points = thin(rows, "loss")
    assert len(points) <= POINTS and max(point.high for point in points) == 99.0
    assert (
        points[0].step == 6
        and points[0].mean == sum(i % 7 for i in range(13)) / 13
        and (points[0].low, points[0].high) == (0, 6)
    )
    assert [point.mean for point in thin(rows[:900], "loss")] == [row["loss"] for row in rows[:900]]
    gone = thin([{"step": i, "loss": {4: None, 5: math.inf}.get(i, 1.0)} for i in range(9)], "loss")
    drawn = panel(Curve("loss", "loss", str), gone, marks=[])
    assert drawn.count("<polyline") == 2 and drawn.count("<circle") == 2, "a gap is no line"
    assert panel(Curve("mfu", "MFU", str), thin(rows, "mfu"), marks=[]) == "", "nothing to draw"


def test_a_curve_goes_from_edge_to_edge_with_its_least_value_at_the_foot() -> None:
    """A panel of 360 x 150, with margins of 46 and 12 beside the curve, 8 above and 22 below it."""
    points = thin([{"step": 100, "loss": 4.0}, {"step": 150, "loss": 3.0}, {"step": 300, "loss": 2.0}], "loss")
    for from_zero, heights in ((False, (8, 68, 128)), (True, (8, 38, 68))):
        drawn = panel(Curve("loss", "loss", str, from_zero), points, marks=[150])
        (line,) = re.findall(r'<polyline class=line points="(.*?)"', drawn)
        found = [tuple(map(float, corner.split(","))) for corner in line.split()]
        assert found == list(zip((46, 121.5, 348), heights, strict=True))
        assert '<line class=mark x1="121.5" x2="121.5"' in drawn


@pytest.mark.parametrize("low, high", [(0, 1), (0.31, 0.32), (0, 2e6), (-5, 3), (1e-9, 2e-9)])
def test_ticks_are_round_and_reach_around(low: float, high: float) -> None:
    ticks = nice_ticks(low, high, 5)
    apart = ticks[1] - ticks[0]
    assert 3 <= len(ticks) <= 8 and ticks[0] < low + apart / 1e6 and ticks[-1] > high - apart / 1e6
    assert f"{apart:.3e}"[:5] in ("1.000", "2.000", "5.000")


def test_pictures_are_the_first_the_middle_and_the_last(eventful: Path) -> None:
    shown = read_pictures(eventful / "tensorboard")
    assert [step for step, _ in shown] == [1, 3, 5] and all(webp[8:12] == b"WEBP" for _, webp in shown)
    (file,) = (eventful / "tensorboard").iterdir()
    whole, copy = file.read_bytes(), eventful.parent / "killed"
    copy.mkdir()
    (copy / file.name).write_bytes(whole[: len(whole) // 2])
    assert 1 <= len(read_pictures(copy)) < 3, "half a file of a killed run is read to its break"
    board = Board(copy, 0)
    board.picture(1, Picture("reconstructions", torch.full((3, 64, 96), 9, dtype=torch.uint8).random_(10), "columns"))
    board.close(finished=True)
    (step, webp), *_ = read_pictures(copy)
    assert step == 1 and Image.open(io.BytesIO(webp)).convert("L").getextrema()[1] < 40, "the one drawn later"


def test_a_half_empty_folder_and_a_run_at_work_are_told_as_they_are(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("model: {encoder: mixmim_base}\n")
    assert read_story(tmp_path).state == "ended"
    assert "No step has been reported yet" in render(read_story(tmp_path))
    with (tmp_path / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert read_story(tmp_path).state == "running"
        rows = [{"step": 60, "step_time_s": 1.0}, {"step": 120, "step_time_s": 2.0}]
        (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        (tmp_path / "train.log").write_text("2026-01-01 09:00:00 step 120/300 | epoch 1 | loss 0.1\n")
        told = Page(render(read_story(tmp_path))).text
        assert "0 h 03 mintime in training" in told and "0 h 06 minto go, at this rate" in told
    log = ""
    for words, state in (
        ("stopped after step 7; run folder: x", "stopped"),
        ("mixmim_tiny | 300 images | 32 img/step | 9 steps, 9 an epoch | peak lr 1 | x", "ended"),
        ("error: x", "failed"),
        ("this run has already done its steps", "finished"),
    ):
        log += f"2026-01-01 10:00:00 {words}\n"
        (tmp_path / "train.log").write_text(log)
        assert read_story(tmp_path).state == state


def test_of_many_starts_the_newest_are_shown(tmp_path: Path) -> None:
    (tmp_path / "environment.json").write_text(json.dumps([{"started": f"day {day}."} for day in range(150)]))
    told = Page(render(read_story(tmp_path))).text
    assert "day 149." in told and "day 50." in told and "day 49." not in told and "50 older are in" in told


def test_names_that_are_no_utf8_are_told_with_their_bytes(tmp_path: Path) -> None:
    """A run met such an image: its row in JSON holds what a name is in Python."""
    (tmp_path / "config.yaml").write_text("model: {encoder: mixmim_base}\n")
    (tmp_path / "failures").mkdir()
    row = {"step": 3, "image": os.fsdecode(b"caf\xe9.jpg"), "reason": "cut off"}
    (tmp_path / "failures" / "bad_images.jsonl").write_text(json.dumps(row) + "\n")
    done = typed("launch/report.py", tmp_path)
    assert done.returncode == 0, done.stderr
    assert r"caf\udce9.jpg" in (tmp_path / "report.html").read_text()


def test_the_command_reports_a_real_run_into_its_folder_again_and_again(twenty: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(twenty, run, ignore=shutil.ignore_patterns("checkpoints"))
    for _ in range(2):
        done = typed("launch/report.py", run)
        assert done.returncode == 0, done.stderr
    page = Page((run / "report.html").read_text())
    assert "20 of 20" in page.text and "mixmim_tiny" in page.text and "launch/pretrain.py" in page.text
    assert len(page.named("svg")) == 6, "loss, lr, gradient norm, images per second, data, memory"


def test_a_mistake_is_one_sentence(twenty: Path, tmp_path: Path) -> None:
    (tmp_path / "thesis.html").write_text("<html>my own")
    for words, sentence in (
        ([tmp_path / "nowhere"], f"RUN_DIR={tmp_path / 'nowhere'} holds no run"),
        ([tmp_path], f"RUN_DIR={tmp_path} holds no run"),
        ([twenty, tmp_path / "thesis.html"], "exists and is no report"),
        ([twenty, tmp_path / "no" / "folder.html"], "cannot be written (No such file or directory)"),
    ):
        done = typed("launch/report.py", *words)
        assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
        assert done.stderr.startswith("error: ") and sentence in done.stderr
    assert (tmp_path / "thesis.html").read_text() == "<html>my own" and len(list(tmp_path.iterdir())) == 1


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here to open a report with and see that nothing is missing")
def test_a_browser_opens_the_page_without_an_error_or_a_request(eventful: Path, tmp_path: Path) -> None:
    (tmp_path / "report.html").write_text(
        render(read_story(eventful)).replace(
            "</body>",
            # Told in the page, for the log of a headless browser holds much that is no page's.
            "<p id=told></p><script>onload = () => told.textContent = `told ${performance.getEntriesByType('resource')"
            ".filter(each => !each.name.startsWith('data:')).length} requests, ${[...document.images].filter(each => "
            "each.complete && each.naturalWidth > 0).length} pictures, ${document.querySelectorAll('svg polyline')"
            ".length} lines, ${document.documentElement.scrollWidth <= innerWidth ? 'fits' : 'too wide'}`</script>"
            "</body>",
        )
    )
    command = [
        CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}",
        "--host-resolver-rules=MAP * ~NOTFOUND", "--window-size=900,1200", "--virtual-time-budget=1000",
        "--enable-logging=stderr", "--dump-dom",
        (tmp_path / "report.html").as_uri(),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    (told,) = re.findall(r"<p id=\"told\">(.*?)</p>", done.stdout)
    assert told == "told 0 requests, 3 pictures, 11 lines, fits"
    assert "CONSOLE" not in done.stderr, done.stderr
