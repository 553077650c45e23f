"""Which grids of tokens an image size gives the four stages, and which windows cut them."""

from collections.abc import Sequence
from itertools import count

PATCH = 4  # pixels of a token's side in the first stage
CELL = 32  # pixels of a mask cell's side: one token of the last stage
_LARGEST = 14  # tokens of a window's side that adapts to its grid

Shape = tuple[int, int]  # rows and columns
Windows = int | Sequence[int] | None  # side for all stages, for each stage, or 0 or None = what fits


def stage_windows(img_size: Shape, window_size: Windows, stages: int) -> list[tuple[Shape, Shape]]:
    """Grid and window of every stage; a window larger than the grid shrinks to it.

    Args:
        img_size: pixels.
        window_size: side of the windows of all stages, or of each; 0 or None = the largest of at most 14 tokens that
            fit.

    Raises:
        ValueError: the image is not whole cells, or a window does not fit its grid.
    """
    if any(side < CELL or side % CELL for side in img_size):
        raise ValueError(f"img_size={img_size[0]}x{img_size[1]} must be a multiple of {CELL} pixels (a mask cell).")
    grids = [(img_size[0] // (PATCH << stage), img_size[1] // (PATCH << stage)) for stage in range(stages)]
    if window_size in (0, None):
        sides = [_fitting_side(grid) for grid in grids]
    else:
        sides = [window_size] * stages if isinstance(window_size, int) else list(window_size)
    if len(sides) != stages or not all(isinstance(side, int) and side > 0 for side in sides):
        raise ValueError(
            f"window_size={window_size} must be a positive number, one for each of {stages} stages, or 0, which adapts."
        )
    windows = [(min(side, rows), min(side, columns)) for side, (rows, columns) in zip(sides, grids, strict=True)]
    for stage, (grid, window) in enumerate(zip(grids, windows, strict=True)):
        if grid[0] % window[0] or grid[1] % window[1]:
            near = "x".join(str(_nearest_fitting(pixels, sides)) for pixels in img_size)
            raise ValueError(
                f"img_size={img_size[0]}x{img_size[1]} gives stage {stage + 1} a grid of {grid[0]}x{grid[1]} tokens "
                f"that windows of {sides[stage]} do not fit; choose another img_size, of which {near} is the nearest "
                "that fits, or in Python other windows or window_size=0, which adapts."
            )
    return list(zip(grids, windows, strict=True))


def _fitting_side(grid: Shape) -> int:
    return max(side for side in range(1, _LARGEST + 1) if grid[0] % side == 0 == grid[1] % side)


def _nearest_fitting(pixels: int, sides: Sequence[int]) -> int:
    """The side of an image, in pixels, that windows of these sides fit, one for each stage; the lower of two."""

    def fits(near: int) -> bool:
        grids = [near // (PATCH << stage) for stage in range(len(sides))]
        return near > 0 and all(grid % min(side, grid) == 0 for grid, side in zip(grids, sides, strict=True))

    return next(near for far in count(0, CELL) for near in (pixels - far, pixels + far) if fits(near))
