"""The pieces that `make demo` adds to commands tested elsewhere; the demo itself takes minutes and is run by hand."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
from launching import ROOT, run
from omegaconf import OmegaConf

import mixmim_ds  # noqa: F401  registers the encoders

pytestmark = pytest.mark.slow


def convert(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "launch/convert.py", *arguments], cwd=ROOT, capture_output=True, text=True, timeout=120
    )


def test_a_run_of_two_processes_becomes_a_timm_model(photographs: Path, tmp_path: Path) -> None:
    """Under ZeRO-3 every process holds a part of each weight, so a wrong gathering would show."""
    folder, out = tmp_path / "run", tmp_path / "timm"
    run(
        "deepspeed", "model=tiny", f"data.root={photographs}", f"data.index_dir={tmp_path / 'index'}",
        f"run_dir={folder}", "model.img_size=64", "train.global_batch=16", "train.micro_batch=8", "train.max_steps=2",
        "optim.warmup_epochs=0", "ds=zero3", "precision=fp32",
    )  # fmt: skip
    done = convert(str(folder), str(out))
    assert done.returncode == 0, done.stderr
    encoder = timm.create_model(f"local-dir:{out}", pretrained=True)
    assert encoder(torch.randn(2, 3, 64, 64)).shape == (2, 256)
    config = json.loads((out / "config.json").read_text())
    assert config["architecture"] == "mixmim_tiny" and config["pretrained_cfg"]["input_size"] == [3, 64, 64]
    torch.manual_seed(OmegaConf.load(folder / "config.yaml").train.seed)
    initial = timm.create_model("mixmim_tiny", img_size=64, num_classes=0).state_dict()
    moved = [(encoder.state_dict()[name] - value).abs().max().item() for name, value in initial.items()]
    assert 0 < max(moved) < 1e-3, "the weights of the seed, after two small steps"
    again = convert(str(folder), str(out))
    assert again.returncode == 2 and again.stderr.splitlines()[-1].startswith("error: ") and str(out) in again.stderr
    nothing = convert(str(tmp_path), str(tmp_path / "other"))
    assert nothing.returncode == 2 and "no complete checkpoint" in nothing.stderr
