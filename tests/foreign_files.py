"""Weights of a MixMIM as the authors' code and OpenMMLab's store them, written down literally.

Shares nothing with `mixmim_ds.export`. Weights are named as in `reference.py`.
"""

from dataclasses import dataclass

import reference
import torch
import torch.nn.functional as F
from reference import Params
from torch import Tensor, nn

# A block's modules by their names in reference.py, in the authors' files and in OpenMMLab's.
BLOCK = [
    ("norm1", "norm1", "ln1"),
    ("attn.qkv", "attn.qkv", "attn.qkv"),
    ("attn.proj", "attn.proj", "attn.proj"),
    ("norm2", "norm2", "ln2"),
    ("mlp.fc1", "mlp.fc1", "ffn.layers.0.0"),
    ("mlp.fc2", "mlp.fc2", "ffn.layers.1"),
]


@dataclass(frozen=True)
class Layout:
    """What decides the names in a file; windows as they are, not larger than the grid."""

    depths: tuple[int, ...]
    windows: tuple[int, ...]
    decoder_depth: int = 0  # 0: the file has no decoder
    head: bool = False

    def names(self) -> list[tuple[str, str, str]]:
        """(reference.py, authors, OpenMMLab) of every tensor but the relative position indices."""
        both = [
            ("encoder.patch_embed.proj", "patch_embed.proj", "backbone.patch_embed.projection"),
            ("encoder.patch_embed.norm", "patch_embed.norm", "backbone.patch_embed.norm"),
            ("encoder.norm", "norm", "backbone.norm"),
        ]
        single = [("encoder.absolute_pos_embed", "absolute_pos_embed", "backbone.absolute_pos_embed")]
        for s, depth in enumerate(self.depths):
            for b in range(depth):
                block = f"layers.{s}.blocks.{b}."
                both += [(f"encoder.{block}{r}", f"{block}{a}", f"backbone.{block}{o}") for r, a, o in BLOCK]
                table = f"{block}attn.relative_position_bias_table"
                single.append((f"encoder.{table}", table, f"backbone.{table}"))
            if s > 0:  # others merge at the end of a stage, the reference at the start of the next
                ours, theirs = f"encoder.layers.{s}.downsample", f"layers.{s - 1}.downsample"
                both.append((f"{ours}.norm", f"{theirs}.norm", f"backbone.{theirs}.norm"))
                weight = "reduction.weight"
                single.append((f"{ours}.{weight}", f"{theirs}.{weight}", f"backbone.{theirs}.{weight}"))
        if self.head:
            both.append(("encoder.head.fc", "head", "head.fc"))
        if self.decoder_depth:
            both.append(("decoder_embed", "decoder_embed", "neck.decoder_embed"))
            both.append(("decoder_norm", "decoder_norm", "neck.ln1"))
            both.append(("decoder_pred", "decoder_pred", "neck.decoder_pred"))
            single.append(("mask_token", "mask_token", "neck.mask_token"))
            single.append(("decoder_pos_embed", "decoder_pos_embed", "neck.decoder_pos_embed"))
        for i in range(self.decoder_depth):
            block = f"decoder_blocks.{i}."
            both += [(f"{block}{r}", f"{block}{a}", f"neck.{block}{o}") for r, a, o in BLOCK]
        return single + [(f"{r}.{p}", f"{a}.{p}", f"{o}.{p}") for r, a, o in both for p in ("weight", "bias")]

    def indices(self) -> Params:
        """The relative position indices, by the authors' names."""
        return {
            f"layers.{s}.blocks.{b}.attn.relative_position_index": reference.relative_position_index(window)
            for s, (depth, window) in enumerate(zip(self.depths, self.windows, strict=True))
            for b in range(depth)
        }


def random_params(model: nn.Module, prefix: str = "", dtype: torch.dtype = torch.float32) -> Params:
    """Weights of a model's shapes (it may be on the meta device), none of them 0 or 1 throughout; tables sin-cos."""
    torch.manual_seed(0)
    params = {}
    for name, value in model.state_dict().items():
        if name.endswith("pos_embed"):
            _, tokens, channels = value.shape
            params[prefix + name] = reference.sincos_table(round(tokens**0.5), round(tokens**0.5), channels).to(dtype)
        else:
            is_norm = "norm" in name and name.endswith("weight")
            params[prefix + name] = torch.randn(value.shape, dtype=dtype) * 0.1 + is_norm
    return params


def swap_halves(params: Params) -> Params:
    """The same with position tables of rows first, columns after: those of OpenMMLab's own pretraining."""
    return {
        name: torch.cat(value.chunk(2, dim=-1)[::-1], dim=-1) if name.endswith("pos_embed") else value
        for name, value in params.items()
    }


def authors(params: Params, layout: Layout) -> Params:
    """The `model` of an authors' file."""
    names = layout.names()
    assert sorted(ours for ours, _, _ in names) == sorted(params), "the layout names every tensor once"
    return {theirs: params[ours] for ours, theirs, _ in names} | layout.indices()


def openmmlab(params: Params, layout: Layout) -> Params:
    """The `state_dict` of an OpenMMLab file."""
    names = layout.names()
    assert sorted(ours for ours, _, _ in names) == sorted(params), "the layout names every tensor once"
    state = {theirs: params[ours] for ours, _, theirs in names}
    for name in state:
        if ".downsample." in name:
            state[name] = state[name][..., unfold_order(state[name].shape[-1] // 4)]
    return state | {f"backbone.{name}": index for name, index in layout.indices().items()}


def unfold_order(channels: int) -> Tensor:
    """Where nn.Unfold puts each of the 4 x channels entries that reference.py concatenates: theirs = ours[order]."""
    block = torch.arange(4.0 * channels).reshape(4, channels)
    image = torch.empty(1, channels, 2, 2)
    image[0, :, 0, 0], image[0, :, 1, 0], image[0, :, 0, 1], image[0, :, 1, 1] = block  # as in merge_patches
    return F.unfold(image, 2, stride=2)[0, :, 0].long()


def openmmlab_merging(state: Params, stage: int, x: Tensor) -> Tensor:
    """OpenMMLab's patch merging after a stage: tokens [B, h, w, C] -> [B, h/2, w/2, 2C]."""
    name = f"backbone.layers.{stage}.downsample"
    batch, height, width, _ = x.shape
    merged = F.unfold(x.permute(0, 3, 1, 2), 2, stride=2).transpose(1, 2)
    weight, bias = state[f"{name}.norm.weight"], state[f"{name}.norm.bias"]
    merged = F.layer_norm(merged, merged.shape[-1:], weight, bias, 1e-5)
    return F.linear(merged, state[f"{name}.reduction.weight"]).reshape(batch, height // 2, width // 2, -1)
