"""The whole job in minutes: `python launch/demo.py OUT_DIR` (what `make demo` runs).

Cuts real photographs into a data set, pretrains MixMIM tiny on it with DeepSpeed (two CPU processes, or the GPUs that
are there), draws the loss curve and reconstructions, exports the encoder and loads it with timm.
"""

import argparse
import shutil
import subprocess
import sys
from pathlib import Path

import timm
import torch
from matplotlib.figure import Figure
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import mixmim_ds  # noqa: F401  registers the encoder that timm loads below
from mixmim_ds.commands import environment, exit_code, launched, typed_path
from mixmim_ds.config import ROOT
from mixmim_ds.device import gpus
from mixmim_ds.json_lines import read_rows

TRIVIAL = 1.0  # the loss of predicting the mean of each cell, since cells are normalised to variance 1
SMOOTH = 50  # steps that the printed and the drawn loss are averaged over


def call(*command: str) -> None:
    """Runs a command of the project as a user would type it, and shows it."""
    print("$", *(Path(command[0]).name, *command[1:]), flush=True)
    code = subprocess.run(command, cwd=ROOT, env=environment()).returncode
    if code:
        sys.exit(code)


def train(photographs: Path, run_dir: Path) -> None:
    """Pretrains on the photographs; goes on where an interrupted demo stopped."""
    processes = gpus() or 2
    batch = 8 * max(processes, 2)
    options = (
        "model=tiny", f"data.root={photographs}", f"run_dir={run_dir}", f"precision={'bf16' if gpus() else 'fp32'}",
        # Without augmentation, or minutes would not suffice to see something.
        "model.img_size=128", "data.crop_scale=[1,1]", "data.flip=false",
        "train.epochs=11", f"train.global_batch={batch}", "train.micro_batch=8", "train.log_every=10",
        "train.picture_every=250", f"optim.base_lr={1e-3 * 256 / batch}", "optim.warmup_epochs=0.5",
    )  # fmt: skip
    call(*launched("pretrain", *options, processes=processes))


def losses_of(run_dir: Path) -> tuple[list[int], list[float]]:
    """Steps and losses of metrics.jsonl, each loss averaged with those up to SMOOTH steps before it."""
    rows = read_rows(run_dir / "metrics.jsonl")
    steps = [row["step"] for row in rows]
    windows = [[row["loss"] for row in rows if step - SMOOTH < row["step"] <= step] for step in steps]
    return steps, [sum(window) / len(window) for window in windows]


def draw_loss(steps: list[int], losses: list[float], path: Path) -> None:
    """The loss curve and the trivial level, as PNG."""
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    axes.plot(steps, losses, label=f"reconstruction loss, mean of {SMOOTH} steps")
    axes.axhline(TRIVIAL, linestyle="--", color="grey", label="trivial: the mean of each cell")
    axes.set(xlabel="step", ylabel="loss", title="MixMIM tiny on photographs")
    axes.legend()
    figure.savefig(path, dpi=120)


def extract_picture(run_dir: Path, path: Path) -> None:
    """The newest reconstructions that the run wrote into TensorBoard, as PNG."""
    board = EventAccumulator(str(run_dir / "tensorboard"), size_guidance={"images": 0}).Reload()
    path.write_bytes(board.Images("reconstructions")[-1].encoded_image_string)


def main() -> int:
    """Runs the demo and prints where everything is."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=typed_path, help="folder for the photographs, the run and what is drawn from it")
    out = parser.parse_args().out.resolve()
    run_dir, exported = out / "run", out / "timm"
    call(sys.executable, "launch/photographs.py", str(out / "photographs"), "--views", "4")
    train(out / "photographs", run_dir)
    steps, losses = losses_of(run_dir)
    draw_loss(steps, losses, out / "loss.png")
    extract_picture(run_dir, out / "reconstructions.png")
    shutil.rmtree(exported, ignore_errors=True)
    call(sys.executable, "launch/convert.py", str(run_dir), str(exported))
    encoder = timm.create_model(f"local-dir:{exported}", pretrained=True)
    features = encoder(torch.zeros(1, *encoder.pretrained_cfg["input_size"])).shape[1]
    print(f"""
loss              {losses[0]:.3f} -> {losses[-1]:.3f} at step {steps[-1]:,}; trivial: {TRIVIAL}, the mean of each cell
loss curve        {out / "loss.png"}
reconstructions   {out / "reconstructions.png"}
run folder        {run_dir}   (tensorboard --logdir {run_dir})
timm model        {exported}   ({features} features; timm.create_model("local-dir:{exported}", pretrained=True))""")
    return 0


if __name__ == "__main__":
    sys.exit(exit_code(main))
