"""launch/pretrain.py, which at its checkpoint also writes down the live weights, as DeepSpeed itself gathers them."""

import sys
from pathlib import Path

import torch
from deepspeed.runtime.zero import GatheredParameters
from deepspeed.utils import safe_get_full_fp32_param

from mixmim_ds.config import load_config
from mixmim_ds.train import checkpoint
from mixmim_ds.train.pretrain import pretrain

write = checkpoint.Saver._write


def write_and_tell(saver: checkpoint.Saver, step: int) -> None:
    write(saver, step)
    engine, config = saver.engine, saver.config
    named = dict(engine.module.named_parameters())
    masters = {name: safe_get_full_fp32_param(parameter).clone() for name, parameter in named.items()}
    with GatheredParameters(list(named.values()), enabled=config.ds.startswith("zero3")):
        working = {name: parameter.detach().clone() for name, parameter in named.items()}
    if saver.world.first:
        torch.save((masters, working), Path(config.run_dir) / "live.pt")


checkpoint.Saver._write = write_and_tell
sys.exit(pretrain(load_config([word for word in sys.argv[1:] if not word.startswith("--local_rank")])))
