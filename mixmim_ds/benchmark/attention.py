"""Each way to attend against the plain one, layer by layer: the shapes of an encoder's stages, forward and backward.

A layer is qkv, attention and projection of one block. The plain way is that of public code of windowed masked image
modelling: windows cut into the batch, two matrix products and a softmax on logits of size N x N, the bias taken by
index, and an additive mask built for every block. "linears" are qkv and projection alone: what no attention can save.

Shapes: B images, h x w tokens of a stage's grid, C channels, G windows, N tokens of a window, K heads.
"""

import argparse
import statistics
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from mixmim_ds.benchmark.options import run_options
from mixmim_ds.benchmark.report import Measured
from mixmim_ds.benchmark.timing import Marks, in_turn
from mixmim_ds.data.plan import mask_at
from mixmim_ds.models import build_model
from mixmim_ds.models.attention import WindowAttention
from mixmim_ds.models.grids import CELL
from mixmim_ds.models.groups import Groups, sort_tokens
from mixmim_ds.models.masking import pair_mask
from mixmim_ds.plan_memory import DTYPES

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


def add_options(parser: argparse.ArgumentParser) -> None:
    """`attention` knows the run's own options alone."""


def measure(arguments: argparse.Namespace) -> Measured:
    """Times every way for every stage of the run's encoder and micro-batch, in the weights' precision, in turn.

    Raises:
        ValueError: the options do not go together.
    """
    config = run_options(arguments.words, {"data": "synthetic", "train.micro_batch": 4})
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(config.train.seed)
    encoder = build_model(config.model).encoder.to(device, DTYPES[config.precision])
    size = config.model.img_size // CELL
    mask = torch.from_numpy(mask_at(config.train.seed, 0, 0, (size, size), config.model.mask_ratio)).to(device)
    stages = []
    for stage in encoder.layers:
        shape = (config.train.micro_batch, *stage.grid, stage.dim)
        x = torch.randn(shape, dtype=DTYPES[config.precision], device=device, requires_grad=True)
        ways = {name: partial(_pass, way, x) for name, way in sides(stage.blocks[0].attn, stage.grid, mask).items()}
        stages.append(medians_of(in_turn(ways, arguments.warmup, arguments.repeats)))
    names = list(stages[0])
    table = [f"| milliseconds of a layer | {' | '.join(names)} |", f"|---{'|---' * len(names)}|"]
    for number, row in enumerate(stages, 1):
        table.append(f"| stage {number} | {' | '.join(f'{1e3 * row[name]:.1f}' for name in names)} |")
    said = "; ".join(
        f"stage {number}: plain / {name} {row['plain'] / row[name]:.2f}"
        for number, row in enumerate(stages, 1)
        for name in names
        if name not in ("plain", "linears")
    )
    numbers = {"model": config.model.encoder, "micro_batch": config.train.micro_batch, "precision": config.precision}
    return Measured(
        f"{said}; medians of {arguments.repeats}", numbers | {"repeats": arguments.repeats, "layers_s": stages}, table
    )


def medians_of(rows: dict[str, list[float]]) -> dict[str, float]:
    """The median seconds of each way."""
    return {name: round(statistics.median(values), 6) for name, values in rows.items()}


def _pass(side: Side, x: Tensor) -> float:
    """Seconds of one forward and backward pass."""
    marks = Marks(x.device)
    marks.mark()
    out = side(x)
    out.backward(torch.ones_like(out))
    marks.mark()
    return marks.intervals()[0]
