"""launch/pretrain.py, whose rank 1 alone meets a ValueError: as it looks for the images, if MISTAKEN says so, which is
a mistake of the user's, or in training, which is none."""

import os
import sys
from typing import Any

from mixmim_ds.compose import load_config
from mixmim_ds.train import loop, pretrain
from mixmim_ds.train.command import command

MODULE, NAME = (pretrain, "open_images") if os.environ.get("MISTAKEN") == "images" else (loop, "set_lr")
whole = getattr(MODULE, NAME)


def fail(*arguments: Any, **options: Any) -> Any:
    if os.environ["RANK"] == "1":
        raise ValueError("this rank alone knows")
    return whole(*arguments, **options)


setattr(MODULE, NAME, fail)
sys.exit(command(None, load_config, pretrain.pretrain))
