"""launch/pretrain.py, whose rank 1 alone meets a ValueError: as it looks for the images, if MISTAKEN says so, which is
a mistake of the user's, or in training, which is none.

Taking down the groups waits for ever, as it does under NCCL while another rank is stuck; here that is imitated."""

import os
import sys
import threading
from typing import Any

import torch.distributed

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
torch.distributed.destroy_process_group = threading.Event().wait
sys.exit(command(None, load_config, pretrain.pretrain))
