"""Does the pretraining pay? `python launch/evidence.py OUT_DIR` (what `make evidence` runs).

MixMIM tiny is pretrained on pictures of Fashion-MNIST without their labels (launch/pictures.py). What it is worth is
measured where few pictures are labelled, against random weights: by the nearest neighbours of frozen features, by a
linear classifier on them, and by fine-tuning; everything with three seeds. `--ablations` changes one part of the method
at a time and probes what came out. OUT_DIR gets evidence.json, evidence.md (the tables), evidence.png and all runs.

A job that is done is not repeated and one that was interrupted goes on, so the same command continues.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from matplotlib.figure import Figure
from tqdm import tqdm

from mixmim_ds.commands import environment, exit_code, launched, typed_path
from mixmim_ds.config import ROOT
from mixmim_ds.device import gpus
from mixmim_ds.json_lines import read_rows

SEEDS = (0, 1, 2)
UNLABELLED, LABELLED, ASKED = 20_000, 1_000, 2_000  # pictures to pretrain on, to learn classes from, to tell
SIZE = 64  # pixels, of pictures of 28: 2 x 2 cells of the mask
MODEL = ("model=tiny", f"model.img_size={SIZE}", "precision=fp32")
PRETRAINING = (
    *MODEL, "train.epochs=5", "train.global_batch=32", "train.micro_batch=16", "train.save_every=500",
    "optim.base_lr=3.2e-3", "optim.warmup_epochs=0.2", "data.crop_scale=[0.5,1]",
)  # fmt: skip
FINETUNING = (
    *MODEL, "train.epochs=120", "train.global_batch=64", "train.micro_batch=32", "eval_every=20", "optim.base_lr=4e-3",
    "optim.ema_decay=0.995", "data.crop_scale=[0.6,1]",
    "augment.rand_augment=null", "augment.mixup=0", "augment.cutmix=0", "augment.erase=0",
)  # fmt: skip
LAYER_DECAY = {"random": 1.0, "pretrained": 0.75}  # first layers that nothing has taught must learn as fast as the last
SHORT = "train.epochs=2"  # of each ablation, and of what it is compared with
ABLATIONS: dict[str, tuple[str, ...]] = {
    "the method": ("method",),
    "attention across both images": ("attention", "model.group_attention=false"),
    "one reconstruction of two": ("single", "model.dual_reconstruction=false"),
    "pixels not normalised": ("pixels", "model.norm_pix_loss=false"),
    "mask ratio 0.25": ("mask25", "model.mask_ratio=0.25"),
    "mask ratio 0.75": ("mask75", "model.mask_ratio=0.75"),
}
PROBES = {"knn": "nearest neighbours", "linear": "linear classifier"}
TUNED = "fine-tuning"
WEIGHTS = ("random", "pretrained")


@dataclass(frozen=True)
class Job:
    """A command of the project as a user would type it."""

    name: str  # of its log, and of the run it makes
    words: tuple[str, ...]
    minutes: float  # on two idle cores, for the time left


def typed(script: str, *words: object) -> tuple[str, ...]:
    """The words of a command that runs in one process."""
    return (sys.executable, f"launch/{script}.py", *map(str, words))


def in_two(script: str, *words: object) -> tuple[str, ...]:
    """The words of a command that DeepSpeed starts on two processes, or on as many GPUs of two as there are."""
    return launched(script, *words, processes=min(gpus(), 2) or 2)


def probe(out: Path, name: str, *source: object) -> Job:
    """Probes the frozen features of an encoder."""
    return Job(f"probe_{name}", typed("probe", *source, "--data", out / "labelled", "--img-size", SIZE), 0.5)


def pretrain(out: Path, name: str, seed: int, minutes: float, *changes: str) -> list[Job]:
    """Pretrains with a seed, and probes the encoder."""
    where = f"data.root={out / 'pictures' / 'train'}", f"run_dir={out / name}", f"train.seed={seed}"
    return [Job(name, in_two("pretrain", *PRETRAINING, *where, *changes), minutes), probe(out, name, out / name)]


def finetune(out: Path, weights: str, seed: int) -> Job:
    """Fine-tunes the encoder pretrained with the same seed, or random weights."""
    init = "random" if weights == "random" else out / f"pretrained_{seed}"
    name = f"finetuned_{weights}_{seed}"
    words = f"init={init}", f"data.root={out / 'labelled'}", f"run_dir={out / name}", f"train.seed={seed}"
    decay = f"optim.layer_decay={LAYER_DECAY[weights]}"
    return Job(name, in_two("finetune", *FINETUNING, decay, *words), 4)


def plan(out: Path, ablations: bool) -> list[Job]:
    """All jobs, in the order in which they can be done."""
    asked = "--val", ASKED
    jobs = [
        Job("pictures", typed("pictures", out / "pictures", "--train", UNLABELLED, *asked), 0.2),
        Job("labelled", typed("pictures", out / "labelled", "--train", LABELLED, *asked), 0.1),
    ]
    if ablations:
        return jobs + [
            job for name, *change in ABLATIONS.values() for job in pretrain(out, name, SEEDS[0], 2.5, SHORT, *change)
        ]
    for seed in SEEDS:
        jobs += pretrain(out, f"pretrained_{seed}", seed, 5)
    for seed in SEEDS:
        jobs.append(probe(out, f"random_{seed}", "random:tiny", "--seed", seed))
        jobs += [finetune(out, weights, seed) for weights in WEIGHTS]
    return jobs


def is_done(out: Path, job: Job) -> bool:
    """Tells whether this very command has come to its end."""
    marker = out / "done" / f"{job.name}.json"
    return marker.is_file() and json.loads(marker.read_text())["command"] == list(job.words)


def follow(job: Job, log: Path, bar: "tqdm[NoReturn]", end: float) -> int:
    """Runs a job and moves the bar up to `end` (minutes) meanwhile; returns the exit code."""
    with log.open("a") as file:
        process = subprocess.Popen(job.words, cwd=ROOT, env=environment(), stdout=file, stderr=subprocess.STDOUT)
        while True:
            try:
                return process.wait(1)
            except subprocess.TimeoutExpired:
                bar.update(min(1 / 60, end - bar.n))


def work_off(out: Path, jobs: list[Job]) -> None:
    """Does what is not done yet; the bar shows the time left. A job that fails ends the program with its exit code."""
    for name in ("logs", "done"):
        (out / name).mkdir(parents=True, exist_ok=True)
    due = [job for job in jobs if not is_done(out, job)]
    left = "{desc}: {percentage:3.0f}% |{bar}| {elapsed} gone, {remaining} left"
    with tqdm(total=sum(job.minutes for job in due), bar_format=left, smoothing=0, disable=None) as bar:
        end = 0.0
        for job in due:
            bar.set_description(job.name)
            log, start, end = out / "logs" / f"{job.name}.log", time.monotonic(), end + job.minutes
            code = follow(job, log, bar, end)
            if code:
                print(f"error: {job.name} failed: {log} says why; the same command goes on from here.", file=sys.stderr)
                sys.exit(code)
            bar.update(end - bar.n)
            taken = {"command": job.words, "minutes": round((time.monotonic() - start) / 60, 2)}
            (out / "done" / f"{job.name}.json").write_text(json.dumps(taken))


def probed(out: Path, name: str) -> dict[str, float]:
    """Top-1 of an encoder by what was probed."""
    last = (out / "logs" / f"probe_{name}.log").read_text().splitlines()[-1]
    return {title: json.loads(last)[key] for key, title in PROBES.items()}


def evaluations(out: Path, weights: str, seed: int) -> list[dict[str, float]]:
    """The rows of a fine-tuning, one each time that it was judged."""
    return read_rows(out / f"finetuned_{weights}_{seed}" / "evaluations.jsonl")


def measure(out: Path, weights: str) -> list[dict[str, float]]:
    """Top-1 by measure, a row a seed; of fine-tuning the last, for choosing the best would be peeking."""
    return [
        probed(out, f"{weights}_{seed}") | {TUNED: evaluations(out, weights, seed)[-1]["top1"]} for seed in SEEDS
    ]  # fmt: skip


def percent(values: list[float]) -> str:
    """One value, or mean and standard deviation."""
    each = f" ± {100 * statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{100 * statistics.mean(values):.1f}{each}"


def gain_table(found: dict[str, list[dict[str, float]]]) -> str:
    """What pretraining gives, as markdown; the gain is that of the same seed."""
    lines = [f"| top-1, %, of {ASKED:,} pictures | random weights | pretrained | gain |", "|---|---|---|---|"]
    for title in found["random"][0]:
        random, pretrained = ([row[title] for row in found[weights]] for weights in WEIGHTS)
        gains = [after - before for before, after in zip(random, pretrained, strict=True)]
        lines.append(f"| {title} | {percent(random)} | {percent(pretrained)} | {percent(gains)} |")
    return "\n".join(lines)


def ablation_table(found: dict[str, list[dict[str, float]]]) -> str:
    """What the parts of the method give, as markdown: a line for each pretraining."""
    titles = list(next(iter(found.values()))[0])
    lines = [f"| top-1, % | {' | '.join(titles)} |", "|---" * (len(titles) + 1) + "|"]
    for name, rows in found.items():
        lines.append(f"| {name} | {' | '.join(percent([row[title] for row in rows]) for title in titles)} |")
    return "\n".join(lines)


def draw(out: Path, found: dict[str, list[dict[str, float]]]) -> None:
    """Bars of all measures, and how fine-tuning came there, as PNG."""
    figure = Figure(figsize=(10, 3.8), layout="constrained")
    bars, curves = figure.subplots(1, 2)
    titles = list(found["random"][0])
    for weights, colour, shift in zip(WEIGHTS, ("0.6", "tab:blue"), (-0.19, 0.19), strict=True):
        columns = [[100 * row[title] for row in found[weights]] for title in titles]
        means, errors = (
            [statistics.mean(values) for values in columns],
            [statistics.stdev(values) for values in columns],
        )
        places = [place + shift for place in range(len(titles))]
        bars.barh(places, means, 0.36, xerr=errors, color=colour, label=weights)
        for seed in SEEDS:
            rows = evaluations(out, weights, seed)
            curves.plot([row["epoch"] for row in rows], [100 * row["top1"] for row in rows], color=colour)
    bars.set_yticks(range(len(titles)), titles)
    bars.set(xlabel="top-1, %", xlim=(0, 100), title=f"{LABELLED:,} labelled pictures, {len(SEEDS)} seeds")
    bars.invert_yaxis()
    figure.legend(loc="outside lower center", ncols=2)
    curves.set(xlabel="epoch", ylabel="top-1, %", title=TUNED)
    figure.savefig(out / "evidence.png", dpi=120)


def report(out: Path, name: str, found: dict[str, list[dict[str, float]]], text: str) -> None:
    """Writes numbers and table, and prints them."""
    (out / f"{name}.json").write_text(json.dumps(found, indent=2) + "\n")
    (out / f"{name}.md").write_text(text + "\n")
    print(f"{text}\n\nwritten into {out}: {name}.json, {name}.md")


def main() -> int:
    """Does the experiment and writes what came out. ValueError on a user's mistake."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "out", type=typed_path, metavar="OUT_DIR", help="folder for the pictures, the runs and the evidence"
    )
    parser.add_argument("--ablations", action="store_true", help="the parts of the method, instead of what it gives")
    arguments = parser.parse_args()
    out = arguments.out.resolve()
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"OUT_DIR: {out} cannot be made ({error.strerror}); name another.") from error
    work_off(out, plan(out, arguments.ablations))
    if arguments.ablations:
        found = {title: [probed(out, name)] for title, (name, *_) in ABLATIONS.items()}
        report(out, "ablations", found, ablation_table(found))
    else:
        found = {weights: measure(out, weights) for weights in WEIGHTS}
        report(out, "evidence", found, gain_table(found))
        draw(out, found)
    return 0


if __name__ == "__main__":
    sys.exit(exit_code(main))
