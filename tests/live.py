"""launch/pretrain.py, which also writes down what no checkpoint tells: the images of every step (ids.jsonl) and, at the
checkpoint, the live weights as DeepSpeed itself gathers them (live.pt)."""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from deepspeed.runtime.zero import GatheredParameters
from deepspeed.utils import safe_get_full_fp32_param

from mixmim_ds.checkpoints import append_whole
from mixmim_ds.compose import load_config
from mixmim_ds.config import PretrainConfig
from mixmim_ds.data.loader import Loader, MicroBatch
from mixmim_ds.train import checkpoint, pretrain
from mixmim_ds.train.command import command

write = checkpoint.Saver._write
open_loader = pretrain.open_loader


def write_and_tell(saver: checkpoint.Saver, step: int) -> None:
    write(saver, step)
    engine, config = saver.engine, saver.config
    named = dict(engine.module.named_parameters())
    masters = {name: safe_get_full_fp32_param(parameter).clone() for name, parameter in named.items()}
    with GatheredParameters(list(named.values()), enabled=config.ds.startswith("zero3")):
        working = {name: parameter.detach().clone() for name, parameter in named.items()}
    if saver.world.first:
        torch.save((masters, working), Path(config.run_dir) / "live.pt")


def open_and_tell(config: PretrainConfig, *arguments: Any) -> Loader:
    loader: Any = open_loader(config, *arguments)
    batches = loader.batches

    def told(start: int) -> Iterator[MicroBatch]:
        for turn, batch in enumerate(batches(start), start * loader.share.accumulation):
            step, place = loader.share.place(turn)
            line = json.dumps([step, place, batch.ids.tolist()])
            append_whole(Path(config.run_dir) / "ids.jsonl", line + "\n")
            yield batch

    loader.batches = told
    return loader


checkpoint.Saver._write = write_and_tell
pretrain.open_loader = open_and_tell
sys.exit(command(None, load_config, pretrain.pretrain))
