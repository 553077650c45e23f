"""The page: one HTML file that needs nothing else, neither a network nor a script."""

import base64
import re
from html import escape
from importlib.resources import files
from typing import Any

from mixmim_ds.evaluate.pictures import COLUMNS
from mixmim_ds.json_lines import Row
from mixmim_ds.report.curves import Curve, panel, rows_of_a_point, thin
from mixmim_ds.report.pictures import read_pictures
from mixmim_ds.report.story import Story

GENERATOR = '<meta name="generator" content="mixmim_ds report">'  # by which a page of ours is known again
MOST = 100  # rows of a table
# The first line of every start: model | images | batch | steps | peak lr | engine
HEAD = re.compile(r"\S+ \| ([\d,]+) images \| (.+ img/step) \| ([\d,]+) steps, [\d,]+ an epoch \| peak lr (\S+) \| ")
CURVES = (
    Curve("loss", "loss", lambda v: f"{v:.4g}", from_zero=False, size=(1120, 260)),
    Curve("lr", "learning rate", lambda v: f"{v:.3g}"),
    Curve("grad_norm", "gradient norm", lambda v: f"{v:.3g}"),
    Curve("images_per_s", "images per second", lambda v: f"{v:,.0f}"),
    Curve("data_wait", "waiting for data", lambda v: f"{v:.1%}"),
    Curve("memory_gib", "memory, GiB", lambda v: f"{v:.3g}"),
    Curve("mfu", "MFU", lambda v: f"{v:.1%}"),
)
EVALUATIONS = (
    Curve("knn", "top-1 of 20 neighbours", lambda v: f"{v:.4g}", from_zero=False),
    Curve("top1", "top-1, validation", lambda v: f"{v:.4g}", from_zero=False),
    Curve("top5", "top-5, validation", lambda v: f"{v:.4g}", from_zero=False),
    Curve("loss", "loss, validation", lambda v: f"{v:.4g}", from_zero=False),
)
KINDS = {
    "error: ": "failed", " img/step | ": "start", "going on from ": "went on", "starting anew ": "went on",
    "done after ": "finished", "stopped after ": "stopped", " cannot be saved ": "save failed",
    "broken images are replaced": "broken images", " is not finite ": "bad step", " is set aside ": "damaged",
    " cannot be written ": "disk",
}  # fmt: skip
WARNINGS = {"save failed", "broken images", "bad step", "damaged", "disk", "failed"}
STATES = {
    "finished": "has done all its steps",
    "stopped": "stopped on request with everything saved; the same command goes on",
    "running": "is at work",
    "failed": "failed; the last line of what happened says why",
    "ended": "ended without a word: killed, most likely; the same command goes on",
}


def render(story: Story) -> str:
    """The whole page."""
    style = files("mixmim_ds.report").joinpath("page.css").read_text()
    name = escape(story.run_dir.resolve().name)
    return "\n".join(
        [
            f'<!doctype html><html lang="en"><head><meta charset="utf-8">{GENERATOR}',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<title>{name}: {story.state} at step {story.step:,}</title><style>{style}</style></head><body><main>",
            _header(story, name),
            _tiles(story),
            _section("What the run is", _facts(story)),
            _section("Curves", _curves(story)),
            _section("Reconstructions", _pictures(story)),
            _section("What happened", _events(story)),
            _section("Starts", _starts(story)),
            _section("Broken images", _bad_images(story)),
            _section("Steps that were not finite", _bad_steps(story)),
            _section("Checkpoints kept", _table(("name", "content"), [list(pair) for pair in story.checkpoints])),
            "</main></body></html>\n",
        ]
    )


def _section(title: str, content: str) -> str:
    return f"<section><h2>{title}</h2>{content}</section>" if content else ""


def _header(story: Story, name: str) -> str:
    done = story.step / story.last if story.last else 0
    bar = f'<div class=bar><i style="width:{min(done, 1):.1%}"></i></div>' if story.last else ""
    return (
        f'<header><h1>{name}</h1><span class="state {story.state}">{story.state}</span>'
        f"<p>The run {STATES[story.state]}.</p>{bar}</header>"
    )


def _tiles(story: Story) -> str:
    """The numbers of the newest row."""
    if not story.rows:
        return "<p>No step has been reported yet.</p>"
    row, before = story.rows[-1], [0, *(row["step"] for row in story.rows)]
    seconds = sum((r["step"] - b) * (r.get("step_time_s") or 0) for r, b in zip(story.rows, before, strict=False))
    tiles = [
        ("step", f"{story.step:,}" + (f" of {story.last:,}" if story.last else "")),
        ("epoch", f"{row.get('epoch', 0):.2f}"),
        ("loss", "not finite" if row.get("loss") is None else f"{row['loss']:.4f}"),
        ("images per second", f"{row.get('images_per_s', 0):,.0f}"),
        ("time in training", _duration(seconds)),
    ]
    if story.state == "running" and story.last:
        tiles.append(("to go, at this rate", _duration((story.last - story.step) * row.get("step_time_s", 0))))
    return "<div class=tiles>" + "".join(f"<div><b>{value}</b>{what}</div>" for what, value in tiles) + "</div>"


def _duration(seconds: float) -> str:
    minutes = int(seconds / 60 + 0.5)
    return f"{minutes // 60} h {minutes % 60:02d} min" if minutes else f"{seconds:.0f} s"


def _curves(story: Story) -> str:
    marks = [int(found[1]) for _, words in story.events if (found := re.search(r"going on from .*step_(\d+)", words))]
    panels = [
        panel(curve, thin(rows, curve.key), marks)
        for curves, rows in ((CURVES, story.rows), (EVALUATIONS, story.evaluations))
        for curve in curves
    ]
    if not any(panels):
        return ""
    size = rows_of_a_point(len(story.rows))
    said = f"All {len(story.rows):,} rows of metrics.jsonl are drawn." if size == 1 else (
        f"{len(story.rows):,} rows of metrics.jsonl: each point of a line is the mean of {size:,} rows, the band "
        "around it reaches from the least to the greatest of them."
    )  # fmt: skip
    if marks:
        said += " Dashed lines: where the run went on after a break."
    return f"<div class=panels>{''.join(panels)}</div><p class=small>{said}</p>"


def _pictures(story: Story) -> str:
    shown = read_pictures(story.run_dir / "tensorboard")
    spans = "".join(f"<span>{escape(column)}</span>" for column in COLUMNS.split(" | "))
    heads = "" if "init" in story.options else f"<div class=columns>{spans}</div>"
    return "".join(
        f"<h3>step {step:,}</h3>{heads}"
        f'<img alt="pictures at step {step}" src="data:image/webp;base64,{base64.b64encode(webp).decode()}">'
        for step, webp in shown
    )


def _facts(story: Story) -> str:
    get = story.options.get
    head = next((found for _, words in reversed(story.events) if (found := HEAD.match(words))), None)
    images, batch, steps, peak = head.groups() if head else (None,) * 4
    stage = story.engine.get("zero_optimization", {}).get("stage")
    facts: dict[str, list[Any]] = {
        "model": [get("model.encoder"), _with("{} pixels", get("model.img_size")),
                  _with("mask ratio {}", get("model.mask_ratio"))],
        "data": [get("data.kind"), get("data.root"), _with("{} images", images),
                 _with("fingerprint {:.12}", get("data.fingerprint"))],
        "batch": [batch or _with("{} images a step", get("train.global_batch"))],
        "steps": [_with("{} steps", steps), _with("{} epochs", get("train.epochs"))],
        "learning rate": [_with("peak {}", peak), _with("{} per 256 images", get("optim.base_lr")),
                          _with("{} epochs of warm-up", get("optim.warmup_epochs"))],
        "precision": [get("precision")],
        "engine": [_with("ds={}", get("ds")), _with("ZeRO {}", stage),
                   _with("activation checkpointing {}", get("activation_checkpointing"))],
        "seed": [get("train.seed")],
        "folder": [story.run_dir],
    }  # fmt: skip
    known = {name: [escape(str(part)) for part in parts if part is not None] for name, parts in facts.items()}
    rows = "".join(f"<div><dt>{name}<dd>{', '.join(parts)}</div>" for name, parts in known.items() if parts)
    options = "\n".join(f"{name}={value}" for name, value in story.options.items())
    return f"<dl>{rows}</dl><details><summary>all options</summary><pre>{escape(options)}</pre></details>"


def _with(words: str, value: Any) -> str | None:
    return None if value is None else words.format(value)


def _events(story: Story) -> str:
    rows = []
    for time, words in story.events:
        kind = next((kind for fragment, kind in KINDS.items() if fragment in words), "note")
        rows.append([time, kind, words])
    return _table(("time", "what", "as train.log says it"), rows, newest=True)


def _starts(story: Story) -> str:
    rows = []
    for start in story.starts:
        versions = ", ".join(f"{package} {number}" for package, number in (start.get("versions") or {}).items())
        hosts, command = start.get("hosts") or [], start.get("command") or []
        named = ", ".join(f"{host} x {hosts.count(host)}" for host in dict.fromkeys(hosts))
        rows.append([start.get("started"), named, start.get("device"), start.get("git"), versions, " ".join(command)])
    return _table(("started", "host x processes", "device", "git", "versions", "command"), rows, newest=True)


def _bad_images(story: Story) -> str:
    return _table(("image", "reason"), [[row.get("image"), row.get("reason")] for row in story.bad_images])


def _bad_steps(story: Story) -> str:
    rows = [
        [row.get("step"), row.get("lr"), _ranks(row), row.get("newest_checkpoint")] for row in story.bad_steps if row
    ]
    return _table(("step", "lr", "not finite", "newest checkpoint"), rows)


def _ranks(row: Row) -> str:
    ranks = row.get("ranks_not_finite")
    return f"loss of rank {', '.join(map(str, ranks))}" if ranks else "gradient"


def _table(heads: tuple[str, ...], rows: list[list[Any]], newest: bool = False) -> str:
    """At most MOST rows, the first or the newest, or nothing where there is none."""
    if not rows:
        return ""
    shown = rows[-MOST:] if newest else rows[:MOST]
    body = "".join(f"<tr>{''.join(map(_cell, row))}" for row in shown)
    left = f"<p class=small>{len(rows) - MOST:,} {'older' if newest else 'more'} are in the run folder.</p>"
    head = "".join(f"<th>{name}" for name in heads)
    return f"<div class=wide><table><tr>{head}{body}</table></div>{left if len(rows) > MOST else ''}"


def _cell(content: Any) -> str:
    warning = " class=warn" if content in WARNINGS else ""
    return f"<td{warning}>{'' if content is None else escape(str(content))}"
