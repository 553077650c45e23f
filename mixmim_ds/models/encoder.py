"""The hierarchical MixMIM encoder as a timm model.

Shapes: B images, H x W pixels, h x w grid of tokens of a stage, C channels of a stage, E channels of the first stage.

A token only ever meets tokens of its own image: attention is kept inside one image, patch merging stays inside a cell
of the mask, everything else is per token. So on a mixed input the encoder computes exactly what it would compute on
each image's visible tokens alone.
"""

from collections.abc import Sequence
from typing import Any, cast

import torch
from timm.layers import ClassifierHead, DropPath, Mlp, PatchEmbed, calculate_drop_path_rates, to_2tuple
from timm.models._features import feature_take_indices
from timm.models.swin_transformer import PatchMerging
from torch import Tensor, nn

from mixmim_ds.models.attention import WindowAttention
from mixmim_ds.models.masking import pair_mask
from mixmim_ds.models.recompute import recompute

PATCH = 4  # pixels of a token's side in the first stage
CELL = 32  # pixels of a mask cell's side: one token of the last stage


def sincos_table(height: int, width: int, dim: int) -> Tensor:
    """Fixed 2-D position table [1, height * width, dim]: the first half of the channels encodes the column, the
    second the row, each half sin then cos with omega = 1 / 10000^(i / (dim / 4))."""
    omega = 10000.0 ** -(torch.arange(dim // 4, dtype=torch.float64) / (dim // 4))

    def encode(positions: Tensor) -> Tensor:
        angles = positions.flatten()[:, None].double() * omega
        return torch.cat([angles.sin(), angles.cos()], dim=1)

    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    return torch.cat([encode(columns), encode(rows)], dim=1).float()[None]


def init_weights(module: nn.Module) -> None:
    """The authors' initialisation of a Linear or LayerNorm; other modules keep theirs. For `nn.Module.apply`."""
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, nn.LayerNorm):
        nn.init.ones_(module.weight)
        nn.init.zeros_(module.bias)


class Block(nn.Module):
    """Pre-norm transformer block on a grid of tokens, [B, h, w, C] -> [B, h, w, C]."""

    def __init__(
        self,
        dim: int,
        num_heads: int,
        window: tuple[int, int],
        mlp_ratio: float = 4.0,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        drop_path: float = 0.0,
    ) -> None:
        super().__init__()
        self.grad_checkpointing = False
        self.selective = False
        self.norm1 = nn.LayerNorm(dim)
        self.attn = WindowAttention(dim, num_heads, window, attn_drop, proj_drop)
        self.drop_path1 = DropPath(drop_path) if drop_path > 0.0 else nn.Identity()
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), drop=proj_drop)
        self.drop_path2 = DropPath(drop_path) if drop_path > 0.0 else nn.Identity()

    def residuals(self, x: Tensor, same_image: Tensor | None = None) -> Tensor:
        x = x + self.drop_path1(self.attn(self.norm1(x), same_image))
        return x + self.drop_path2(self.mlp(self.norm2(x)))

    def forward(self, x: Tensor, same_image: Tensor | None = None) -> Tensor:
        if self.grad_checkpointing and not torch.jit.is_scripting():
            return recompute(self.residuals, self.selective, x, same_image)
        return self.residuals(x, same_image)


class Stage(nn.Module):
    """Patch merging (but for the first stage), then blocks on one grid.

    Args:
        in_dim, dim: channels before and after the merging.
        grid: rows and columns of tokens after the merging.
        window: rows and columns of a window; divides the grid.
        drop_path: a rate per block.
    """

    def __init__(
        self,
        in_dim: int,
        dim: int,
        num_heads: int,
        grid: tuple[int, int],
        window: tuple[int, int],
        drop_path: Sequence[float],
        **rates: float,
    ) -> None:
        super().__init__()
        self.dim, self.grid, self.window = dim, grid, window
        self.downsample = PatchMerging(in_dim, dim) if in_dim != dim else nn.Identity()
        blocks = nn.ModuleList(Block(dim, num_heads, window, drop_path=rate, **rates) for rate in drop_path)
        self.blocks = cast(list[Block], blocks)  # a ModuleList forgets the type of what it holds

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        x = self.downsample(x)
        same_image = None if mask is None else pair_mask(mask, self.grid, self.window)
        for block in self.blocks:
            x = block(x, same_image)
        return x


def _stage_windows(
    img_size: tuple[int, int], window_size: Sequence[int]
) -> list[tuple[tuple[int, int], tuple[int, int]]]:
    """Grid and window of every stage; a window larger than the grid shrinks to it. ValueError if one does not fit."""
    if any(side % CELL for side in img_size):
        raise ValueError(f"img_size={img_size[0]}x{img_size[1]} must be a multiple of {CELL} pixels (a mask cell).")
    stages = []
    for stage, size in enumerate(window_size):
        grid = (img_size[0] // (PATCH << stage), img_size[1] // (PATCH << stage))
        window = (min(size, grid[0]), min(size, grid[1]))
        if grid[0] % window[0] or grid[1] % window[1]:
            raise ValueError(
                f"img_size={img_size[0]}x{img_size[1]} gives stage {stage + 1} a grid of {grid[0]}x{grid[1]} tokens "
                f"that windows of {size} do not fit; choose another img_size or window_size."
            )
        stages.append((grid, window))
    return stages


class MixMIMTransformer(nn.Module):
    """Hierarchical vision transformer with windowed attention and no shifted windows (arXiv 2205.13137, section 3.3).

    Args:
        img_size: pixels, a multiple of 32 whose grids the windows fit.
        embed_dim: E; stage s has E * 2^s channels.
        window_size: side of a stage's windows, in tokens.
        depths, num_heads: of every stage.
        drop_rate, proj_drop_rate, attn_drop_rate, drop_path_rate: as in timm's Swin.

    Raises:
        ValueError: the image size does not fit cells and windows.
    """

    absolute_pos_embed: Tensor
    pretrained_cfg: dict[str, Any]  # timm sets it

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        embed_dim: int = 128,
        depths: Sequence[int] = (2, 2, 18, 2),
        num_heads: Sequence[int] = (4, 8, 16, 32),
        window_size: Sequence[int] = (14, 14, 14, 7),
        mlp_ratio: float = 4.0,
        drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
    ) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.global_pool = global_pool
        self.output_fmt = "NHWC"
        dims = [embed_dim << stage for stage in range(len(depths))]
        self.embed_dim, self.num_features = embed_dim, dims[-1]
        windows = _stage_windows(to_2tuple(img_size), window_size)

        self.patch_embed = PatchEmbed(img_size, PATCH, in_chans, embed_dim, norm_layer=nn.LayerNorm, output_fmt="NHWC")
        self.register_buffer("absolute_pos_embed", sincos_table(*windows[0][0], embed_dim))
        drop_path = calculate_drop_path_rates(drop_path_rate, depths, stagewise=True)
        layers = nn.ModuleList(
            Stage(
                dims[max(stage - 1, 0)], dims[stage], num_heads[stage], *windows[stage], drop_path[stage],
                mlp_ratio=mlp_ratio, attn_drop=attn_drop_rate, proj_drop=proj_drop_rate,
            )
            for stage in range(len(depths))
        )  # fmt: skip
        self.layers = cast(list[Stage], layers)
        self.feature_info = [
            {"num_chs": dim, "reduction": PATCH << stage, "module": f"layers.{stage}"} for stage, dim in enumerate(dims)
        ]
        self.norm: nn.Module = nn.LayerNorm(self.num_features)
        self.head = ClassifierHead(
            self.num_features, num_classes, pool_type=global_pool, drop_rate=drop_rate, input_fmt="NHWC"
        )
        self.head_hidden_size = self.head.num_features
        self.apply(init_weights)

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """None beyond 1-D parameters: the authors decay the position bias tables, and the fixed table is a buffer."""
        return set()

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """timm's layer groups; a patch merging belongs to the first block of its stage."""
        fine = [
            (r"^layers\.(\d+).downsample", (0,)),
            (r"^layers\.(\d+)\.\w+\.(\d+)", None),
            (r"^norm", (99999,)),
        ]
        return {"stem": r"^patch_embed", "blocks": r"^layers\.(\d+)" if coarse else fine}

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True, selective: bool = False) -> None:
        """Recompute the blocks in the backward pass; `selective` keeps matrix products and recomputes the rest."""
        for stage in self.layers:
            for block in stage.blocks:
                block.grad_checkpointing, block.selective = enable, selective

    @torch.jit.ignore
    def get_classifier(self) -> nn.Module:
        """The last layer, [B, num_features] -> [B, num_classes]."""
        return self.head.fc

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replaces the last layer by a new one, and the pooling if given."""
        self.num_classes = num_classes
        self.head.reset(num_classes, pool_type=global_pool)
        self.global_pool = global_pool or self.global_pool

    def embed(self, x: Tensor) -> Tensor:
        """Images [B, 3, H, W] -> tokens [B, H/4, W/4, E] with their positions."""
        x = self.patch_embed(x)
        return x + self.absolute_pos_embed.to(x.dtype).reshape(1, x.shape[1], x.shape[2], x.shape[3])

    def forward_features(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Images [B, 3, H, W] -> features [B, H/32, W/32, 8E].

        `mask` (bool [H/32, W/32]) says that the images are mixed: attention stays inside the cells of one value.
        """
        x = self.embed(x)
        for stage in self.layers:
            x = stage(x, mask)
        return self.norm(x)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Features [B, h, w, C] -> logits [B, num_classes], or the pooled features before the last layer."""
        return self.head(x, pre_logits=True) if pre_logits else self.head(x)

    def forward(self, x: Tensor) -> Tensor:
        """Images [B, 3, H, W] -> logits [B, num_classes]."""
        return self.forward_head(self.forward_features(x))

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """The features after each stage in `indices`, as timm defines it (`norm` concerns the last stage only)."""
        if output_fmt not in ("NCHW", "NHWC"):
            raise ValueError(f"output_fmt={output_fmt!r} must be NCHW or NHWC.")
        taken, last = feature_take_indices(len(self.layers), indices)
        intermediates = []
        x = self.embed(x)
        for index, stage in enumerate(self.layers[: last + 1] if stop_early else self.layers):
            x = stage(x)
            if index in taken:
                feature = self.norm(x) if norm and index == len(self.feature_info) - 1 else x
                intermediates.append(feature.permute(0, 3, 1, 2).contiguous() if output_fmt == "NCHW" else feature)
        if intermediates_only:
            return intermediates
        return self.norm(x) if x.shape[-1] == self.feature_info[-1]["num_chs"] else x, intermediates

    @torch.jit.ignore
    def macs(self) -> int:
        """Multiply-accumulates of one image's features, as the method states it: every window as a whole."""
        total = 0
        for index, stage in enumerate(self.layers):
            tokens, window = stage.grid[0] * stage.grid[1], stage.window[0] * stage.window[1]
            total += tokens * (self.patch_embed.proj.weight[0].numel() if index == 0 else 2 * stage.dim) * stage.dim
            total += tokens * len(stage.blocks) * (12 * stage.dim + 2 * window) * stage.dim
        return total

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Drops the stages, norm and head that `forward_intermediates(indices=...)` does not need."""
        taken, last = feature_take_indices(len(self.layers), indices)
        cut = last < len(self.layers) - 1
        self.layers = self.layers[: last + 1]
        if prune_norm or cut:
            self.norm = nn.Identity()
        if prune_head or cut:
            self.num_features = self.head_hidden_size = self.feature_info[last]["num_chs"]
            self.reset_classifier(0, "")
        return taken
