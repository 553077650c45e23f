"""Which tokens of a stage meet in attention, found once for all blocks of the stage.

On a mixed input the tokens of a window stem from two images, and attend only to those of their own. Sorted by image
they are two shorter sequences, which give the same result for half the work (METHOD: "a token only ever meets tokens
of its own image"); where weights are dropped at random, a mask over the pairs of a window says it to PyTorch's kernels.

Shapes: h x w grid of tokens of a stage, T = h * w, G windows of N tokens, S = 2 * G sequences.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from mixmim_ds.models.grids import Shape
from mixmim_ds.models.masking import upsample


class Sequences(NamedTuple):
    """The tokens of a grid, one window after another, and within a window one image after the other.

    All shapes are those of the grid, whatever the mask: nothing waits for a GPU to tell, nothing is compiled twice.
    """

    order: Tensor  # int64 [T]: token of the grid, row-major
    places: Tensor  # int64 [T]: its place in its window, row-major
    starts: Tensor  # int64 [S + 1]: where each sequence begins in those two, and where the last ends


class Groups(NamedTuple):
    """Which tokens may attend to each other; exactly one field is set."""

    sequences: Sequences | None
    same_image: Tensor | None  # bool [G, N, N]: which pairs may attend


@torch.jit.unused
def group_tokens(mask: Tensor, grid: Shape, window: Shape, dropout: bool = False) -> Groups:
    """The groups that a mask (bool [H/32, W/32]) makes on a grid cut into windows."""
    if dropout:
        return Groups(None, pair_mask(mask, grid, window))
    return Groups(sort_tokens(mask, grid, window), None)


def sort_tokens(mask: Tensor, grid: Shape, window: Shape) -> Sequences:
    """The sequences that a mask (bool [H/32, W/32]) makes of the windows of a grid."""
    tokens = torch.arange(grid[0] * grid[1], device=mask.device).reshape(grid)
    masked = _windows(upsample(mask, grid[0], grid[1]), window)
    places = masked.to(torch.uint8).argsort(dim=1, stable=True)
    order = _windows(tokens, window).gather(1, places)
    count = masked.sum(1)
    sizes = torch.stack([masked.shape[1] - count, count], 1).flatten()
    return Sequences(order.flatten(), places.flatten(), F.pad(sizes.cumsum(0), (1, 0)))


def pair_mask(mask: Tensor, grid: Shape, window: Shape) -> Tensor:
    """Which pairs of tokens of a window stem from the same image, bool [G, N, N], under a mask (bool [H/32, W/32])."""
    source = _windows(upsample(mask, grid[0], grid[1]), window)
    return source[:, :, None] == source[:, None, :]


def _windows(values: Tensor, window: Shape) -> Tensor:
    """A grid [h, w] as [G, N]."""
    rows, columns = values.shape[0] // window[0], values.shape[1] // window[1]
    return values.reshape(rows, window[0], columns, window[1]).transpose(1, 2).reshape(rows * columns, -1)
