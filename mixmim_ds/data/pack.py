"""Writes the images of a folder as tar shards in WebDataset's layout: `000000012-dog_deep_x.jpg` beside its `.cls`.

Images go into the shards in the order of a hash of their paths. So the bytes of the shards are the same wherever and
whenever they are written, and readers that go through a shard from end to end, as WebDataset does, meet all classes.
"""

import hashlib
import io
import json
import os
import tarfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from tqdm import tqdm

from mixmim_ds.checkpoints import whole_folder
from mixmim_ds.data.index import Index
from mixmim_ds.data.scan import threads

CLASSES = "classes.json"  # the name of each number in the .cls members


def pack(index: Index, out: Path, per_shard: int, progress: bool = False) -> list[Path]:
    """Write the images of a folder into `out`, which appears when it is whole.

    Args:
        out: a folder that is not there yet or empty.
        per_shard: images in each shard but the last.
        progress: draw a bar with rate and time left.

    Returns:
        the shards, `train-000000.tar` and so on; classes.json lies beside them.

    Raises:
        ValueError: `out` is taken or cannot be written, or an image cannot be read.
    """
    if per_shard < 1:
        raise ValueError(f"--per-shard={per_shard} must be a positive number of images.")
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise ValueError(f"OUT={out} is there already and not an empty folder: name another, or remove it.")
    try:
        with whole_folder(out) as draft:
            names = _write_shards(index, draft, per_shard, progress)
            (draft / CLASSES).write_text(json.dumps(index.classes, indent=1))
    except OSError as error:
        raise ValueError(
            f"OUT={out} cannot be written ({error.strerror}): name a place that can, with room."
        ) from error
    return [out / name for name in names]


def _write_shards(index: Index, folder: Path, per_shard: int, progress: bool) -> list[str]:
    """All shards, several at a time; their names."""
    order = _hashed_order(index)
    firsts = range(0, len(order), per_shard)
    names = [f"train-{number:06}.tar" for number in range(len(firsts))]
    with (
        ThreadPoolExecutor(threads()) as pool,
        tqdm(total=len(order), desc="packing", unit=" images", disable=None if progress else True) as bar,
    ):

        def write(first: int, name: str) -> None:
            _write_shard(index, order[first : first + per_shard], first, folder / name, bar)

        list(pool.map(write, firsts, names))  # raises what one of them has raised
    return names


def _hashed_order(index: Index) -> np.ndarray:
    """The images by the hash of their paths, int64 [N]."""
    hashes = [hashlib.blake2b(path.tobytes().rstrip(b"\0"), digest_size=8).digest() for path in index.paths]
    return np.argsort(np.frombuffer(b"".join(hashes), ">u8"), kind="stable")


def _write_shard(index: Index, ids: np.ndarray, first: int, path: Path, bar: tqdm) -> None:
    """The images `ids`, numbered from `first` on: the number keeps keys apart whatever files are called."""
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as archive:
        for number, i in enumerate(ids.tolist(), first):
            stem, extension = os.path.splitext(index.name(i))
            key = f"{number:09}-{stem.replace('/', '_').replace('.', '_')}"
            try:
                content = index.path(i).read_bytes()
            except OSError as error:
                raise ValueError(f"DIR={index.root}: {index.name(i)} cannot be read ({error.strerror}).") from error
            _add(archive, key + extension.lower(), content)
            if index.labels[i] >= 0:
                _add(archive, f"{key}.cls", str(index.labels[i]).encode())
            with bar.get_lock():
                bar.update()


def _add(archive: tarfile.TarFile, name: str, content: bytes) -> None:
    """A member without owner and time, which would tell the same shards apart."""
    member = tarfile.TarInfo(name)
    member.size = len(content)
    archive.addfile(member, io.BytesIO(content))
