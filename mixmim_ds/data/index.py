"""Which images a folder holds: found once, memory-mapped afterwards.

An index lies in index_dir/<hash of the folder's path>/ (`storage`).

N  images    D  directories    L  bytes of the longest path
"""

import hashlib
import os
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO, Any, ClassVar, Literal

import numpy as np

from mixmim_ds.data import scan
from mixmim_ds.data.storage import Store, Stored, place_of, release

Source = Literal["paths", "bytes"]  # what an index gives of its images: where their files lie, or what those hold


@dataclass(frozen=True)
class Folder:
    """The images below a root, in the order of the bytes of their relative paths; the arrays are memory-mapped."""

    paths: np.ndarray  # uint8 [N, L], NUL-padded, relative to root, encoded as by os.fsencode
    sizes: np.ndarray  # int32 [N, 2], height and width in pixels as stored, EXIF orientation not applied
    labels: np.ndarray  # int32 [N], position in classes, -1 for an image directly in root
    classes: list[str]  # sorted names of the top-level folders that hold images
    fingerprint: str  # sha256 of paths, sizes in pixels and sizes in bytes; a copy elsewhere has the same one
    broken: list[tuple[str, str]]  # files with an image's extension and no readable header, and why; not in paths
    others: int  # files of other kinds

    def __len__(self) -> int:
        return len(self.paths)

    def name(self, i: int) -> str:
        """Where image i lies, relative to the root."""
        return os.fsdecode(self.paths[i].tobytes().rstrip(b"\0"))


@dataclass(frozen=True)
class Index(Folder):
    """The images of a folder on disk."""

    gives: ClassVar[Source] = "paths"

    root: Path

    def path(self, i: int) -> Path:
        """The file of image i."""
        return self.root / self.name(i)

    def open(self, i: int) -> IO[bytes]:
        """The file of image i, opened; raises OSError if it cannot be."""
        return open(self.path(i), "rb")

    def give(self, ids: np.ndarray) -> np.ndarray:
        """The absolute paths of these images, uint8 [B, L], NUL-padded."""
        names = self.paths[ids]
        release(self.paths, self.sizes)  # the plan has just read the sizes of these images
        root = np.frombuffer(os.fsencode(self.root) + b"/", np.uint8)
        return np.concatenate([np.broadcast_to(root, (len(names), len(root))), names], axis=1)


def open_index(root: Path, index_dir: Path, progress: bool = False) -> Index:
    """The index of the images below `root`: that in `index_dir`, or a new one if a directory has changed since.

    Adding, removing and renaming change a directory; a file that is rewritten in place goes unnoticed.

    Args:
        root: folder of images at any depth; the folders directly in it are the classes.
        index_dir: folder for the indices of any number of data sets, made if missing.
        progress: draw bars with rate and time left while building.

    Raises:
        ValueError: the root is missing, a file, or without readable images, or index_dir cannot be written.
    """
    if not os.path.exists(root):
        raise ValueError(f"data.root={root} does not exist: give the folder that holds the images.")
    if not os.path.isdir(root):
        raise ValueError(f"data.root={root} is a file: give the folder that holds the images.")
    if index_dir.exists() and index_dir.samefile(root):
        raise ValueError(f"data.index_dir={index_dir} is data.root itself, where no image is looked for; name another.")
    root = root.resolve()
    return _store(root, index_dir).open(lambda: _build(root, index_dir, progress))


def _store(root: Path, index_dir: Path) -> Store[Index]:
    place = place_of(index_dir, os.fsencode(root))
    return Store(place, partial(_wrap, root), partial(_times_now, root), state="mtimes")


def _wrap(root: Path, stored: Stored) -> Index:
    return Index(root=root, **fields_of(stored))


def fields_of(stored: Stored) -> dict[str, Any]:
    """Those of a `Folder`."""
    arrays, meta = stored.arrays, stored.meta
    return {
        "paths": arrays["paths"],
        "sizes": arrays["sizes"],
        "labels": arrays["labels"],
        "classes": meta["classes"],
        "fingerprint": meta["fingerprint"],
        "broken": [(name, reason) for name, reason in meta["broken"]],
        "others": meta.get("others", 0),  # older indices did not keep it
    }


def _times_now(root: Path, stored: Stored) -> np.ndarray:
    """When all directories were last changed; raises OSError if one is gone."""
    return scan.mtimes_of(os.fsencode(root), stored.arrays["directories"])


def _build(root: Path, index_dir: Path, progress: bool) -> Stored:
    """Look at every image below `root`."""
    listing = scan.list_images(os.fsencode(root), os.fsencode(index_dir), progress)
    measured, broken = scan.measure(os.fsencode(root), listing.images, scan.measure_file, scan.threads(), progress)
    stored = describe(str(root), listing.images, listing.others, measured, broken)
    return Stored(stored.arrays | {"directories": listing.directories, "mtimes": listing.mtimes}, stored.meta)


def describe(root: str, images: np.ndarray, others: int, measured: np.ndarray, broken: list[tuple[str, str]]) -> Stored:
    """What a `Folder` is wrapped around.

    Args:
        images: relative paths of the files with an image's extension, bytes [n], sorted.
        others: how many other files there are.
        measured, broken: as `scan.measure` has found them.

    Raises:
        ValueError: no image is left.
    """
    if not len(images):
        raise ValueError(
            f"data.root={root} holds no image: {b', '.join(scan.EXTENSIONS).decode()} are looked for at any "
            f"depth, but there are only {others:,} other files; give the folder that holds the images, or data=shards "
            "if these are tar files."
        )
    readable = measured[:, 0] > 0
    if not readable.any():
        raise ValueError(
            f"data.root={root} holds no readable image: all {len(broken):,} files with an image's extension are "
            f"broken, the first is {broken[0][0]} ({broken[0][1]}); give a folder of intact images."
        )
    names, measured = images[readable], measured[readable]
    paths = _table(names)
    labels, classes = _classes(names)
    arrays = {"paths": paths, "sizes": measured[:, :2].astype(np.int32), "labels": labels}
    fingerprint = _fingerprint(paths, measured)
    told = {"classes": classes, "broken": broken, "others": others}
    return Stored(arrays, {"root": root, "fingerprint": fingerprint} | told)


def _table(names: np.ndarray) -> np.ndarray:
    """bytes [N] -> uint8 [N, L], NUL-padded."""
    names = names.astype(f"S{np.strings.str_len(names).max()}", copy=False)
    return names.view(np.uint8).reshape(len(names), -1)


def _classes(names: np.ndarray) -> tuple[np.ndarray, list[str]]:
    """Labels int32 [N], -1 for names without a folder, and the names of the top-level folders they number."""
    top, separator, _ = np.strings.partition(names, b"/")
    folders, labels = np.unique(np.where(separator == b"/", top, b""), return_inverse=True)
    in_root = int(folders[0] == b"")  # sorts before every folder
    return (labels - in_root).astype(np.int32), [os.fsdecode(name) for name in folders[in_root:].tolist()]


def _fingerprint(paths: np.ndarray, measured: np.ndarray) -> str:
    """sha256 of uint8 [N, L] and int64 [N, 3]; the shape tells where one path ends and the next begins."""
    digest = hashlib.sha256(repr(paths.shape).encode())
    digest.update(paths.data)
    digest.update(measured.data)
    return digest.hexdigest()
