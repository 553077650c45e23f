"""Which images lie below a prefix in S3: the same contract as the index of a folder on disk (`index`).

Keys are what paths are there, so a copy on disk has the same images in the same rows and the same fingerprint.

N  images    n  objects with an image's extension
"""

import hashlib
import io
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import IO, ClassVar

import numpy as np
from tqdm import tqdm

from mixmim_ds.data import s3, scan
from mixmim_ds.data.index import Folder, Index, Source, describe, fields_of, open_index
from mixmim_ds.data.storage import Store, Stored, place_of, release

AHEAD = 1 << 15  # bytes of a request for a header; most lie within, a camera's preview may take one more


@dataclass(frozen=True)
class S3Index(Folder):
    """The images below a prefix in S3."""

    gives: ClassVar[Source] = "bytes"

    root: str  # s3://bucket/prefix/
    _pool: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(s3.CONNECTIONS, "s3"), repr=False)

    def open(self, i: int) -> IO[bytes]:
        """The content of image i; raises OSError if it cannot be had."""
        return io.BytesIO(s3.read(self.root + self.name(i)))

    def give(self, ids: np.ndarray) -> list[np.ndarray]:
        """What the objects of these images hold, uint8 [bytes] each; nothing of one that cannot be had.

        Raises:
            StorageDown: S3 as a whole fails.
        """
        names = [self.name(i) for i in ids.tolist()]
        release(self.paths, self.sizes)  # the plan has just read the sizes of these images
        return list(self._pool.map(self._give_one, names))

    def _give_one(self, name: str) -> np.ndarray:
        try:
            content = s3.read(self.root + name)
        except s3.StorageDown:
            raise
        except OSError:
            content = b""
        return np.frombuffer(content, np.uint8)


@dataclass(frozen=True)
class Listing:
    """What lies below a prefix, hidden names aside."""

    images: np.ndarray  # bytes [n], keys with an image's extension relative to the prefix, sorted
    states: np.ndarray  # int64 [n, 2], of them: sizes in bytes and hashes of the ETags
    others: int  # objects of other kinds

    def digest(self) -> str:
        """What changes when an image is added, removed, renamed or written again."""
        digest = hashlib.sha256(repr(self.images.dtype).encode())
        digest.update(self.images.tobytes())
        digest.update(self.states.tobytes())
        return digest.hexdigest()


def open_folder(root: str, index_dir: Path, progress: bool = False) -> Index | S3Index:
    """The index of the images below `root`, on disk (`open_index`) or at s3://bucket/prefix: that in `index_dir`, or a
    new one if an object has changed since.

    Args:
        root: folder or prefix of images at any depth; the folders directly in it are the classes.
        index_dir: folder for the indices of any number of data sets, made if missing.
        progress: draw bars with rate and time left while building.

    Raises:
        ValueError: the root cannot be read or is without readable images, or index_dir cannot be written.
    """
    if not s3.is_s3(root):
        return open_index(Path(root), index_dir, progress)
    root = s3.SCHEME + root.removeprefix(s3.SCHEME).rstrip("/") + "/"
    try:
        listing = _list(root, progress)
    except OSError as error:
        raise s3.refusal(root, error) from error
    place = place_of(index_dir, os.fsencode(root))
    store = Store(place, partial(_wrap, root), lambda _: listing.digest(), state="objects")
    return store.open(lambda: _build(root, listing, progress))


def _wrap(root: str, stored: Stored) -> S3Index:
    return S3Index(root=root, **fields_of(stored))


def _list(root: str, progress: bool) -> Listing:
    """What lies below the root; OSError if S3 does not tell.

    A listing comes in pages of 1,000 objects, one after the other; so the folders in the root are listed side by side.
    """
    bucket, prefix = s3.split(root)
    keys, states, folders = s3.list_objects(bucket, prefix, deep=False)
    start = len(os.fsencode(prefix))
    found = [_sift(keys, states, start)]
    with (
        ThreadPoolExecutor(s3.CONNECTIONS) as pool,
        tqdm(desc="listing", unit=" images", disable=None if progress else True) as bar,
    ):

        def list_folder(folder: str) -> tuple[np.ndarray, np.ndarray, int]:
            keys, states, _ = s3.list_objects(bucket, folder, deep=True)
            return _sift(keys, states, start)

        for part in pool.map(list_folder, folders):
            found.append(part)
            bar.update(len(part[0]))
    images = np.concatenate([names for names, _, _ in found])
    order = np.argsort(images)
    of_images = np.concatenate([states for _, states, _ in found])
    return Listing(images[order], of_images[order], sum(others for _, _, others in found))


def _sift(keys: np.ndarray, states: np.ndarray, start: int) -> tuple[np.ndarray, np.ndarray, int]:
    """The images among objects, by their names behind the first bytes, their states, and the number of the others."""
    names = [key[start:] for key in keys.tolist()]
    visible = [b"/." not in b"/" + name for name in names]
    taken = [seen and name.lower().endswith(scan.EXTENSIONS) for name, seen in zip(names, visible, strict=True)]
    chosen = np.array(taken, bool)
    return np.array(names, "S")[chosen], states[chosen], sum(visible) - sum(taken)


def _build(root: str, listing: Listing, progress: bool) -> Stored:
    """Look at every image below the root."""
    try:
        measured, broken = scan.measure(os.fsencode(root), listing.images, _look, s3.CONNECTIONS, progress)
    except s3.StorageDown as error:
        raise s3.refusal(root, error) from error
    measured[:, 2] = np.where(measured[:, 0] > 0, listing.states[:, 0], 0)
    stored = describe(root, listing.images, listing.others, measured, broken)
    return Stored(stored.arrays, stored.meta | {"objects": listing.digest()})


def _look(address: bytes) -> tuple[int, int, int]:
    """Height and width of an image; its bytes are known from the listing."""
    with s3.open_object(os.fsdecode(address), AHEAD) as file:
        return *scan.image_size(file), 0
