"""A sheet of pictures with words under them, as an image file."""

from dataclasses import dataclass

from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torchvision.transforms.functional import to_pil_image

from mixmim_ds.evaluate.pictures import COLUMNS, GAP

PAPER, INK, QUIET = "#ffffff", "#16191d", "#5d6672"


@dataclass(frozen=True)
class Captioned:
    """A picture and the line under it."""

    pixels: Tensor  # uint8 [3, S, S]
    words: str


class Sheet:
    """Grows downwards, one row at a time; what is drawn is as wide as six pictures, the columns of a pair.

    Args:
        side: pixels of a picture.
    """

    def __init__(self, side: int) -> None:
        self.side, self.margin = side, side // 8
        small, large = max(side // 13, 10), max(side // 9, 13)
        self.font, self.heading = ImageFont.load_default(small), ImageFont.load_default(large)
        self.line, self.over = int(small * 1.7), int(large * 2.2)
        self.parts: list[Image.Image] = []

    def title(self, words: str) -> None:
        """A heading over what follows."""
        part = self._part(self.over)
        ImageDraw.Draw(part).text((0, self.over // 2), words, INK, self.heading, anchor="lm")

    def pairs(self, strips: list[Tensor]) -> None:
        """Pairs as `draw` makes them, under the names of their columns."""
        part = self._part(self.line)
        for column, words in enumerate(COLUMNS.split(" | ")):
            self._words(part, column, 0, words)
        for strip in strips:
            self._part(self.side + GAP).paste(to_pil_image(strip), (0, 0))

    def row(self, pictures: list[Captioned]) -> None:
        """Pictures side by side, each with its words below; the first, which the others are compared with, is
        framed."""
        part = self._part(self.side + self.line + GAP, max(len(pictures), 6))
        for column, picture in enumerate(pictures):
            part.paste(to_pil_image(picture.pixels), (column * (self.side + GAP), 0))
            self._words(part, column, self.side, picture.words)
        ImageDraw.Draw(part).rectangle((0, 0, self.side - 1, self.side - 1), outline=INK, width=max(self.side // 64, 2))

    def _part(self, height: int, columns: int = 6) -> Image.Image:
        self.parts.append(Image.new("RGB", (columns * (self.side + GAP) - GAP, height), PAPER))
        return self.parts[-1]

    def _words(self, part: Image.Image, column: int, top: int, words: str) -> None:
        """A line in the middle of a column; one that is too long loses its beginning, for files differ at the end."""
        while self.font.getlength(words) > self.side and len(words) > 2:
            words = "…" + words[2:]
        middle = column * (self.side + GAP) + self.side / 2
        ImageDraw.Draw(part).text((middle, top + self.line / 2), words, QUIET, self.font, anchor="mm")

    def image(self) -> Image.Image:
        """All of it, on one sheet."""
        width = max(part.width for part in self.parts) + 2 * self.margin
        whole = Image.new("RGB", (width, sum(part.height for part in self.parts) + 2 * self.margin), PAPER)
        top = self.margin
        for part in self.parts:
            whole.paste(part, (self.margin, top))
            top += part.height
        return whole
