"""Which images the tar shards of a WebDataset hold and where: found once, memory-mapped afterwards.

The same contract as the index of a folder (`index`), kept the same way (`storage`). A shard that was written again
has another size or time, or in S3 another ETag, and lets the index be built anew.

N  images    S  shards    T  bytes of all names
"""

import errno
import hashlib
import io
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO, ClassVar

import numpy as np
from tqdm import tqdm

from mixmim_ds.config import DataConfig
from mixmim_ds.data import s3
from mixmim_ds.data.index import Index, Source
from mixmim_ds.data.pattern import find_shards
from mixmim_ds.data.s3_folder import S3Index, open_folder
from mixmim_ds.data.scan import EXTENSIONS, threads
from mixmim_ds.data.spans import SpanReader
from mixmim_ds.data.storage import Store, Stored, place_of, release
from mixmim_ds.data.tars import Contents, Label, read_contents


@dataclass(frozen=True)
class ShardIndex:
    """The images of tar shards, ordered by the names of the shards and then as they lie there; memory-mapped."""

    gives: ClassVar[Source] = "bytes"

    reader: SpanReader  # of the shards
    names: np.ndarray  # uint8 [T], of the images' members, one after the other, encoded as by os.fsencode
    ends: np.ndarray  # int64 [N], where in `names` each ends
    spans: np.ndarray  # int64 [N, 3], shard, offset and size in bytes
    sizes: np.ndarray  # int32 [N, 2], height and width in pixels as stored, EXIF orientation not applied
    labels: np.ndarray  # int32 [N], position in classes, -1 for an image without
    classes: list[str]  # numbers in their order, or else names, sorted
    fingerprint: str  # sha256 of names, sizes in pixels and sizes in bytes; a copy elsewhere has the same one
    broken: list[tuple[str, str]]  # members with an image's extension and no readable header, and why; not in names

    def __len__(self) -> int:
        return len(self.spans)

    def name(self, i: int) -> str:
        """Where image i lies: `train-000001.tar:n01440764_10026.jpg`."""
        member = self.names[self.ends[i - 1] if i else 0 : self.ends[i]].tobytes()
        return f"{os.path.basename(self.reader.paths[self.spans[i, 0]])}:{os.fsdecode(member)}"

    def open(self, i: int) -> IO[bytes]:
        """The content of image i; nothing if it cannot be read."""
        return io.BytesIO(self.reader.read_one(*self.spans[i].tolist()).tobytes())

    def give(self, ids: np.ndarray) -> list[np.ndarray]:
        """What the files of these images hold, uint8 [bytes] each; nothing of one that cannot be read."""
        spans = self.spans[ids]
        release(self.spans, self.sizes)  # the plan has just read the sizes of these images
        return self.reader.read(spans)


Images = Index | S3Index | ShardIndex  # three kinds of storage, one contract


def open_images(data: DataConfig, progress: bool = False) -> Images | None:
    """The index of `data.root`, folder or shards; None for synthetic images. See `open_folder` and `open_shards`."""
    root, index_dir = data.root or "", Path(data.index_dir).expanduser()
    if data.kind == "synthetic":
        return None
    if data.kind == "shards":
        return open_shards(root, index_dir, progress)
    return open_folder(root, index_dir, progress)


def open_shards(pattern: str, index_dir: Path, progress: bool = False) -> ShardIndex:
    """The index of the shards that `pattern` names: that in `index_dir`, or a new one if a shard has changed since.

    Args:
        pattern: paths of tar files, or addresses in S3, with braces and globs (`pattern`).
        index_dir: folder for the indices of any number of data sets, made if missing.
        progress: draw a bar with rate and time left while building.

    Raises:
        ValueError: shards are missing, no plain and whole tar files, or without readable images, or index_dir cannot
            be written.
    """
    paths = [path if s3.is_s3(path) else os.path.abspath(path) for path in find_shards(pattern)]
    source = pattern if s3.is_s3(pattern) else Path(pattern).absolute()
    place = place_of(index_dir, b"shards of " + os.fsencode(source))
    store = Store(place, _wrap, partial(_states_now, paths), state="states")
    return store.open(lambda: _build(pattern, paths, progress))


def _wrap(stored: Stored) -> ShardIndex:
    arrays, meta = stored.arrays, stored.meta
    return ShardIndex(
        reader=SpanReader(meta["shards"]),
        names=arrays["names"],
        ends=arrays["ends"],
        spans=arrays["spans"],
        sizes=arrays["sizes"],
        labels=arrays["labels"],
        classes=meta["classes"],
        fingerprint=meta["fingerprint"],
        broken=[(name, reason) for name, reason in meta["broken"]],
    )


def _states_now(paths: list[str], stored: Stored) -> np.ndarray | None:
    """As `_states_of`; None if they are not the shards that the index is of."""
    return _states_of(paths) if paths == stored.meta["shards"] else None


def _states_of(paths: list[str]) -> np.ndarray:
    """Size in bytes and time of the last change in ns, in S3 a hash of the ETag, int64 [S, 2]; OSError if one is not
    there."""
    if s3.is_s3(paths[0]):
        found = s3.look_up(paths)
        for path in paths:
            if path not in found:
                raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), path)
        return np.array([found[path] for path in paths])
    with ThreadPoolExecutor(threads()) as pool:
        return np.array([(status.st_size, status.st_mtime_ns) for status in pool.map(os.stat, paths)])


def _build(pattern: str, paths: list[str], progress: bool) -> Stored:
    """Look at every member of the shards."""
    states, shards = _read_all(pattern, paths, progress)
    broken = [
        (f"{os.path.basename(path)}:{name}", reason)
        for path, shard in zip(paths, shards, strict=True)
        for name, reason in shard.broken
    ]
    names = [name for shard in shards for name in shard.names]
    if not names:
        raise ValueError(_no_image(pattern, broken, sum(shard.others for shard in shards)))
    rows = np.array([row for shard in shards for row in shard.rows], np.int64)
    numbers = np.repeat(np.arange(len(shards)), [len(shard.names) for shard in shards])
    labels, classes = _classes([label for shard in shards for label in shard.labels])
    arrays = {
        "names": np.frombuffer(b"".join(names), np.uint8),
        "ends": np.cumsum([len(name) for name in names]),
        "spans": np.column_stack([numbers, rows[:, 2:]]),
        "sizes": rows[:, :2].astype(np.int32),
        "labels": labels,
        "states": states,
    }
    digest = hashlib.sha256()
    for part in (arrays["ends"], arrays["names"], np.ascontiguousarray(rows[:, [0, 1, 3]])):
        digest.update(part.data)
    return Stored(arrays, {"shards": paths, "fingerprint": digest.hexdigest(), "classes": classes, "broken": broken})


def _read_all(pattern: str, paths: list[str], progress: bool) -> tuple[np.ndarray, list[Contents]]:
    """Sizes and times of the shards from before they were read, and their contents; ValueError if one cannot be."""

    def read(path: str) -> Contents:
        try:
            return read_contents(path)
        except ValueError as error:
            raise ValueError(f"data.root={pattern}: {path} {error}.") from error
        except OSError as error:
            raise ValueError(f"data.root={pattern}: {path} cannot be read ({error.strerror}): make it so.") from error

    try:
        states = _states_of(paths)
    except OSError as error:
        raise ValueError(
            f"data.root={pattern}: {error.filename} has gone ({error.strerror}): bring it back."
        ) from error
    with ThreadPoolExecutor(threads()) as pool:
        reading = pool.map(read, paths)
        bar = tqdm(reading, "reading shards", len(paths), unit=" shards", disable=None if progress else True)
        return states, list(bar)


def _no_image(pattern: str, broken: list[tuple[str, str]], others: int) -> str:
    if broken:
        return (
            f"data.root={pattern} holds no readable image: all {len(broken):,} members with an image's extension are "
            f"broken, the first is {broken[0][0]} ({broken[0][1]}); give shards of intact images."
        )
    return (
        f"data.root={pattern} holds no image: {b', '.join(EXTENSIONS).decode()} are looked for, but there are only "
        f"{others:,} other members; give shards of images."
    )


def _classes(labels: list[Label]) -> tuple[np.ndarray, list[str]]:
    """Labels int32 [N] as positions in the classes, -1 for none, and the classes."""
    found = {label for label in labels if label is not None}
    numbers = sorted(label for label in found if isinstance(label, int))
    classes = [str(n) for n in numbers] if len(numbers) == len(found) else sorted({str(label) for label in found})
    position = {name: i for i, name in enumerate(classes)}
    return np.array([-1 if label is None else position[str(label)] for label in labels], np.int32), classes
