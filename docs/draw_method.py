"""Draws docs/method.png, the picture of the method: `python docs/draw_method.py`.

Mask, mixed input and targets are those of the project's own functions. The photographs are in scikit-image's wheel:
chelsea (Stefan van der Walt) and coffee (Rachel Michetti, courtesy of Pikolo Espresso Bar), both CC0.
"""

from io import BytesIO
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch, Rectangle
from PIL import Image
from skimage import data

from mixmim_ds.data.plan import mask_at
from mixmim_ds.models.masking import mix, upsample

WIDTH, HEIGHT, DPI = 1660, 930, 100
BLUE, ORANGE, GREY, INK, QUIET = "#3673c2", "#e58a2b", "#d3d7dc", "#1f2328", "#656d76"
# Grid, window, left edge on the page and pixels of a token there.
STAGES = ((56, 14, 790, 4), (28, 14, 1066, 6), (14, 14, 1286, 10), (7, 7, 1478, 17))


def photograph(pixels: np.ndarray, left: int, top: int, side: int) -> torch.Tensor:
    """A square of a photograph as [3, 224, 224], uint8."""
    square = (left, top, left + side, top + side)
    image = Image.fromarray(pixels).resize((224, 224), Image.Resampling.LANCZOS, square)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


class Page:
    """A white page measured in pixels from its upper left corner."""

    def __init__(self) -> None:
        self.figure = Figure(figsize=(WIDTH / DPI, HEIGHT / DPI), dpi=DPI, facecolor="white")
        self.axes = self.figure.add_axes((0, 0, 1, 1))
        self.axes.axis("off")

    def text(self, x: float, y: float, words: str, size: float = 15, color: str = INK, weight: str = "normal") -> None:
        self.axes.text(x, y, words, size=size, color=color, weight=weight, ha="center", va="top", linespacing=1.3)

    def picture(self, x: float, y: float, side: float, image: torch.Tensor) -> None:
        pixels = image.permute(1, 2, 0).numpy()
        self.axes.imshow(pixels, extent=(x, x + side, y + side, y), interpolation="lanczos", zorder=2)

    def tokens(self, x: float, y: float, side: float, owner: torch.Tensor, colors: tuple[str, str]) -> None:
        """A grid of tokens; `owner` is bool, `colors` those of False and of True."""
        cell = side / len(owner)
        gap = max(1, round(cell * 0.12))
        for row, column in np.ndindex(*owner.shape):
            color = colors[int(owner[row, column])]
            corner = (x + column * cell, y + row * cell)
            self.axes.add_patch(Rectangle(corner, cell - gap, cell - gap, color=color, lw=0, zorder=2))

    def lines(self, x: float, y: float, side: float, parts: int, color: str, width: float) -> None:
        """A square cut into parts x parts."""
        for at in np.linspace(0, side, parts + 1):
            self.axes.plot([x + at] * 2, [y, y + side], color=color, lw=width, zorder=3)
            self.axes.plot([x, x + side], [y + at] * 2, color=color, lw=width, zorder=3)

    def frames(self, x: float, y: float, side: float, cells: torch.Tensor, color: str) -> None:
        """A frame around every cell that is True."""
        cell = side / len(cells)
        for row, column in cells.nonzero().tolist():
            corner = (x + column * cell, y + row * cell)
            self.axes.add_patch(Rectangle(corner, cell, cell, fill=False, ec=color, lw=1.6, zorder=4))

    def card(self, x: float, y: float, width: float, height: float, color: str) -> None:
        shape = FancyBboxPatch((x, y), width, height, boxstyle="round,pad=0,rounding_size=14", fc=color, lw=0, zorder=0)
        self.axes.add_patch(shape)

    def arrow(self, start: tuple[float, float], end: tuple[float, float]) -> None:
        style = {"arrowstyle": "-|>,head_width=0.4,head_length=0.7", "shrinkA": 0, "shrinkB": 0}
        self.axes.annotate("", end, start, arrowprops={**style, "lw": 2.6, "color": QUIET}, zorder=5)

    def save(self, path: Path) -> None:
        """As PNG of 256 colours, a third of the size."""
        self.axes.set(xlim=(0, WIDTH), ylim=(HEIGHT, 0), aspect="auto")
        buffer = BytesIO()
        self.figure.savefig(buffer, dpi=DPI)
        page = Image.open(buffer).convert("RGB")
        page.quantize(256, Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE).save(path, optimize=True)


def draw_mixing(page: Page, images: torch.Tensor, mask: torch.Tensor) -> None:
    for y, image, name, color in ((78, images[0], "image A", BLUE), (340, images[1], "image B", ORANGE)):
        page.text(125, y - 38, name, 19, color, "bold")
        page.picture(30, y, 190, image)
    page.arrow((228, 173), (252, 216))
    page.arrow((228, 435), (252, 392))
    page.text(330, 196, "mask", 19, weight="bold")
    page.tokens(262, 234, 136, mask, (BLUE, ORANGE))
    page.text(330, 382, "7 x 7 cells,\n24 from B", 16, QUIET)
    page.arrow((404, 302), (436, 302))
    page.text(582, 124, "mixed input", 19, weight="bold")
    page.picture(448, 166, 272, mix(images, mask)[0])
    page.lines(448, 166, 272, len(mask), "white", 1.6)
    page.text(584, 448, "what hides a cell of A is B:\nthe encoder sees no mask token", 16, QUIET)


def draw_encoder(page: Page, mask: torch.Tensor) -> None:
    page.card(770, 34, 866, 496, "#eff2f6")
    page.text(1203, 54, "hierarchical encoder", 19, weight="bold")
    page.text(1203, 94, "a token attends to tokens of its own image only,", 16)
    page.text(1203, 122, "window by window: blue to blue, orange to orange", 16)
    page.arrow((728, 302), (784, 302))
    for number, (grid, window, left, token) in enumerate(STAGES):
        side = grid * token
        top, middle = 302 - side // 2, left + side / 2
        page.tokens(left, top, side, upsample(mask, grid, grid), (BLUE, ORANGE))
        page.lines(left, top, side, grid // window, INK, 1.8)
        page.text(middle, 424, f"{grid} x {grid}", 17, weight="bold")
        page.text(middle, 453, f"windows of {window}" if grid > window else "one window", 16, QUIET)
        if number:
            page.arrow((left - 46, 302), (left - 6, 302))
    draw_attention(page, mask, left, top, side)
    page.text(1203, 490, "between the stages 2 x 2 tokens of one image become one", 16, QUIET)


def draw_attention(page: Page, mask: torch.Tensor, x: float, y: float, side: float) -> None:
    """Lines from one token of each image to all that it attends to."""
    cell = side / len(mask)
    for owner, color in ((~mask, "#0b2e5c"), (mask, "#6b3500")):
        places = (owner.nonzero() + 0.5) * cell + torch.tensor([y, x])
        here = places[len(places) // 2]
        for there in places:
            page.axes.plot([here[1], there[1]], [here[0], there[0]], color=color, lw=0.9, zorder=4)
        page.axes.plot(here[1], here[0], "o", mfc=color, mec="white", ms=8, zorder=5)


def draw_decoder(page: Page, images: torch.Tensor, mask: torch.Tensor) -> None:
    page.arrow((1537, 538), (1537, 596))
    for x, owner, color, name in ((1230, mask, BLUE, "A"), (1445, ~mask, ORANGE, "B")):
        page.text(x + 85, 608, f"{name}, unmixed", 19, color, "bold")
        page.tokens(x, 652, 170, owner, (color, GREY))
    page.text(1422, 836, "grey: one learned mask token\nwhere the other image was", 16, QUIET)
    page.arrow((1218, 737), (1154, 737))
    page.card(840, 652, 304, 170, "#eff2f6")
    page.text(992, 676, "decoder", 19, weight="bold")
    page.text(992, 716, "8 transformer blocks;\neach sequence by itself,\nwith the same weights", 16)
    page.arrow((830, 737), (750, 737))
    for x, image, hidden, color, name in ((235, images[0], mask, BLUE, "A"), (515, images[1], ~mask, ORANGE, "B")):
        faded = (255 - (255 - image.float()) * 0.18).byte()
        page.text(x + 105, 590, f"{name}, reconstructed", 19, color, "bold")
        page.picture(x, 632, 210, image.where(upsample(hidden, *image.shape[1:]), faded))
        page.frames(x, 632, 210, hidden, color)
    page.text(480, 854, "framed: the cells that were hidden, to be painted (drawn: the targets);", 16, QUIET)
    page.text(480, 880, "a second mix, A and B exchanged, hides the others", 16, QUIET)


def main() -> None:
    images = torch.stack([photograph(data.chelsea(), 60, 0, 300), photograph(data.coffee(), 120, 0, 400)])
    mask = torch.from_numpy(mask_at(0, 5, 0, (7, 7), 0.5))
    page = Page()
    draw_mixing(page, images, mask)
    draw_encoder(page, mask)
    draw_decoder(page, images, mask)
    page.save(Path(__file__).with_name("method.png"))


if __name__ == "__main__":
    main()
