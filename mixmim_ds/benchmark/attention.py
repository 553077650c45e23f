"""Each way to attend against the plain one, layer by layer: the shapes of an encoder's stages, forward and backward.

    python -m mixmim_ds.benchmark.attention [encoder [images]]

A layer is qkv, attention and projection of one block. The plain way is that of public code of windowed masked image
modelling: windows cut into the batch, two matrix products and a softmax on logits of size N x N, the bias taken by
index, and an additive mask built for every block. "linears" are qkv and projection alone: what no attention can save.

Shapes: B images, h x w tokens of a stage's grid, C channels, G windows, N tokens of a window, K heads.
"""

import statistics
import sys
import time
from collections.abc import Callable

import timm
import torch
from torch import Tensor

from mixmim_ds.models import MixMIMTransformer
from mixmim_ds.models.attention import WindowAttention
from mixmim_ds.models.grids import CELL
from mixmim_ds.models.groups import Groups, sort_tokens
from mixmim_ds.models.masking import pair_mask

Side = Callable[[Tensor], Tensor]


def plain(module: WindowAttention, x: Tensor, mask: Tensor) -> Tensor:
    """x [B, h, w, C] -> [B, h, w, C] under a mask (bool [H/32, W/32])."""
    batch, height, width, dim = x.shape
    (win_h, win_w), heads = module.window, module.num_heads
    rows, columns, tokens = height // win_h, width // win_w, win_h * win_w
    apart = ~pair_mask(mask, (height, width), module.window)
    additive = torch.zeros(apart.shape, dtype=x.dtype, device=x.device).masked_fill(apart, float("-inf"))
    windows = x.reshape(batch, rows, win_h, columns, win_w, dim).transpose(2, 3).reshape(-1, tokens, dim)
    q, k, v = module.qkv(windows).reshape(-1, tokens, 3, heads, dim // heads).permute(2, 0, 3, 1, 4).unbind(0)
    bias = module.relative_position_bias_table[module.relative_position_index.flatten()]
    logits = q * module.head_dim**-0.5 @ k.mT + bias.reshape(tokens, tokens, heads).permute(2, 0, 1)
    logits = logits.reshape(batch, -1, heads, tokens, tokens) + additive[:, None]
    x = logits.reshape(-1, heads, tokens, tokens).softmax(-1) @ v
    x = module.proj(x.transpose(1, 2).reshape(-1, tokens, dim))
    return x.reshape(batch, rows, columns, win_h, win_w, dim).transpose(2, 3).reshape(batch, height, width, dim)


def sides(module: WindowAttention, grid: tuple[int, int], mask: Tensor) -> dict[str, Side]:
    """Every way to run a layer of a stage; what a stage does once for its blocks is done."""
    pairs = Groups(None, pair_mask(mask, grid, module.window))
    sequences = Groups(sort_tokens(mask, grid, module.window), None)
    return {
        "plain": lambda x: plain(module, x, mask),
        "masked pairs": lambda x: module(x, pairs),
        "sequences": lambda x: module(x, sequences),
        "linears": lambda x: module.proj(module.qkv(x)[..., : x.shape[-1]]),
    }


def seconds(side: Side, x: Tensor) -> float:
    """Of one forward and backward pass."""
    start = time.perf_counter()
    out = side(x)
    out.backward(torch.ones_like(out))
    if x.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - start


def measure(encoder: MixMIMTransformer, images: int, repeats: int = 15) -> list[dict[str, float]]:
    """Milliseconds of each way for every stage: medians of repeats in turn, the first of which is not counted."""
    weight = encoder.patch_embed.proj.weight
    height, width = (side // CELL for side in encoder.patch_embed.img_size)
    mask = (torch.randperm(height * width) < height * width // 2).reshape(height, width).to(weight.device)
    rows = []
    for stage in encoder.layers:
        x = torch.randn(images, *stage.grid, stage.dim, dtype=weight.dtype, device=weight.device, requires_grad=True)
        ways = sides(stage.blocks[0].attn, stage.grid, mask)
        times: dict[str, list[float]] = {name: [] for name in ways}
        for _ in range(repeats + 1):
            for name, side in ways.items():
                times[name].append(seconds(side, x))
        rows.append({name: 1e3 * statistics.median(found[1:]) for name, found in times.items()})
    return rows


def main(encoder: str = "mixmim_base", images: str = "4") -> None:
    """Prints a table of Markdown."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    rows = measure(timm.create_model(encoder, num_classes=0).to(device), int(images))
    print(f"| milliseconds of a layer | {' | '.join(rows[0])} |\n|---{'|---' * len(rows[0])}|")
    for number, row in enumerate(rows, 1):
        print(f"| stage {number} | {' | '.join(f'{value:.1f}' for value in row.values())} |")


if __name__ == "__main__":
    main(*sys.argv[1:])
