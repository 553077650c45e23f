"""A run's encoder as a folder that `timm.create_model("local-dir:FOLDER")` loads."""

from pathlib import Path
from typing import Any

import torch
from timm.models._hub import save_config_for_hf

from mixmim_ds.checkpoints import Checkpoint
from mixmim_ds.export.architecture import architecture_source
from mixmim_ds.export.card import model_card
from mixmim_ds.export.files import new_folder, write_safetensors
from mixmim_ds.export.weights import read_weights
from mixmim_ds.models import MixMIMTransformer

ARCHITECTURE_FILE = "mixmim.py"


def export(
    source: Path,
    out: Path,
    dtype: torch.dtype = torch.float32,
    with_decoder: bool = False,
    architecture_file: bool = False,
) -> Checkpoint:
    """Writes the encoder of a run's newest complete checkpoint, or of the checkpoint folder given, to `out`.

    `out` gets model.safetensors (the optimizer's fp32 masters), config.json and README.md, all read back and compared;
    it appears only when all is well.

    Args:
        dtype: of the weights written, float32 or bfloat16.
        with_decoder: also writes decoder.safetensors, the tensors that only pretraining needs.
        architecture_file: also writes mixmim.py, the encoder without this package, for those who have timm alone.

    Raises:
        ValueError: there is no complete checkpoint or it holds another model than its run says, or `out` exists or
            cannot be written.
    """
    weights = read_weights(source)
    with new_folder(out) as draft:
        write_safetensors(draft / "model.safetensors", weights.encoder, dtype)
        if with_decoder:
            write_safetensors(draft / "decoder.safetensors", weights.decoder, dtype)
        write_config(draft, weights.model.encoder, weights.config.data)
        (draft / "README.md").write_text(model_card(weights, out.name, dtype))
        if architecture_file:
            (draft / ARCHITECTURE_FILE).write_text(architecture_source())
    return weights.checkpoint


def write_config(folder: Path, encoder: MixMIMTransformer, data: Any) -> None:
    """config.json of timm's hub layout; mean and std are those that the images of pretraining were normalised with."""
    save_config_for_hf(
        encoder, str(folder / "config.json"), data_config={"mean": tuple(data.mean), "std": tuple(data.std)}
    )
