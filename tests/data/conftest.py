"""Image files to index; an S3 server on loopback and what lies there."""

import hashlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from index_files import write_image

from mixmim_ds.data import s3, scan
from mixmim_ds.data.index import open_index
from mixmim_ds.data.pack import pack


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Two classes, one of them nested, an image of each format, and one directly in the root."""
    for place, name in enumerate(["dog/deep/er/x.JPG", "dog/y.png", "cat/é ü.webp", "cat/z.Jpeg", "top.bmp"]):
        write_image(tmp_path / "data" / name, width=20 + place, height=10 + place)
    (tmp_path / "data" / "readme.txt").write_text("no image")
    return tmp_path / "data"


@pytest.fixture
def index_dir(tmp_path: Path) -> Path:
    return tmp_path / "made" / "when missing"


@pytest.fixture
def headers_read(monkeypatch: pytest.MonkeyPatch) -> list[bytes]:
    """The image files that have been opened since."""
    seen: list[bytes] = []
    measure = scan.measure_file

    def count(path: bytes) -> tuple[int, int, int]:
        seen.append(path)
        return measure(path)

    monkeypatch.setattr(scan, "measure_file", count)
    return seen


@pytest.fixture(scope="module")
def disk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """40 images and one that is broken in `images`, and the 40 as five shards in `shards`."""
    from buckets import write_images  # here, for moto takes a second that other files need not wait

    disk = tmp_path_factory.mktemp("disk")
    write_images(disk / "images")
    pack(open_index(disk / "images", disk / "index"), disk / "shards", per_shard=8)
    return disk


@pytest.fixture(scope="module")
def client() -> Iterator[Any]:
    """Of an S3 server on loopback, which the environment names."""
    from buckets import endpoint_of, log_in, serve

    server = serve()
    with pytest.MonkeyPatch.context() as patch:
        log_in(patch, endpoint_of(server))
        s3._client_of.cache_clear()
        yield s3._client_of(os.getpid())
    server.stop()


@pytest.fixture
def forget() -> Iterator[Callable[[], None]]:
    """Lets the next request see the environment as it is by then; called by itself at the end."""
    yield s3._client_of.cache_clear
    s3._client_of.cache_clear()


@pytest.fixture(scope="module")
def bucket(disk: Path, client: Any) -> str:
    """A bucket with what `disk` holds, not to be changed."""
    from buckets import stocked

    return stocked(client, disk, "shared")


@pytest.fixture
def changing(disk: Path, client: Any, tmp_path: Path) -> str:
    """A bucket of the test's own."""
    from buckets import stocked

    return stocked(client, disk, f"own-{hashlib.sha256(os.fsencode(tmp_path)).hexdigest()[:8]}")
