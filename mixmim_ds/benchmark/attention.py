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
from mixmim_ds.benchmark.plain import PlainBlock
from mixmim_ds.benchmark.report import Measured
from mixmim_ds.benchmark.timing import Marks, in_turn
from mixmim_ds.data.plan import mask_at
from mixmim_ds.device import DTYPES, on_gpu
from mixmim_ds.models import build_model
from mixmim_ds.models.attention import WindowAttention
from mixmim_ds.models.grids import CELL
from mixmim_ds.models.groups import Groups, pair_mask, sort_tokens

Side = Callable[[Tensor], Tensor]


def sides(module: WindowAttention, grid: tuple[int, int], mask: Tensor) -> dict[str, Side]:
    """Every way to run a layer of a stage; what a stage does once for its blocks is done."""
    plain = PlainBlock(module.qkv.in_features, module.num_heads, module.window).to(module.qkv.weight)
    plain.attn.load_state_dict(module.state_dict())
    pairs = Groups(None, pair_mask(mask, grid, module.window))
    sequences = Groups(sort_tokens(mask, grid, module.window), None)
    return {
        "plain": lambda x: plain.attend(x, mask),
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
    device = torch.device("cuda" if on_gpu() else "cpu")
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
