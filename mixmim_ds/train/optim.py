"""The optimizer's parameter groups and its learning rate, a function of the step."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from mixmim_ds.config import OptimConfig


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Two groups for AdamW: biases and 1-D parameters are not decayed; position bias tables and mask token are."""
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    plain = {name for name, p in named if p.ndim <= 1 or name.endswith(".bias")}
    return [
        {"params": [p for name, p in named if name not in plain], "weight_decay": weight_decay},
        {"params": [p for name, p in named if name in plain], "weight_decay": 0.0},
    ]


def adamw(model: nn.Module, options: OptimConfig) -> torch.optim.AdamW:
    """The run's optimizer: torch's fused one, which needs no compiler. Its lr is no step's yet, see `Schedule`."""
    return torch.optim.AdamW(
        parameter_groups(model, options.weight_decay),
        lr=options.base_lr,
        betas=(options.betas[0], options.betas[1]),
        fused=True,
    )


@dataclass(frozen=True)
class Schedule:
    """Linear warm-up from 0, then half a cosine down to min_lr at the end of the last epoch, step by step."""

    optim: OptimConfig
    global_batch: int
    steps_per_epoch: int
    epochs: int

    @property
    def peak(self) -> float:
        """The linear scaling rule: base_lr is per 256 images."""
        return self.optim.base_lr * self.global_batch / 256

    @property
    def total_steps(self) -> int:
        """Steps of all epochs."""
        return self.epochs * self.steps_per_epoch

    def lr_at(self, step: int) -> float:
        """The learning rate of the update number `step`, counted from 0."""
        warmup = self.optim.warmup_epochs * self.steps_per_epoch
        if step < warmup:
            return self.peak * step / warmup
        done = (step - warmup) / max(self.total_steps - warmup, 1)
        return self.optim.min_lr + (self.peak - self.optim.min_lr) * 0.5 * (1 + math.cos(math.pi * done))
