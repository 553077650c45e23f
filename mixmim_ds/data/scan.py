"""What a folder holds: its directories, the images below it and their sizes, from headers alone.

n  files with an image's extension    D  directories
"""

import os
import stat
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import IO

import numpy as np
from PIL import Image
from PIL.BmpImagePlugin import BmpImageFile
from PIL.ImageFile import ImageFile
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile
from tqdm import tqdm

from mixmim_ds.data.s3 import StorageDown

EXTENSIONS = b".bmp", b".jpeg", b".jpg", b".png", b".webp"
SUFFIXES = tuple(map(os.fsdecode, EXTENSIONS))
# Decoders tell files apart by these bytes; extensions lie. Pillow's classes are called directly, because
# PIL.Image.open refuses photographs beyond 179 megapixels and its limit is set for the whole process.
PILLOW_FORMATS: dict[bytes, type[ImageFile]] = {
    b"\xff\xd8\xff": JpegImageFile,
    b"\x89PNG\r\n\x1a\n": PngImageFile,
    b"BM": BmpImageFile,
}
WEBP_HEADER = 30  # bytes up to the end of the size, in each of its three kinds
BATCH = 256  # files or directories that one task of a thread looks at
TICK_NS = 20_000_000  # the clock of file systems ticks every 1 to 10 ms (Linux, CONFIG_HZ); this is safely more


Look = Callable[[bytes], tuple[int, int, int]]  # height, width and bytes of the image at a path


@dataclass(frozen=True)
class Listing:
    """What the directories below a root hold, hidden entries aside; names are relative paths as bytes."""

    images: np.ndarray  # bytes [n], files with an image's extension, sorted
    others: int  # files of other kinds
    directories: np.ndarray  # bytes [D], sorted
    mtimes: np.ndarray  # int64 [D], when entries were last added, removed or renamed, ns


def list_images(root: bytes, skip: bytes, progress: bool) -> Listing:
    """Walk the directories below `root`, through symbolic links too, but not into the directory `skip`.

    Raises:
        ValueError: a directory cannot be read.
    """
    # Each with the identities of those above it: a link to one of them is a loop (as in `find -L`).
    pending = [(b"", frozenset({_identity(os.stat(skip))}))]
    images, directories, mtimes, others = [np.empty(0, "S1")], [], [], 0
    with tqdm(desc="listing", unit=" images", disable=None if progress else True) as bar:
        while pending:
            folder, above = pending.pop()
            try:
                status = os.stat(os.path.join(root, folder))
                if _identity(status) in above:
                    continue
                folders, files = _list_folder(os.path.join(root, folder), status.st_mtime_ns)
            except OSError as error:
                path = os.fsdecode(os.path.join(root, folder))
                raise ValueError(
                    f"data.root={os.fsdecode(root)} cannot be read as a whole: {path}: {error.strerror}; "
                    "make it readable or take it out."
                ) from error
            directories.append(folder)
            mtimes.append(status.st_mtime_ns)
            above |= {_identity(status)}
            pending += [(os.path.join(folder, name), above) for name in folders]
            found = [os.path.join(folder, name) for name in files if name.lower().endswith(EXTENSIONS)]
            images.append(np.array(found, "S"))
            others += len(files) - len(found)
            bar.update(len(found))
    names = np.array(directories)
    order = np.argsort(names)  # another copy is listed in another order
    return Listing(np.sort(np.concatenate(images)), others, names[order], np.array(mtimes)[order])


def _identity(status: os.stat_result) -> tuple[int, int]:
    return status.st_dev, status.st_ino


def _list_folder(path: bytes, mtime_ns: int) -> tuple[list[bytes], list[bytes]]:
    """Names of the visible folders and of all other visible entries."""
    age_ns = time.time_ns() - mtime_ns
    if 0 <= age_ns < TICK_NS:
        # A change in the same tick as the last would not show in the time, and the index would miss it for ever.
        time.sleep((TICK_NS - age_ns) / 1e9)
    folders: list[bytes] = []
    files: list[bytes] = []
    with os.scandir(path) as entries:
        for entry in entries:
            if not entry.name.startswith(b"."):
                (folders if _is_folder(entry) else files).append(entry.name)
    return folders, files


def _is_folder(entry: os.DirEntry[bytes]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


def mtimes_of(root: bytes, directories: np.ndarray) -> np.ndarray:
    """When these directories, bytes [D], were last changed, int64 [D], ns; raises OSError if one is gone."""

    def look(rows: slice) -> list[int]:
        return [os.stat(os.path.join(root, name)).st_mtime_ns for name in directories[rows].tolist()]

    with ThreadPoolExecutor(threads()) as pool:
        return np.array([mtime for batch in pool.map(look, _batches(len(directories))) for mtime in batch])


def measure(
    root: bytes, names: np.ndarray, look: Look, workers: int, progress: bool
) -> tuple[np.ndarray, list[tuple[str, str]]]:
    """Read the headers of the files `names`, bytes [n], relative to `root`.

    Args:
        look: `measure_file` or alike; what is no image raises what its parser raises.
        workers: threads that look.

    Returns:
        int64 [n, 3]: height and width in pixels and the size in bytes, zeros for a file without readable header;
        the names of those, with the reasons.

    Raises:
        StorageDown: S3 as a whole fails.
    """
    measured = np.zeros((len(names), 3), np.int64)
    broken: list[tuple[str, str]] = []
    batches = list(_batches(len(names)))
    with (
        ThreadPoolExecutor(workers) as pool,
        tqdm(desc="reading headers", total=len(names), unit=" images", disable=None if progress else True) as bar,
    ):
        failures = pool.map(lambda rows: _measure_batch(root, names[rows], look, measured[rows]), batches)
        for rows, failed in zip(batches, failures, strict=True):
            broken += failed
            bar.update(len(names[rows]))
    return measured, broken


def _measure_batch(root: bytes, names: np.ndarray, look: Look, measured: np.ndarray) -> list[tuple[str, str]]:
    """Fills the rows of `measured`; returns names and reasons of those that stay zeros."""
    broken = []
    for row, name in enumerate(names.tolist()):
        try:
            measured[row] = look(os.path.join(root, name))
        except StorageDown:
            raise
        except Exception as error:  # whatever strikes a parser that meets arbitrary bytes
            broken.append((os.fsdecode(name), reason_of(error)))
    return broken


def reason_of(error: Exception) -> str:
    """Why an image is broken, in few words."""
    return getattr(error, "strerror", None) or str(error) or type(error).__name__


def measure_file(path: bytes) -> tuple[int, int, int]:
    """Height, width and bytes of an image file; a file that is none raises what its parser raises."""
    status = os.stat(path)
    if not stat.S_ISREG(status.st_mode):  # opening a pipe would wait for ever
        raise ValueError("not a regular file")
    with open(path, "rb") as file:
        return *image_size(file), status.st_size


def image_size(file: IO[bytes]) -> tuple[int, int]:
    """Height and width of the image in a file open at its beginning; what is none raises what its parser raises."""
    head = file.read(WEBP_HEADER)
    file.seek(0)
    if head[:4] == b"RIFF" and head[8:12] == b"WEBP":
        width, height = _webp_size(head)
    else:
        width, height = _pillow_class(head)(file).size
    if not (width and height):
        raise ValueError(f"{width} x {height} pixels")
    return height, width


def open_image(file: IO[bytes]) -> Image.Image:
    """The image in a file open at its beginning, not decoded yet; what is none raises what its parser raises."""
    image_size(file)  # tells what is no image at all in better words than PIL
    file.seek(0)
    return Image.open(file)


def _pillow_class(head: bytes) -> type[ImageFile]:
    for magic, image_class in PILLOW_FORMATS.items():
        if head.startswith(magic):
            return image_class
    raise ValueError("neither JPEG, PNG, WebP nor BMP" if head else "empty file")


def _webp_size(head: bytes) -> tuple[int, int]:
    """Width and height of a WebP file (RFC 9649, and RFC 6386 for the header of VP8).

    Pillow would read the whole file and allocate two canvases to tell them.
    """
    chunk, tail = head[12:16], head[20:]
    if len(head) == WEBP_HEADER:
        if chunk == b"VP8X":
            return 1 + int.from_bytes(tail[4:7], "little"), 1 + int.from_bytes(tail[7:10], "little")
        if chunk == b"VP8L" and tail[0] == 0x2F:
            packed = int.from_bytes(tail[1:5], "little")
            return 1 + (packed & 0x3FFF), 1 + (packed >> 14 & 0x3FFF)
        if chunk == b"VP8 " and tail[3:6] == b"\x9d\x01\x2a":
            return int.from_bytes(tail[6:8], "little") & 0x3FFF, int.from_bytes(tail[8:10], "little") & 0x3FFF
    raise ValueError("damaged WebP header")


def threads() -> int:
    """How many threads look at files at once."""
    return max(8, len(os.sched_getaffinity(0)))  # they wait for storage more than they compute


def _batches(count: int) -> Iterator[slice]:
    return (slice(first, first + BATCH) for first in range(0, count, BATCH))
