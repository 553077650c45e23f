"""The optimizer's parameter groups and its learning rate, a function of the step."""

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from mixmim_ds.config import OptimConfig, peak_lr

ScaleOf = Callable[[str], float]  # the share of the learning rate (`lr_scale`) of a parameter, by its name


def all_alike(name: str) -> float:
    """The scale of a model that learns everywhere at the same rate."""
    return 1.0


def parameter_groups(model: nn.Module, weight_decay: float, scale_of: ScaleOf = all_alike) -> list[dict[str, Any]]:
    """Groups for AdamW, two for every scale: biases and 1-D parameters are not decayed; position bias tables and mask
    token are."""
    groups: dict[tuple[float, bool], dict[str, Any]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            scale, plain = scale_of(name), parameter.ndim <= 1 or name.endswith(".bias")
            group = {"params": [], "lr_scale": scale, "weight_decay": 0.0 if plain else weight_decay}
            groups.setdefault((-scale, plain), group)["params"].append(parameter)
    return [groups[key] for key in sorted(groups)]


def layer_scale(name: str, depths: list[int], decay: float) -> float:
    """The share of the learning rate that a parameter of a `Classifier` gets, by the authors' layer ids.

    The patch embedding is layer 0, blocks follow; a patch merging belongs to the block after it, norm and head to the
    last block. Layer l of n gets decay^(n + 1 - l), so even the last one decay^1.

    Args:
        name: of the parameter in the classifier.
        depths: blocks of each stage.
    """
    last = sum(depths)
    stage = re.match(r"encoder\.layers\.(\d+)\.(?:blocks\.(\d+)|downsample)\.", name)
    if name.startswith("encoder.patch_embed."):
        layer = 0
    elif stage:
        layer = sum(depths[: int(stage[1])]) + int(stage[2] or 0) + 1
    else:
        layer = last
    return decay ** (last + 1 - layer)


def adamw(model: nn.Module, options: OptimConfig, scale_of: ScaleOf = all_alike) -> torch.optim.AdamW:
    """The run's optimizer: torch's fused one, which needs no compiler. Its lr is no step's yet, see `Schedule`."""
    return torch.optim.AdamW(
        parameter_groups(model, options.weight_decay, scale_of),
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
        """The highest rate."""
        return peak_lr(self.optim.base_lr, self.global_batch)

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
