"""What the encoder is stacked of: blocks of windowed attention, and stages of blocks on one grid.

Shapes: B images, h x w grid of tokens of a stage, C channels of a stage.
"""

from collections.abc import Sequence
from typing import cast

import timm.models.swin_transformer
import torch
from timm.layers import Mlp
from torch import Tensor, nn

from mixmim_ds.models.attention import WindowAttention
from mixmim_ds.models.grids import Shape
from mixmim_ds.models.groups import Groups, group_tokens
from mixmim_ds.models.recompute import recompute


def drop_path(x: Tensor, rate: Tensor | None) -> Tensor:
    """Stochastic depth (arXiv 1603.09382) of a residual [B, ...]: an image is 0 with the chance `rate`, a scalar tensor
    below 1, or else divided by 1 - rate. None = all stay."""
    if rate is None:
        return x
    kept = torch.rand([x.shape[0]] + [1] * (x.ndim - 1), device=x.device) >= rate
    return x * kept / (1 - rate)


class PatchMerging(timm.models.swin_transformer.PatchMerging):
    """timm's, without its padding, which copies all tokens even where it has nothing to add."""

    def forward(self, x: Tensor) -> Tensor:
        """[B, h, w, C] -> [B, h/2, w/2, D]; h and w are even."""
        b, h, w, c = x.shape
        x = x.reshape(b, h // 2, 2, w // 2, 2, c)  # unflatten would make the batch a constant in an ONNX export
        return self.reduction(self.norm(x.permute(0, 1, 3, 4, 2, 5).flatten(3)))


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
        self.drop_path = drop_path
        self.norm1 = nn.LayerNorm(dim)
        self.attn = WindowAttention(dim, num_heads, window, attn_drop, proj_drop)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), drop=proj_drop)

    def skipped(self, x: Tensor) -> Tensor | None:
        """The chance that an image of x skips a residual, as `forward` takes it: a tensor, for torch.compile would make
        a graph of its own for every number. None = none does."""
        if not self.training or self.drop_path == 0.0:
            return None
        return torch.full([], self.drop_path, dtype=torch.float32, device=x.device)

    def residuals(self, x: Tensor, groups: Groups | None = None, skipped: Tensor | None = None) -> Tensor:
        """What the block computes, without checkpointing; arguments as of `forward`."""
        x = x + drop_path(self.attn(self.norm1(x), groups), skipped)
        return x + drop_path(self.mlp(self.norm2(x)), skipped)

    def forward(self, x: Tensor, groups: Groups | None = None, skipped: Tensor | None = None) -> Tensor:
        """x [B, h, w, C] -> [B, h, w, C].

        Args:
            groups: who may attend to whom in a window, None = all to all.
            skipped: the rate of `drop_path`.
        """
        if self.grad_checkpointing and not torch.jit.is_scripting():
            return recompute(self.residuals, self.selective, x, groups, skipped)
        return self.residuals(x, groups, skipped)


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
        self.attn_drop = rates.get("attn_drop", 0.0)
        self.downsample = PatchMerging(in_dim, dim) if in_dim != dim else nn.Identity()
        blocks = nn.ModuleList(Block(dim, num_heads, window, drop_path=rate, **rates) for rate in drop_path)
        self.blocks = cast(list[Block], blocks)  # a ModuleList forgets the type of what it holds

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Tokens of the stage before -> [B, h, w, C]; mask (bool [H/32, W/32]): as of `forward_features`."""
        x = self.downsample(x)
        groups = (
            None if mask is None else group_tokens(mask, self.grid, self.window, self.training and self.attn_drop > 0)
        )
        for block in self.blocks:
            x = block(x, groups, block.skipped(x))
        return x

    def set_grid(self, grid: Shape, window: Shape) -> None:
        """Another grid and window for all blocks; the window divides the grid."""
        self.grid, self.window = grid, window
        for block in self.blocks:
            block.attn.set_window(window)
