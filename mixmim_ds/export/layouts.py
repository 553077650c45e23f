"""The names and the order in which others store MixMIM's weights, and ours; nothing is read or written here.

Both foreign layouts put a patch merging at the end of the stage before it, ours (timm's) at the start of the stage
after it. Sources: the checkpoints of https://github.com/Sense-X/MixMIM, and MixMIM in mmpretrain with its converter.
"""

import re
from collections.abc import Mapping
from typing import TypeVar

from torch import Tensor

T = TypeVar("T")
ENCODER = "encoder."  # before the encoder's names in a MixMIM

# OpenMMLab's names and the authors', in the order in which they are replaced.
_OPENMMLAB = (
    (r"^backbone\.", ""),
    (r"^neck\.ln1\.", "decoder_norm."),
    (r"^neck\.", ""),
    (r"^head\.fc\.", "head."),
    (r"^patch_embed\.projection\.", "patch_embed.proj."),
    (r"\.ln([12])\.", r".norm\1."),
    (r"\.ffn\.layers\.0\.0\.", ".mlp.fc1."),
    (r"\.ffn\.layers\.1\.", ".mlp.fc2."),
)
_MERGING = re.compile(r"^layers\.(\d+)\.downsample\.")


def encoder_of(tensors: Mapping[str, T]) -> dict[str, T]:
    """Those of a MixMIM's tensors that are its encoder's, by their names there."""
    return {name.removeprefix(ENCODER): tensor for name, tensor in tensors.items() if name.startswith(ENCODER)}


def is_openmmlab(tensors: Mapping[str, Tensor]) -> bool:
    """Whether the names are OpenMMLab's rather than the authors'."""
    return any(name.startswith("backbone.") for name in tensors)


def openmmlab_to_authors(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """OpenMMLab's layout as the authors'. Position tables keep what they hold: OpenMMLab's swapped halves go with the
    weights that were trained on them."""
    renamed = {}
    for name, value in tensors.items():
        for pattern, replacement in _OPENMMLAB:
            name = re.sub(pattern, replacement, name)
        renamed[name] = _reorder_neighbours(value) if _MERGING.match(name) else value
    return renamed


def _reorder_neighbours(value: Tensor) -> Tensor:
    """Last axis of 4C from (channel, row, column), OpenMMLab's order and nn.Unfold's, to (column, row, channel).

    The latter is the authors' order and timm's: all channels of a neighbour together, the one below before the right.
    """
    if value.dim() == 0 or value.shape[-1] % 4:
        return value  # fits no model, which is said where shapes are compared
    return value.unflatten(-1, (-1, 2, 2)).transpose(-3, -1).flatten(-3)


def authors_to_ours(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The authors' layout as ours: the encoder's tensors by their names there, the decoder's by theirs in MixMIM."""
    encoder, decoder = {}, {}
    for name, value in tensors.items():
        if name == "mask_token" or name.startswith("decoder_"):
            decoder[name] = value
        else:
            name = _MERGING.sub(lambda stage: f"layers.{int(stage[1]) + 1}.downsample.", name)
            encoder[re.sub(r"^head\.", "head.fc.", name)] = value
    return encoder, decoder


def ours_to_authors(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a MixMIM or of an encoder, by their names there, in the authors' layout."""
    renamed = {}
    for name, value in tensors.items():
        name = name.removeprefix(ENCODER)
        name = _MERGING.sub(lambda stage: f"layers.{int(stage[1]) - 1}.downsample.", name)
        renamed[re.sub(r"^head\.fc\.", "head.", name)] = value
    return renamed
