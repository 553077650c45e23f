"""Reads pieces of files or of objects in S3: few files stay open, and many reads wait for the storage at once."""

import os
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache

import numpy as np

from mixmim_ds.data import s3

MAX_OPEN = 256  # files; processes may open 1,024 as a rule, and DALI, torch and DeepSpeed want some too
READERS = 16  # threads, which wait more than they compute


class OpenFile:
    """A file that is closed once nobody holds it: closed any earlier, its number could go to another one meanwhile."""

    def __init__(self, path: str) -> None:
        self.descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def read(self, offset: int, length: int) -> bytes:
        """What is there of these bytes. As a method, it holds the file until it has read."""
        return os.pread(self.descriptor, length, offset)

    def __del__(self) -> None:
        if hasattr(self, "descriptor"):
            os.close(self.descriptor)


class SpanReader:
    """Reads from the files at `paths`, or the objects at such addresses, by their position in it."""

    def __init__(self, paths: list[str]) -> None:
        self.paths = paths
        self._open = lru_cache(MAX_OPEN)(OpenFile)
        self._pool = ThreadPoolExecutor(s3.CONNECTIONS if any(map(s3.is_s3, paths)) else READERS, "span")

    def read(self, spans: np.ndarray) -> list[np.ndarray]:
        """The bytes of each of these spans, int64 [B, 3] of file, offset and length.

        One that is not there, its file having shrunk or gone, is empty, which fails to decode and is named then.

        Raises:
            StorageDown: S3 as a whole fails.
        """
        return list(self._pool.map(self.read_one, *spans.T.tolist()))

    def read_one(self, file: int, offset: int, length: int) -> np.ndarray:
        """As `read`, of one span and by this thread: a forked process has the pool, but not its threads."""
        path = self.paths[file]
        try:
            content = s3.read(path, offset, length) if s3.is_s3(path) else self._open(path).read(offset, length)
        except s3.StorageDown:
            raise
        except OSError:
            content = b""
        return np.frombuffer(content if len(content) == length else b"", np.uint8)
