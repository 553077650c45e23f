"""launch/pretrain.py, whose rank 1 alone meets a ValueError where MISTAKEN says: as it looks for the "images" or reads
the "checkpoint", which is told as a mistake of the user's, or in "training", which is none. Or it finds "others": the
images of the folder OTHERS.

Taking down the groups waits for ever, as it does under NCCL while another rank is stuck; here that is imitated."""

import os
import sys
import threading
from dataclasses import replace
from typing import Any

import torch.distributed

from mixmim_ds.compose import load_config
from mixmim_ds.train import checkpoint, images, loop, pretrain
from mixmim_ds.train.command import command

MISTAKEN = os.environ["MISTAKEN"]
MODULE, NAME = {
    "images": (images, "open_images"),
    "others": (images, "open_images"),
    "checkpoint": (checkpoint, "read_saved"),
    "training": (loop, "set_lr"),
}[MISTAKEN]
whole: Any = getattr(MODULE, NAME)


def fail(*arguments: Any, **options: Any) -> Any:
    if os.environ["RANK"] == "1":
        if MISTAKEN == "others":
            return whole(replace(arguments[0], root=os.environ["OTHERS"]), **options)
        raise ValueError("this rank alone knows")
    return whole(*arguments, **options)


setattr(MODULE, NAME, fail)
torch.distributed.destroy_process_group = threading.Event().wait
sys.exit(command(None, load_config, pretrain.pretrain))
