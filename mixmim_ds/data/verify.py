"""Decodes every image before a run does: what is broken, and what trains but may not be what was meant."""

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from PIL import Image
from PIL.ImageFile import ImageFile
from tqdm import tqdm

from mixmim_ds.data.s3 import StorageDown
from mixmim_ds.data.scan import open_image, reason_of
from mixmim_ds.data.shards import Images

SMALLEST = 32  # pixels of a side; less than a cell of the mask, before the crop
LARGEST = Image.MAX_IMAGE_PIXELS or 89_478_485  # where PIL suspects a decompression bomb: 0.27 GB decoded
EXTENSIONS = {"JPEG": (".jpg", ".jpeg"), "PNG": (".png",), "WEBP": (".webp",), "BMP": (".bmp",)}
BATCH = 64  # images that one task of a thread decodes
KINDS = ("broken", "too small", "too large", "odd")


@dataclass(frozen=True)
class Finding:
    """Something about one image."""

    kind: str  # one of KINDS; only what is broken cannot be trained on
    image: str
    reason: str


def verify(index: Images, progress: bool) -> Iterator[Finding]:
    """What there is to say about the images, first of the files that the index has left out, then in its order.

    Threads do, because PIL decodes without Python's lock.

    Raises:
        StorageDown: S3 as a whole fails.
    """
    yield from (Finding("broken", name, reason) for name, reason in index.broken)
    batches = [range(first, min(first + BATCH, len(index))) for first in range(0, len(index), BATCH)]
    with (
        ThreadPoolExecutor(2 * len(os.sched_getaffinity(0))) as pool,  # some of them wait for storage
        tqdm(desc="decoding", total=len(index), unit=" images", disable=None if progress else True) as bar,
    ):
        findings = pool.map(lambda rows: [finding for i in rows for finding in _look(index, i)], batches)
        for rows, found in zip(batches, findings, strict=True):
            bar.update(len(rows))
            yield from found


def _look(index: Images, i: int) -> list[Finding]:
    """All findings about image i."""
    name, (height, width) = index.name(i), index.sizes[i].tolist()
    if height * width > LARGEST:
        return [Finding("too large", name, f"{width} x {height} pixels, more than {LARGEST:,}; not decoded")]
    try:
        with index.open(i) as file, open_image(file) as image:
            oddities = list(_oddities(image, name)) if isinstance(image, ImageFile) else []
            image.load()
    except StorageDown:
        raise
    except Exception as error:  # whatever strikes a parser that meets arbitrary bytes
        return [Finding("broken", name, reason_of(error))]
    found = [Finding("odd", name, oddity) for oddity in oddities]
    if min(height, width) < SMALLEST:
        found.append(Finding("too small", name, f"{width} x {height} pixels, a side under {SMALLEST}"))
    return found


def _oddities(image: ImageFile, name: str) -> Iterator[str]:
    """What is unusual about an image that is open and not yet decoded."""
    kind = "JPEG" if image.format == "MPO" else str(image.format)  # a JPEG that holds previews too
    if not name.lower().endswith(EXTENSIONS.get(kind, ())):
        yield f"a {kind} by its content"
    if image.format != "MPO" and getattr(image, "is_animated", False):
        yield f"animated, {getattr(image, 'n_frames', 2)} frames of which the first is used"
    if image.mode == "CMYK":
        yield "CMYK, for print"
    # By Pillow's raw mode, which stands alone or before others: RGB;16B, while BGR;16 has 16 bits for all its channels.
    modes = [tile.args[0] if isinstance(tile.args, tuple) else tile.args for tile in image.tile]
    if any(str(mode).endswith(";16B") for mode in modes):
        yield "16 bits a channel, of which 8 are used"
