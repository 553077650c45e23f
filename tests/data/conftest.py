"""An S3 server on loopback and what lies there."""

import hashlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from mixmim_ds.data import s3
from mixmim_ds.data.index import open_index
from mixmim_ds.data.pack import pack


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
    from buckets import log_in, serve

    server = serve()
    with pytest.MonkeyPatch.context() as patch:
        log_in(patch, server)
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
