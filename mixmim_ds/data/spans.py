"""Reads pieces of files: a bounded number of files stays open, and many reads wait for the storage at once."""

import os
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache

import numpy as np

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
    """Reads from the files at `paths`, by their position in it."""

    def __init__(self, paths: list[str]) -> None:
        self.paths = paths
        self._open = lru_cache(MAX_OPEN)(OpenFile)
        self._pool = ThreadPoolExecutor(READERS, "span")

    def read(self, spans: np.ndarray) -> list[np.ndarray]:
        """The bytes of each of these spans, int64 [B, 3] of file, offset and length.

        One that is not there, its file having shrunk or gone, is empty, which fails to decode and is named then.
        """
        return list(self._pool.map(self._read_one, *spans.T.tolist()))

    def _read_one(self, file: int, offset: int, length: int) -> np.ndarray:
        try:
            content = self._open(self.paths[file]).read(offset, length)
        except OSError:
            content = b""
        return np.frombuffer(content if len(content) == length else b"", np.uint8)
