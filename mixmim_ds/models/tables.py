"""The tables whose shape depends on the image size: positions of tokens, and biases of offsets inside a window.

Shapes: L = rows * columns of the first stage's grid, E its channels, T = (2 rows - 1) * (2 columns - 1) offsets of a
window, K heads.
"""

import re
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from mixmim_ds.models.grids import Shape

POSITIONS = "absolute_pos_embed"
_BIASES = re.compile(r"layers\.(\d+)\.blocks\.\d+\.attn\.relative_position_bias_table")
_STEP = 0.01  # neighbours' encodings differ by far more, rounding to bfloat16 by less


def sincos_table(height: int, width: int, dim: int) -> Tensor:
    """Fixed 2-D position table [1, height * width, dim]: the first half of the channels encodes the column, the
    second the row, each half sin then cos with omega = 1 / 10000^(i / (dim / 4))."""
    omega = 10000.0 ** -(torch.arange(dim // 4, dtype=torch.float64) / (dim // 4))

    def encode(positions: Tensor) -> Tensor:
        angles = positions.flatten()[:, None].double() * omega
        return torch.cat([angles.sin(), angles.cos()], dim=1)

    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    return torch.cat([encode(columns), encode(rows)], dim=1).float()[None]


def resample(table: Tensor, old: Shape, new: Shape) -> Tensor:
    """A table [rows * columns, C] of an `old` grid at the points of a `new` one, bicubic and not corner-aligned as the
    authors do it; the very table if nothing changes. The dtype stays, the arithmetic is at least float32."""
    if old == new:
        return table
    picture = table.detach().T.reshape(1, -1, *old)
    wide = picture.double() if table.dtype == torch.float64 else picture.float()
    picture = F.interpolate(wide, size=new, mode="bicubic", align_corners=False)
    return picture.flatten(2)[0].T.contiguous().to(table.dtype)


def resample_biases(table: Tensor, old: Shape, new: Shape) -> Tensor:
    """Biases [T, K] of an `old` window for a `new` one."""
    return resample(table, _offsets(old), _offsets(new))


def _offsets(window: Shape) -> Shape:
    return 2 * window[0] - 1, 2 * window[1] - 1


def fit_tables(tensors: Mapping[str, Tensor], grid: Shape, windows: list[Shape]) -> dict[str, Tensor]:
    """A checkpoint's tensors, its tables resampled to the first stage's grid and the windows of every stage.

    Raises:
        ValueError: a table's length is of no grid or window that the file's image size could have.
    """
    fitted = dict(tensors)
    table = fitted.get(POSITIONS)
    if table is None or table.dim() != 3:  # not ours: loading it says what is missing
        return fitted
    stored = table_grid(table[0], grid)
    fitted[POSITIONS] = resample(table[0], stored, grid)[None]
    for name, value in tensors.items():
        match = _BIASES.fullmatch(name)
        if match and int(match[1]) < len(windows):
            stage = int(match[1])
            window = _window(len(value), (stored[0] >> stage, stored[1] >> stage))
            if window is None:
                raise ValueError(f"{name} has {len(value)} rows, which are of no window; give another checkpoint.")
            fitted[name] = resample_biases(value, window, windows[stage])
    return fitted


def table_grid(table: Tensor, own: Shape) -> Shape:
    """Rows and columns of a stored position table [L, E].

    Its length alone would not do: 24 x 24 and 8 x 72 tokens are as many. But one half of the channels encodes the
    row (which one differs between layouts), so it changes between neighbours only where a row ends. A table that is
    not of this kind is taken for the model's `own` grid if it is as long, else for a square.

    Raises:
        ValueError: it is none of these.
    """
    tokens = len(table)
    changes = [int(((half[1:] - half[:-1]).abs().amax(1) > _STEP).sum()) for half in table.float().chunk(2, dim=1)]
    rows = min(changes) + 1
    if max(changes) == tokens - 1 and tokens % rows == 0 and 1 < rows < tokens:
        return rows, tokens // rows
    if tokens == own[0] * own[1]:
        return own
    rows = round(tokens**0.5)
    if rows * rows != tokens:
        raise ValueError(f"{POSITIONS} has {tokens} tokens, which are no square; give a checkpoint of square images.")
    return rows, rows


def _window(offsets: int, grid: Shape) -> Shape | None:
    """The window of so many offsets: a square that shrank to the grid, or, for a grid not of ours, a square."""
    for side in range(1, max(grid) + 1):
        window = (min(side, grid[0]), min(side, grid[1]))
        if _offsets(window)[0] * _offsets(window)[1] == offsets:
            return window
    root = round(offsets**0.5)
    return ((root + 1) // 2, (root + 1) // 2) if root * root == offsets and root % 2 else None
