"""Going on from a checkpoint of any ZeRO stage and number of processes, under any other."""

import torch
import torch.distributed as dist
from deepspeed.runtime.engine import DeepSpeedEngine
from deepspeed.utils import (
    safe_set_full_fp32_param,
    safe_set_full_optimizer_state,
    safe_set_local_fp32_param,
    safe_set_local_optimizer_state,
)
from torch import Tensor, nn

from mixmim_ds.models import MixMIM
from mixmim_ds.zero_files import MOMENTS, Saved


def load_weights(model: MixMIM, saved: Saved) -> None:
    """Gives a plain model the saved masters, before the engine rounds them to its working precision as it always does.

    Raises:
        ValueError: they are another model's.
    """
    named = dict(model.named_parameters())
    if {name: p.shape for name, p in named.items()} != {name: s.shape for name, s in saved.masters.items()}:
        raise ValueError("the checkpoint holds another model than model.encoder and its options say.")
    with torch.no_grad():
        for name, parameter in named.items():
            parameter.copy_(saved.masters[name].contiguous())


def restore(engine: DeepSpeedEngine, saved: Saved, step: int) -> None:
    """Gives a new engine, built around `load_weights`'s model, the exact masters, Adam's state and fp16's loss scale.

    DeepSpeed's own loader would also bring back lr, weight decay, betas and clipping and so override the options.
    """
    _create_states(engine, saved.updates)
    for name, parameter in engine.module.named_parameters():
        _set(parameter, saved.masters[name].contiguous(), None)
        for key in MOMENTS:
            _set(parameter, saved.moments[key][name].contiguous(), key)
    if saved.loss_scaler is not None:
        engine.optimizer.loss_scaler = saved.loss_scaler
    engine.global_steps = step


def master_vectors(engine: DeepSpeedEngine) -> list[Tensor]:
    """This process's fp32 masters, 1-D, one vector a group."""
    names = ("fp32_partitioned_groups_flat", "fp32_groups_flat_partition", "single_partition_of_fp32_groups")
    vectors: list[Tensor] = next(getattr(engine.optimizer, name) for name in names if hasattr(engine.optimizer, name))
    return vectors


def _create_states(engine: DeepSpeedEngine, updates: int) -> None:
    """Adam makes its state in its first step; here it must be there before."""
    optimizer = engine.optimizer
    for vector in master_vectors(engine):
        count = torch.tensor(float(updates), device=vector.device)
        optimizer.optimizer.state[vector] = {"step": count} | {key: torch.zeros_like(vector) for key in MOMENTS}
    if not hasattr(optimizer, "fp32_partitioned_groups_flat"):  # ZeRO-3 looks them up each time
        optimizer._lazy_init_hp_params_optimizer_state()


def _set(parameter: nn.Parameter, value: Tensor, key: str | None) -> None:
    """Writes what this process holds of a parameter's master (None) or moment."""
    if not hasattr(parameter, "ds_tensor"):
        if key is None:
            safe_set_full_fp32_param(parameter, value)
        else:
            safe_set_full_optimizer_state(parameter, value, key)
        return
    # ZeRO-3; DeepSpeed's function for full values fails where a tensor does not divide by the processes.
    part = parameter.ds_tensor.ds_numel
    start = part * dist.get_rank()
    local = torch.zeros(part)
    piece = value.flatten()[start : start + part]
    local[: piece.numel()] = piece
    if key is None:
        safe_set_local_fp32_param(parameter, local)
    else:
        safe_set_local_optimizer_state(parameter, local, key)
