"""The one place that wraps the model: activation checkpointing, then torch.compile, then DeepSpeed."""

import json
from pathlib import Path
from typing import Any

import deepspeed
import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.engine import DeepSpeedEngine
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
from pydantic import ValidationError

from mixmim_ds.config import RunConfig
from mixmim_ds.models import Classifier, MixMIM
from mixmim_ds.train.distributed import World
from mixmim_ds.train.onednn import use_onednn
from mixmim_ds.train.optim import ScaleOf, adamw, all_alike

# What a run takes. DeepSpeed ignores top-level keys that it does not know, so a typo would pass for a setting; most of
# the others that it knows (csv_monitor, elasticity, pipeline) are of what a run does in its own way or not at all.
MECHANICS = {
    "zero_optimization", "zero_force_ds_cpu_optimizer", "communication_data_type", "prescale_gradients",
    "gradient_predivide_factor", "sparse_gradients", "wall_clock_breakdown", "memory_breakdown", "comms_logger",
    "flops_profiler", "aio", "dump_state",
}  # fmt: skip
HYDRA_OWNED = {
    "train_batch_size": "train.global_batch", "train_micro_batch_size_per_gpu": "train.micro_batch",
    "gradient_accumulation_steps": "train.global_batch and train.micro_batch",
    "gradient_clipping": "optim.clip_grad", "optimizer": "optim", "scheduler": "optim",
    "bf16": "precision", "fp16": "precision", "torch_autocast": "precision", "amp": "precision",
    "data_types": "precision", "activation_checkpointing": "activation_checkpointing", "compile": "compile",
    "steps_per_print": "train.log_every", "timers": "train.log_every", "tensorboard": "train.log_every",
    "checkpoint": "train.save_every",
}  # fmt: skip


def accumulation(config: RunConfig, processes: int) -> int:
    """Micro-batches of a step on each process. ValueError if the global batch does not divide."""
    train = config.train
    turns, rest = divmod(train.global_batch, train.micro_batch * processes)
    if rest or not turns:
        raise ValueError(
            f"train.global_batch={train.global_batch} is no multiple of train.micro_batch={train.micro_batch} x "
            f"{processes} processes; change one of them."
        )
    return turns


def zero_stage(config: RunConfig) -> int:
    """The ZeRO stage of the file that `ds` names: 1, 2 or 3. ValueError if a run cannot take the file."""
    stage: int = ds_settings(config)["zero_optimization"]["stage"]
    return stage


def check_compile(config: RunConfig) -> None:
    """ValueError if the options ask to compile under ZeRO-3."""
    if zero_stage(config) == 3 and config.compile:
        raise ValueError(
            "compile=true does not go with ZeRO-3, whose hooks break all graphs; use ds=zero1, zero2 or compile=false."
        )


def ds_settings(config: RunConfig) -> dict[str, Any]:
    """What the file that `ds` names sets. ValueError, in one sentence that begins with `ds: PATH`, if a run cannot take
    it."""
    path = config.ds_path
    try:
        settings = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"ds: {path} is no valid JSON ({error}).") from error
    zero = settings.get("zero_optimization", {}) if isinstance(settings, dict) else None
    if not isinstance(zero, dict):
        raise ValueError(f'ds: {path} must hold an object with another one in it: {{"zero_optimization": {{...}}}}.')
    for key in settings:
        if key in HYDRA_OWNED:
            raise ValueError(f"ds: {path} sets {key}, which belongs to the option {HYDRA_OWNED[key]}; take it out.")
        if key not in MECHANICS:
            raise ValueError(f"ds: {path} sets {key}, which is no setting of a run; take it out or correct it.")
    if zero.get("stage") not in (1, 2, 3):
        raise ValueError(
            f"ds: {path} must set zero_optimization.stage to 1, 2 or 3; stage 0 takes a false first step in bf16."
        )
    parsed = _zero(path, zero)
    if parsed.round_robin_gradients:
        # DeepSpeed's safe_set functions, by which checkpoints are loaded, then write to other tensors.
        raise ValueError(
            f"ds: {path} sets zero_optimization.round_robin_gradients, which spoils resumed runs; take it out."
        )
    offload = parsed.offload_optimizer
    if offload and offload.device != "none" and settings.get("zero_force_ds_cpu_optimizer", True):
        raise ValueError(
            f'ds: {path} sets zero_optimization.offload_optimizer, which wants "zero_force_ds_cpu_optimizer": false '
            "beside zero_optimization; add that."
        )
    return settings


def _zero(path: Path, options: dict[str, Any]) -> DeepSpeedZeroConfig:
    """The options of ZeRO with DeepSpeed's defaults; its complaint of several lines is made one sentence."""
    try:
        return DeepSpeedZeroConfig(**options)
    except ValidationError as error:
        wrong = error.errors()[0]
        option = ".".join(map(str, ("zero_optimization", *wrong["loc"])))
        if wrong["type"] == "extra_forbidden":
            said = f"sets {option}, which DeepSpeed does not know; take it out or correct it."
        else:
            said = f"sets {option} to {wrong['input']!r}: {wrong['msg']}."
        raise ValueError(f"ds: {path} {said}") from error


def engine_config(config: RunConfig, processes: int) -> dict[str, Any]:
    """The engine's mechanics from ds_configs/ joined with the run's own options, each of which has one owner.

    Raises:
        ValueError: a setting of the JSON is unknown or owned by Hydra, or two options do not go together.
    """
    if config.precision == "fp16" and not get_accelerator().is_fp16_supported():
        raise ValueError("precision=fp16 is not supported by this device; use bf16 or fp32.")
    check_compile(config)
    joined = {
        **ds_settings(config),
        "train_batch_size": config.train.global_batch,
        "train_micro_batch_size_per_gpu": config.train.micro_batch,
        # Truthful: ZeRO keeps only the last of several backward passes where it is told of one.
        "gradient_accumulation_steps": accumulation(config, processes),
        "gradient_clipping": config.optim.clip_grad or 0.0,
        "data_types": {"grad_accum_dtype": "fp32"},
        "steps_per_print": 2**31 - 1,
        # It would wait for the GPU before every forward pass and after every step; the loop measures by itself.
        "timers": {"throughput": {"enabled": False}},
    }
    if config.precision != "fp32":
        joined[config.precision] = {"enabled": True}
    return joined


Trained = MixMIM | Classifier


def build_engine(config: RunConfig, model: Trained, world: World, scale_of: ScaleOf = all_alike) -> DeepSpeedEngine:
    """Wraps the model for training under ZeRO with AdamW, at each parameter's share of the learning rate."""
    mode = config.activation_checkpointing
    model.set_grad_checkpointing(mode != "none", mode == "selective")
    if config.compile:
        for block in model.blocks():
            # A graph for each stage, in which every size is a number. Drop path draws the numbers that it draws
            # without: those of the compiler's own generator are others.
            block.compile(dynamic=False, options={"fallback_random": True})
    elif world.device.type == "cpu" and config.precision == "fp32" and torch.backends.mkldnn.is_available():
        use_onednn(model)
    optimizer = adamw(model, config.optim, scale_of)
    # Gloo alone serves the CPU: DeepSpeed's own all-reduce there wants a C++ compiler and never frees its memory.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    engine, *_ = deepspeed.initialize(
        model=model.to(world.device), optimizer=optimizer, config=engine_config(config, world.size)
    )
    return engine


def set_lr(engine: DeepSpeedEngine, lr: float) -> None:
    """Writes the learning rate of the next update, or its share, into the groups that the engine steps with."""
    for group in engine.optimizer.param_groups:
        group["lr"] = lr * group["lr_scale"]
