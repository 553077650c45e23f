"""launch/pretrain.py, whose rank 1 meets a ValueError that is no mistake of the user's."""

import os
import sys
from typing import Any

from mixmim_ds.compose import load_config
from mixmim_ds.train import loop
from mixmim_ds.train.command import command
from mixmim_ds.train.pretrain import pretrain

set_lr = loop.set_lr


def fail(*arguments: Any) -> None:
    if os.environ["RANK"] == "1":
        raise ValueError("a library's own")
    set_lr(*arguments)


loop.set_lr = fail
sys.exit(command(None, load_config, pretrain))
