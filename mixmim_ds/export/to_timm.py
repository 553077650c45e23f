"""A run's encoder as a folder that `timm.create_model("local-dir:FOLDER")` loads."""

import shutil
from pathlib import Path
from typing import Any

import timm
import torch
from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint
from omegaconf import OmegaConf
from safetensors.torch import load_file
from timm.models import save_for_hf
from torch import Tensor

from mixmim_ds.checkpoints import Checkpoint, newest_complete, read_checkpoint


def export(source: Path, out: Path) -> Path:
    """Writes the encoder of a run's newest complete checkpoint, or of the checkpoint folder given, to `out`.

    The weights are the optimizer's fp32 masters, gathered from whatever ZeRO stage and number of processes wrote
    them. What is written is read back and compared; `out` appears only when all is well.

    Returns:
        The checkpoint folder that was exported.

    Raises:
        ValueError: there is no complete checkpoint, or `out` exists.
    """
    if out.exists():
        raise ValueError(f"{out} exists already; choose another folder to write to.")
    checkpoint = _find(source)
    config: Any = OmegaConf.load(checkpoint.path.parent.parent / "config.yaml")
    weights = _encoder_weights(checkpoint)
    encoder = timm.create_model(config.model.encoder, num_classes=0, img_size=config.model.img_size)
    encoder.load_state_dict(weights)
    data = {"mean": tuple(config.data.mean), "std": tuple(config.data.std)}
    draft = out.with_name(out.name + ".tmp")
    shutil.rmtree(draft, ignore_errors=True)
    save_for_hf(encoder, str(draft), safe_serialization=True, data_config=data)
    _compare(load_file(draft / "model.safetensors"), weights)
    draft.rename(out)
    return checkpoint.path


def _find(source: Path) -> Checkpoint:
    """The newest complete checkpoint of a run folder, or the one that `source` itself is."""
    if not (source / "checkpoints").is_dir():
        return read_checkpoint(source)
    newest = newest_complete(source)
    if newest is None:
        raise ValueError(f"{source} holds no complete checkpoint; the run must reach train.save_every first.")
    return newest


def _encoder_weights(checkpoint: Checkpoint) -> dict[str, Tensor]:
    folder, tag = checkpoint.path.parent, checkpoint.path.name
    weights = get_fp32_state_dict_from_zero_checkpoint(str(folder), tag)
    prefix = "encoder."
    return {name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)}


def _compare(written: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    wrong = [name for name in expected if name not in written or not torch.equal(written[name], expected[name])]
    if wrong:
        raise RuntimeError(f"what was written differs from the checkpoint in {', '.join(wrong)}; the disk is at fault.")
