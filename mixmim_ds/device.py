"""What a process computes on, and in which numbers."""

import os

import torch

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}  # by the option `precision`


def on_gpu() -> bool:
    """Whether there is a GPU to compute on; with DS_ACCELERATOR=cpu, DeepSpeed's own variable, none is touched."""
    return os.environ.get("DS_ACCELERATOR") != "cpu" and torch.cuda.is_available()


def gpus() -> int:
    """How many GPUs of this machine there are to compute on."""
    return torch.cuda.device_count() if on_gpu() else 0
