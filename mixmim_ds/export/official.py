"""The authors' checkpoints and OpenMMLab's as our models, and our models as the authors' checkpoints."""

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

import timm
import torch
from torch import Tensor

from mixmim_ds.checkpoints import whole_file
from mixmim_ds.export import layouts
from mixmim_ds.export.foreign import read_tensors
from mixmim_ds.models import MixMIM, MixMIMTransformer
from mixmim_ds.models.grids import PATCH

INDEX = "relative_position_index"  # stored by others, derived from the window's size by us
_TABLE = "absolute_pos_embed"
_HEAD = "head.fc.weight"
_OURS = "layers.3.downsample.reduction.weight"  # others have no merging in the last stage
_NAMES = {32: "mixmim_tiny", 128: "mixmim_base", 192: "mixmim_large", 352: "mixmim_huge"}  # by channels of stage 1


@dataclass(frozen=True)
class OfficialFile:
    """What a file of the authors or of OpenMMLab holds, in our layout."""

    path: Path
    encoder: dict[str, Tensor]  # by their names in MixMIMTransformer, and the stored relative_position_index
    decoder: dict[str, Tensor]  # by their names in MixMIM; empty unless the file is of pretraining

    @property
    def num_classes(self) -> int:
        """Rows of the classification head, 0 if there is none."""
        return len(self.encoder[_HEAD]) if _HEAD in self.encoder else 0

    @property
    def channels(self) -> int:
        """Channels of the first stage."""
        return self.encoder[_TABLE].shape[2]

    @property
    def img_size(self) -> int | None:
        """Pixels of an image's side, None unless images are square."""
        tokens = self.encoder[_TABLE].shape[1]
        side = math.isqrt(tokens)
        return side * PATCH if side * side == tokens else None


def read_official(path: str | Path) -> OfficialFile:
    """Reads a file of the authors or of OpenMMLab, of pretraining or fine-tuning, at any image size.

    Raises:
        ValueError: the file cannot be read, wants code to be run, is of another model, or in our own layout.
    """
    path = Path(path)
    tensors = read_tensors(path)
    if _OURS in tensors:
        raise ValueError(f"{path} is in timm's layout already; give it to timm.create_model as checkpoint_path.")
    if layouts.is_openmmlab(tensors):
        tensors = layouts.openmmlab_to_authors(tensors)
    file = OfficialFile(path, *layouts.authors_to_ours(tensors))
    if _TABLE not in file.encoder or file.encoder[_TABLE].dim() != 3:
        raise ValueError(
            f"{path} is no MixMIM checkpoint: it has no {_TABLE} [1, tokens, channels]; give another file."
        )
    return file


def build_official(path: str | Path) -> MixMIM | MixMIMTransformer:
    """The model that a file was written from: a MixMIM for a file of pretraining, else an encoder, with its head.

    Raises:
        ValueError: as `load_official`, or the file is of none of the registered sizes.
    """
    file = read_official(path)
    if not file.decoder:
        return build_encoder(file)
    name, img_size = _registered(file)
    model = MixMIM(name, img_size)
    _load(model, file)
    return model


def build_encoder(file: OfficialFile) -> MixMIMTransformer:
    """The encoder in a file, with its head if it has one. ValueError as `build_official`."""
    name, img_size = _registered(file)
    encoder: MixMIMTransformer = timm.create_model(name, img_size=img_size, num_classes=file.num_classes)
    _load(encoder, file)
    return encoder


def _registered(file: OfficialFile) -> tuple[str, int]:
    """The file's encoder by its name in timm, and its image size."""
    if file.img_size is None or file.channels not in _NAMES:
        raise ValueError(
            f"{file.path} has a position table of {list(file.encoder[_TABLE].shape)}, which is of no registered "
            "encoder at a square img_size; create the model yourself and use load_official."
        )
    name = _NAMES[file.channels]
    with_size = f"{name}_{file.img_size}"
    return with_size if timm.is_model(with_size) else name, file.img_size


def load_official(model: MixMIM | MixMIMTransformer, path: str | Path) -> None:
    """Loads a file of the authors or of OpenMMLab, of pretraining or fine-tuning, into a model of its size.

    An encoder takes the encoder of a pretraining file and leaves out the decoder. A head is loaded if the model has as
    many classes, left out if the model has num_classes=0; a model whose file has no head keeps its own. Position tables
    [1, tokens, channels] are loaded as they are stored. (OpenMMLab's decoder has LayerNorms of eps 1e-6, the authors'
    and ours 1e-5; its encoder has ours.)

    Raises:
        ValueError: the file cannot be read, wants code to be run, or does not fit the model, which is left as it was.
    """
    _load(model, read_official(path))


def _load(model: MixMIM | MixMIMTransformer, file: OfficialFile) -> None:
    given = _wanted(model, file)
    own = {name: value.detach() for name, value in model.state_dict().items()}
    indices = _indices(model)
    optional = set(indices) if any(map(_is_head, given)) else {*indices, *filter(_is_head, own)}
    _check_size(file, model.encoder if isinstance(model, MixMIM) else model)
    _check_names(file, given, {**own, **indices}, optional)
    changed = [name for name in indices if name in given and not torch.equal(given[name], indices[name].cpu())]
    if changed:
        raise ValueError(
            f"{file.path} orders the relative positions of windows in another way ({changed[0]} and {len(changed) - 1} "
            "more), so its bias tables mean something else here; give a file of the authors or of OpenMMLab."
        )
    model.load_state_dict({name: given.get(name, value) for name, value in own.items()})


def _wanted(model: MixMIM | MixMIMTransformer, file: OfficialFile) -> dict[str, Tensor]:
    """The part of the file that concerns the model, by the model's names."""
    encoder = file.encoder
    classes = 0 if isinstance(model, MixMIM) else model.num_classes
    if classes == 0:
        encoder = {name: value for name, value in encoder.items() if not _is_head(name)}
    elif file.num_classes not in (0, classes):
        raise ValueError(
            f"{file.path} has a head of {file.num_classes} classes and the model num_classes={classes}; create it with "
            f"num_classes={file.num_classes}, or with num_classes=0 for the encoder alone."
        )
    if not isinstance(model, MixMIM):
        return encoder
    if not file.decoder:
        raise ValueError(
            f"{file.path} holds an encoder without decoder, so it cannot fill a MixMIM; load it into MixMIM's .encoder."
        )
    return {layouts.ENCODER + name: value for name, value in encoder.items()} | file.decoder


def _is_head(name: str) -> bool:
    return name.startswith("head.")


def _indices(model: torch.nn.Module) -> dict[str, Tensor]:
    return {name: value for name, value in model.named_buffers() if name.endswith(INDEX)}


def _check_size(file: OfficialFile, encoder: MixMIMTransformer) -> None:
    same_tokens = file.encoder[_TABLE].shape[1] == encoder.absolute_pos_embed.shape[1]
    if file.img_size and file.channels == encoder.embed_dim and not same_tokens:
        height, width = encoder.patch_embed.img_size
        raise ValueError(
            f"{file.path} is of img_size={file.img_size} and the model of img_size={height}x{width}; create the model "
            f"at img_size={file.img_size} (as build_official does), load the file, then change it with set_input_size."
        )


def _check_names(
    file: OfficialFile, given: Mapping[str, Tensor], expected: Mapping[str, Tensor], optional: Collection[str]
) -> None:
    differences = {
        "lacking": sorted(expected.keys() - given.keys() - set(optional)),
        "unknown": sorted(given.keys() - expected.keys()),
        "of another shape": [
            f"{name} {list(given[name].shape)} for {list(value.shape)}"
            for name, value in expected.items()
            if name in given and given[name].shape != value.shape
        ],
    }
    if any(differences.values()):
        listed = "; ".join(
            f"{len(names)} {kind}: {', '.join(names[:3])}{', ...' if len(names) > 3 else ''}"
            for kind, names in differences.items()
            if names
        )
        raise ValueError(
            f"{file.path} does not fit the model ({listed}); create the model that was saved, as build_official does."
        )


def save_official(model: MixMIM | MixMIMTransformer, path: str | Path) -> None:
    """Writes a model as the authors store theirs: a dict whose `model` is the state dict, relative_position_index and
    position tables included; MixMIM in the layout of pretraining, an encoder with classes in that of fine-tuning.

    What is loaded and saved again is the same, bit for bit. A file of that name is replaced only by a whole one.

    Raises:
        ValueError: the file cannot be written.
    """
    path = Path(path)
    # Cloned, for a tensor that is a view into an engine's flat buffer would be saved with all of that buffer.
    tensors = {name: value.detach().cpu().clone() for name, value in {**model.state_dict(), **_indices(model)}.items()}
    try:
        with whole_file(path) as draft:
            torch.save({"model": layouts.ours_to_authors(tensors)}, draft)
    except (OSError, RuntimeError) as error:  # PyTorch's writer turns a full disk into a RuntimeError
        reason = str(error).partition("\n")[0]
        raise ValueError(f"{path} cannot be written ({reason}); choose another place.") from error
