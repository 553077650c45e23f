"""launch/pretrain.py in fp16, whose new engine has a loss scale that its gradients overflow with."""

import sys
from typing import Any

from mixmim_ds.compose import load_config
from mixmim_ds.train import checkpoint
from mixmim_ds.train.command import command
from mixmim_ds.train.pretrain import pretrain

OVERSCALED = 2.0**30
build_engine = checkpoint.build_engine


def build(*arguments: Any) -> Any:
    engine = build_engine(*arguments)
    engine.optimizer.loss_scaler.cur_scale = OVERSCALED
    return engine


if __name__ == "__main__":
    checkpoint.build_engine = build  # an engine that goes on gets the saved scale after that
    sys.exit(command(None, load_config, pretrain))
