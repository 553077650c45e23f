"""Which images a folder holds: found once, memory-mapped afterwards.

An index lies in index_dir/<hash of the folder's path>/ as .npy files and meta.json. It is built beside that
place and renamed into it: it is there as a whole or not at all, and builders that meet do each other no harm.

N  images    D  directories    L  bytes of the longest path
"""

import errno
import hashlib
import json
import os
import shutil
import tempfile
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mixmim_ds.data import scan

FORMAT_VERSION = 1
LEFTOVER_S = 7 * 86400  # no build takes a week, so what is older was left by a builder that was killed


@dataclass(frozen=True)
class Index:
    """The images of a folder, in the order of the bytes of their relative paths; the arrays are memory-mapped."""

    root: Path
    paths: np.ndarray  # uint8 [N, L], NUL-padded, relative to root, encoded as by os.fsencode
    sizes: np.ndarray  # int32 [N, 2], height and width in pixels as stored, EXIF orientation not applied
    labels: np.ndarray  # int32 [N], position in classes, -1 for an image directly in root
    classes: list[str]  # sorted names of the top-level folders that hold images
    fingerprint: str  # sha256 of paths, sizes in pixels and sizes in bytes; a copy elsewhere has the same one
    broken: list[tuple[str, str]]  # files with an image's extension and no readable header, and why; not in paths

    def __len__(self) -> int:
        return len(self.paths)

    def name(self, i: int) -> str:
        """The path of image i below the root."""
        return os.fsdecode(self.paths[i].tobytes().rstrip(b"\0"))

    def path(self, i: int) -> Path:
        """The file of image i."""
        return self.root / self.name(i)


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
    root = root.resolve()
    place = index_dir / hashlib.sha256(os.fsencode(root)).hexdigest()[:16]
    index = _load_current(place, root)
    if index is not None:
        return index
    try:
        index_dir.mkdir(parents=True, exist_ok=True)
        _remove_leftovers(place)
        # NFS keeps what another process still maps, in hidden files that cannot be removed yet
        with tempfile.TemporaryDirectory(prefix=f"{place.name}.", dir=index_dir, ignore_cleanup_errors=True) as scratch:
            _build(Path(scratch, "index"), root, index_dir, progress)
            return _install(Path(scratch), place, root)
    except OSError as error:
        reason = error.strerror or error
        raise ValueError(f"data.index_dir={index_dir} cannot be written ({reason}): give a folder that can.") from error


def _load_current(place: Path, root: Path) -> Index | None:
    """The index at `place`, or None if there is no whole one or a directory below `root` has changed since."""
    try:
        meta = (place / "meta.json").read_bytes()
        index = _load(place, root)
        current = _directories_unchanged(place, root)
        # or else another builder has changed the place while it was read
        same = (place / "meta.json").read_bytes() == meta
    except (OSError, EOFError, ValueError, KeyError, TypeError):  # all that absent and damaged files lead to
        return None
    return index if current and same else None


def _load(place: Path, root: Path) -> Index:
    """The index at `place`; damage raises OSError, EOFError, ValueError, KeyError or TypeError."""
    meta = json.loads((place / "meta.json").read_bytes())
    if meta["version"] != FORMAT_VERSION:
        raise ValueError(f"index of version {meta['version']}")
    arrays = {name: np.load(place / f"{name}.npy", mmap_mode="r") for name in meta["arrays"]}
    if _describe(arrays) != meta["arrays"]:
        raise ValueError("arrays of another index")
    return Index(
        root=root,
        paths=arrays["paths"],
        sizes=arrays["sizes"],
        labels=arrays["labels"],
        classes=meta["classes"],
        fingerprint=meta["fingerprint"],
        broken=[(name, reason) for name, reason in meta["broken"]],
    )


def _directories_unchanged(place: Path, root: Path) -> bool:
    """Whether all directories have the times they had; raises OSError if one is gone."""
    times = scan.mtimes_of(os.fsencode(root), np.load(place / "directories.npy"))
    return np.array_equal(times, np.load(place / "mtimes.npy"))


def _install(scratch: Path, place: Path, root: Path) -> Index:
    """Move scratch/index to `place`; an outdated index makes way for it, that of a faster builder stays."""
    index = _load(scratch / "index", root)
    while True:
        try:
            (scratch / "index").rename(place)
            return index
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
        faster = _load_current(place, root)
        if faster is not None:
            return faster
        with suppress(FileNotFoundError):  # another builder may have moved it away by now
            place.rename(tempfile.mkdtemp(dir=scratch))


def _remove_leftovers(place: Path) -> None:
    for scratch in place.parent.glob(f"{place.name}.*"):
        with suppress(OSError):  # gone by now, or another user's
            if time.time() - scratch.stat().st_mtime > LEFTOVER_S:
                shutil.rmtree(scratch)


def _build(target: Path, root: Path, index_dir: Path, progress: bool) -> None:
    """Look at every image below `root` and write the index into the new folder `target`."""
    listing = scan.list_images(os.fsencode(root), os.fsencode(index_dir), progress)
    if not len(listing.images):
        raise ValueError(
            f"data.root={root} holds no image: {b', '.join(scan.EXTENSIONS).decode()} are looked for at any "
            f"depth, but there are only {listing.others:,} other files; give the folder that holds the images."
        )
    measured, broken = scan.measure(os.fsencode(root), listing.images, progress)
    readable = measured[:, 0] > 0
    if not readable.any():
        raise ValueError(
            f"data.root={root} holds no readable image: all {len(broken):,} files with an image's extension are "
            f"broken, the first is {broken[0][0]} ({broken[0][1]}); give a folder of intact images."
        )
    names, measured = listing.images[readable], measured[readable]
    paths = _table(names)
    labels, classes = _classes(names)
    arrays = {
        "paths": paths,
        "sizes": measured[:, :2].astype(np.int32),
        "labels": labels,
        "directories": listing.directories,
        "mtimes": listing.mtimes,
    }
    meta = {
        "version": FORMAT_VERSION,
        "root": str(root),
        "fingerprint": _fingerprint(paths, measured),
        "classes": classes,
        "broken": broken,
        "arrays": _describe(arrays),
    }
    target.mkdir()
    for name, array in arrays.items():
        np.save(target / f"{name}.npy", array)
    (target / "meta.json").write_text(json.dumps(meta))


def _describe(arrays: dict[str, np.ndarray]) -> dict[str, list[object]]:
    """Type and shape of arrays, as JSON gives them back."""
    return {name: [array.dtype.str, list(array.shape)] for name, array in arrays.items()}


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
