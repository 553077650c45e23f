"""What a process computes on."""

import os

import torch


def on_gpu() -> bool:
    """Whether there is a GPU to compute on; with DS_ACCELERATOR=cpu, DeepSpeed's own variable, none is touched."""
    return os.environ.get("DS_ACCELERATOR") != "cpu" and torch.cuda.is_available()
