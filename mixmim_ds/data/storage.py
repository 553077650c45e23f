"""How an index is kept: .npy files, memory-mapped, and meta.json, in a folder of their own.

It is built beside that place and renamed into it: it is there as a whole or not at all, and builders that meet do
each other no harm. Nodes that share the folder, but have copies of the source of their own, share the index as well:
each adds when its copy was last changed, rather than to replace what others have mapped.
"""

import errno
import hashlib
import json
import mmap
import platform
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

import numpy as np

FORMAT_VERSION = 1
RESIDENT_BYTES = 1 << 25  # of an array; mapping rows again costs 8 us each, so smaller ones stay as they are
LEFTOVER_S = 7 * 86400  # no build takes a week, so what is older was left by a builder that was killed

T = TypeVar("T")


@dataclass(frozen=True)
class Stored:
    """What a store holds: arrays, memory-mapped once they are stored, and whatever JSON can say."""

    arrays: dict[str, np.ndarray]
    meta: dict[str, Any]


def place_of(index_dir: Path, source: bytes) -> Path:
    """Where below `index_dir` the index of a source lies, which these bytes name."""
    return index_dir / hashlib.sha256(source).hexdigest()[:16]


@dataclass(frozen=True)
class Store(Generic[T]):
    """An index of type T on disk; its two functions may raise what absent and damaged files lead to (`current`)."""

    place: Path
    wrap: Callable[[Stored], T]
    now: Callable[[Stored], Any]  # the state of the source
    state: str  # the name, among arrays or meta, of what that was when the index was built; copies may differ in arrays

    def open(self, build: Callable[[], Stored]) -> T:
        """The index at its place, built there if none is or the source has changed since.

        Raises:
            ValueError: data.index_dir cannot be written.
        """
        index = self.current()
        if index is not None:
            return index
        index_dir = self.place.parent
        try:
            index_dir.mkdir(parents=True, exist_ok=True)
            _remove_leftovers(self.place)
            # NFS keeps what another process still maps, in hidden files that cannot be removed yet
            with tempfile.TemporaryDirectory(
                prefix=f"{self.place.name}.", dir=index_dir, ignore_cleanup_errors=True
            ) as scratch:
                _write(Path(scratch, "index"), build())
                return self._share(Path(scratch)) or self._install(Path(scratch))
        except OSError as error:
            reason = error.strerror or error
            raise ValueError(
                f"data.index_dir={index_dir} cannot be written ({reason}): give a folder that can."
            ) from error

    def current(self) -> T | None:
        """The index at its place, or None if there is no whole one or the source has changed since."""
        try:
            meta = (self.place / "meta.json").read_bytes()
            stored = _read(self.place)
            index = self.wrap(stored)
            now = self.now(stored)
            unchanged = any(np.array_equal(now, state) for state in self._states(stored))
            # or else another builder has changed the place while it was read
            same = (self.place / "meta.json").read_bytes() == meta
        except (OSError, EOFError, ValueError, KeyError, TypeError):  # all that absent and damaged files lead to
            return None
        return index if unchanged and same else None

    def _states(self, stored: Stored) -> Iterator[Any]:
        """That of the source when the index was built, and of each copy that other nodes have found to be the same."""
        yield (stored.meta | stored.arrays)[self.state]
        for file in sorted(self.place.glob(f"{self._added(stored)}*.npy")):
            with suppress(OSError, EOFError, ValueError):  # replaced meanwhile, or damaged: one of those to come may do
                yield np.load(file)

    def _added(self, stored: Stored) -> str:
        """How the names of added states begin; they are of no use to an index that has taken the place meanwhile."""
        return f"{self.state}.{stored.meta['fingerprint'][:16]}."

    def _share(self, scratch: Path) -> T | None:
        """The index at its place, if scratch/index differs from it in nothing but an array of the state, which is added
        to it."""
        try:
            new, there = _read(scratch / "index"), _read(self.place)
            kept = new.arrays.keys() - {self.state}
            same = (np.array_equal(new.arrays[name], there.arrays[name]) for name in kept)
            if new.meta != there.meta or not all(same):
                return None
            index = self.wrap(there)
        except (OSError, EOFError, ValueError, KeyError, TypeError):  # as in `current`
            return None
        release(*there.arrays.values())
        added = self.place / f"{self._added(new)}{platform.node()}.npy"
        with suppress(OSError):  # of another user, or changed by another builder: the next start looks again
            (scratch / "index" / f"{self.state}.npy").rename(added)
        return index

    def _install(self, scratch: Path) -> T:
        """Move scratch/index to its place; an outdated index makes way for it, that of a faster builder stays."""
        index = self.wrap(_read(scratch / "index"))
        while True:
            try:
                (scratch / "index").rename(self.place)
                return index
            except OSError as error:
                if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                    raise
            faster = self.current()
            if faster is not None:
                return faster
            with suppress(FileNotFoundError):  # another builder may have moved it away by now
                self.place.rename(tempfile.mkdtemp(dir=scratch))


def release(*arrays: np.ndarray) -> None:
    """Let go of what reading these memory maps has made resident, if they are large; it stays in the page cache.

    Rows at random would add up to whole tables in the resident memory of every rank, and clusters that kill by the sum
    of it count each rank's share again.
    """
    for array in arrays:
        if isinstance(array.base, mmap.mmap) and array.nbytes > RESIDENT_BYTES:
            array.base.madvise(mmap.MADV_DONTNEED)


def _read(folder: Path) -> Stored:
    """What the folder holds; damage raises what `Store.current` expects."""
    meta = json.loads((folder / "meta.json").read_bytes())
    if meta["version"] != FORMAT_VERSION:
        raise ValueError(f"index of version {meta['version']}")
    arrays = {name: np.load(folder / f"{name}.npy", mmap_mode="r") for name in meta["arrays"]}
    if _describe(arrays) != meta["arrays"]:
        raise ValueError("arrays of another index")
    return Stored(arrays, meta)


def _write(folder: Path, stored: Stored) -> None:
    folder.mkdir()
    for name, array in stored.arrays.items():
        np.save(folder / f"{name}.npy", array)
    meta = stored.meta | {"version": FORMAT_VERSION, "arrays": _describe(stored.arrays)}
    (folder / "meta.json").write_text(json.dumps(meta))


def _describe(arrays: dict[str, np.ndarray]) -> dict[str, list[object]]:
    """Type and shape of arrays, as JSON gives them back."""
    return {name: [array.dtype.str, list(array.shape)] for name, array in arrays.items()}


def _remove_leftovers(place: Path) -> None:
    for scratch in place.parent.glob(f"{place.name}.*"):
        with suppress(OSError):  # gone by now, or another user's
            if time.time() - scratch.stat().st_mtime > LEFTOVER_S:
                shutil.rmtree(scratch)
