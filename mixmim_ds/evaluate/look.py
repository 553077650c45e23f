"""What a pretrained model makes of images given by file: what it paints behind the mask, and which look alike to it.

N images    S pixels of a side
"""

from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torchvision.transforms.functional import pil_to_tensor

from mixmim_ds.data.central import central_windows
from mixmim_ds.data.loader import Normalise
from mixmim_ds.data.plan import mask_at
from mixmim_ds.data.scan import SUFFIXES
from mixmim_ds.evaluate.features import View
from mixmim_ds.evaluate.pictures import draw
from mixmim_ds.export.pretrained import Pretrained

MOST = 1000  # images that are read into memory at once
BATCH = 16  # images that the encoder takes at once


def find_files(given: list[Path]) -> list[Path]:
    """The files given, and the image files at any depth of folders given, in the order of their names.

    Raises:
        ValueError: one does not exist, there are fewer than two, or more than MOST.
    """
    found: list[Path] = []
    for path in given:
        if path.is_dir():
            found += sorted(each for each in path.rglob("*") if _is_image(each, path))
        elif path.is_file():
            found.append(path)
        else:
            raise ValueError(f"IMAGES: {path} does not exist; give image files, or folders of them.")
    if not 2 <= len(found) <= MOST:
        raise ValueError(f"IMAGES: {len(found):,} are given; give 2 to {MOST:,}, for they are mixed in pairs.")
    return found


def _is_image(path: Path, folder: Path) -> bool:
    """Whether training would take the file for an image: hidden ones are none, nor are those in hidden folders."""
    hidden = any(part.startswith(".") for part in path.relative_to(folder).parts)
    return path.name.lower().endswith(SUFFIXES) and path.is_file() and not hidden


def read_images(files: list[Path], size: int) -> Tensor:
    """The largest central square of each, upright, uint8 [N, 3, S, S].

    By PIL: a few files need no pipeline, and a photograph that was taken on its side is shown as people look at it,
    which DALI's crops of a training run are not.

    Raises:
        ValueError: a file is no readable image.
    """
    pixels = []
    for path in files:
        try:
            image = _rgb(ImageOps.exif_transpose(Image.open(path)))
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            raise ValueError(f"IMAGES: {path} is no readable image ({error}); leave it out.") from error
        top, left, height, width = central_windows(np.array([[image.height, image.width]]), 1.0)[0].tolist()
        box = (left, top, left + width, top + height)
        pixels.append(pil_to_tensor(image.resize((size, size), Image.Resampling.BICUBIC, box)))
    return torch.stack(pixels)


def _rgb(image: Image.Image) -> Image.Image:
    """In 8 bits a channel; grey in 16 bits is scaled, as DALI does it, where PIL alone would clip it to white."""
    if image.mode.startswith("I"):
        image = image.convert("F").point(lambda value: value / 257 + 0.5)  # the conversion that follows rounds down
    return image.convert("RGB")


def as_the_model_takes_them(pretrained: Pretrained, pixels: Tensor) -> Tensor:
    """uint8 [N, 3, S, S] -> float32, normalised."""
    return Normalise(pretrained.mean, pretrained.std, pixels.device)(pixels)


@torch.inference_mode()
def draw_pairs(pretrained: Pretrained, images: Tensor, rows: int, seed: int) -> list[Tensor]:
    """The first pairs of images, 1 and 2, 3 and 4, ...; of an odd number the last goes with the first. Each has the
    mask that its number as a micro-batch has in step 0 of a run with this seed.

    Args:
        images: float32 [N, 3, S, S], normalised.

    Returns:
        of each the pictures that `draw` makes, uint8 [3, S, 6 * (S + GAP) - GAP].
    """
    model, options = pretrained.model, pretrained.options
    drawn = []
    for k in range(min(rows, -(-len(images) // 2))):
        pair = images[[2 * k, (2 * k + 1) % len(images)]]
        mask = torch.from_numpy(mask_at(seed, 0, k, model.grid, options.mask_ratio))
        _, prediction = model(pair, mask)
        drawn.append(draw(pair, mask, prediction, options.norm_pix_loss, pretrained.mean, pretrained.std))
    return drawn


@torch.inference_mode()
def find_neighbours(pretrained: Pretrained, images: Tensor, rows: int, count: int) -> tuple[Tensor, Tensor]:
    """For the first images the others that are nearest by the encoder's features, the mean over its last tokens.

    Args:
        images: float32 [N, 3, S, S], normalised.

    Returns:
        their places int64 [min(rows, N), min(count, N-1)], nearest first, and their cosines, float32.
    """
    vectors = torch.cat([View()(pretrained.model.encoder, part) for part in images.split(BATCH)])
    directions = torch.nn.functional.normalize(vectors, dim=1)
    cosines = directions[:rows] @ directions.T
    cosines.fill_diagonal_(-torch.inf)  # an image is not its own neighbour
    values, places = cosines.topk(min(count, len(images) - 1), dim=1)
    return places, values
