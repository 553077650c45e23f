"""A run, or a folder exported for timm, as a checkpoint of the authors' layout."""

from pathlib import Path

from timm.models._manipulate import reinit_non_persistent_buffers

from mixmim_ds.export.official import save_official
from mixmim_ds.export.pretrained import load_exported, load_pretrained
from mixmim_ds.export.to_timm import DECODER_FILE
from mixmim_ds.export.weights import read_weights
from mixmim_ds.models import MixMIM, MixMIMTransformer


def export_official(source: Path, out: Path) -> None:
    """Writes the whole model of a run or checkpoint, or what an exported folder holds of one, to the file `out`.

    Raises:
        ValueError: `source` is none of these, or `out` exists, names another format or cannot be written.
    """
    if out.suffix == ".safetensors":
        raise ValueError(f"{out} would hold what torch.save writes, as the authors' files do; let it end in .pth.")
    if out.exists():
        raise ValueError(f"{out} exists already; choose another file to write to.")
    save_official(_exported(source) if (source / "config.json").is_file() else _trained(source), out)


def _trained(source: Path) -> MixMIM | MixMIMTransformer:
    """The whole model of pretraining, or the encoder with its classifier of fine-tuning."""
    weights = read_weights(source)
    tensors = {name: tensor.contiguous() for name, tensor in weights.tensors.items()}
    weights.model.load_state_dict(tensors, assign=True)
    reinit_non_persistent_buffers(weights.model)
    return weights.model if isinstance(weights.model, MixMIM) else weights.model.encoder


def _exported(folder: Path) -> MixMIM | MixMIMTransformer:
    """The encoder, or the whole model where its decoder was exported, too."""
    if (folder / DECODER_FILE).is_file():
        return load_pretrained(folder).model
    return load_exported(folder)
