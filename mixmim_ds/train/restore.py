"""Going on from a checkpoint of any ZeRO stage and number of processes, under any other."""

from collections.abc import Mapping

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

from mixmim_ds.zero_files import AVERAGE, Saved, Scattered


def load_weights(model: nn.Module, tensors: Mapping[str, Scattered]) -> None:
    """Gives a plain model saved masters and buffers, before the engine rounds them to its working precision as it
    always does.

    Raises:
        ValueError: they are another model's.
    """
    own = model.state_dict()
    here, there = ({name: tuple(tensor.shape) for name, tensor in each.items()} for each in (own, tensors))
    for name in sorted(here | there):
        if here.get(name) != there.get(name):
            raise ValueError(
                f"the checkpoint holds another model than the options model.* say: {name} is {there.get(name)} there "
                f"and {here.get(name)} here; give the options that its run had."
            )
    for name, value in own.items():
        value.copy_(tensors[name].contiguous())


def set_masters(engine: DeepSpeedEngine, masters: Mapping[str, Scattered | Tensor]) -> None:
    """Gives a new engine exact fp32 masters; it makes its own from weights that it has rounded, and under ZeRO-3 with
    whatever the memory held in the padding between them, which would not be finite now and then."""
    for name, parameter in engine.module.named_parameters():
        _set(parameter, masters[name].contiguous(), None)


def restore(engine: DeepSpeedEngine, saved: Saved, step: int) -> None:
    """Gives a new engine, built around `load_weights`'s model, the exact masters, Adam's state and fp16's loss scale.

    DeepSpeed's own loader would also bring back lr, weight decay, betas and clipping and so override the options.
    """
    if saved.moments:
        _create_states(engine, saved)
    set_masters(engine, saved.masters)
    for name, parameter in engine.module.named_parameters():
        for key, tensors in saved.moments.items():
            _set(parameter, tensors[name].contiguous(), key)
    if saved.loss_scaler is not None:
        engine.optimizer.loss_scaler = saved.loss_scaler
    engine.global_steps = step


def average_weights(engine: DeepSpeedEngine, decay: float) -> None:
    """Moves the average of the weights towards the masters: average = decay x average + (1 - decay) x master.

    It begins as the weights after the first update, and lies with Adam's moments: shared out, saved and restored as
    they are, under every ZeRO stage.
    """
    for vector in master_vectors(engine):
        state = engine.optimizer.optimizer.state[vector]
        if AVERAGE in state:
            state[AVERAGE].lerp_(vector, 1 - decay)
        else:
            state[AVERAGE] = vector.detach().clone()


def master_vectors(engine: DeepSpeedEngine) -> list[Tensor]:
    """This process's fp32 masters, 1-D, one vector a group."""
    names = ("fp32_partitioned_groups_flat", "fp32_groups_flat_partition", "single_partition_of_fp32_groups")
    vectors: list[Tensor] = next(getattr(engine.optimizer, name) for name in names if hasattr(engine.optimizer, name))
    return vectors


def _create_states(engine: DeepSpeedEngine, saved: Saved) -> None:
    """Adam makes its state in its first step; here it must be there before."""
    optimizer = engine.optimizer
    for vector in master_vectors(engine):
        count = torch.tensor(float(saved.updates), device=vector.device)
        optimizer.optimizer.state[vector] = {"step": count} | {key: torch.zeros_like(vector) for key in saved.moments}
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
