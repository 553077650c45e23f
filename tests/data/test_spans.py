"""Reading pieces of files: the right bytes, few open files, and nothing where nothing is."""

import os
import threading
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest

from mixmim_ds.data import spans
from mixmim_ds.data.spans import SpanReader


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    """40 files of 1,000 bytes that tell their number and the position."""
    paths = [tmp_path / f"{i}.bin" for i in range(40)]
    for i, path in enumerate(paths):
        path.write_bytes(b"".join(b"%02d:%03d," % (i, place) for place in range(0, 1000, 7))[:1000])
    return paths


def reader_of(files: list[Path]) -> SpanReader:
    return SpanReader([str(path) for path in files])


def open_below(folder: Path) -> int:
    """How many descriptors of this process lead into a folder."""
    links = []
    for descriptor in os.listdir("/proc/self/fd"):
        with suppress(FileNotFoundError):  # the one of the listing itself
            links.append(os.readlink(f"/proc/self/fd/{descriptor}"))
    return sum(link.startswith(f"{folder}/") for link in links)


def test_few_files_stay_open_and_none_is_mistaken_for_another(
    files: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With one file kept, its number is handed from file to file while 16 threads read."""
    for kept in (1, 5):
        monkeypatch.setattr(spans, "MAX_OPEN", kept)
        reader, rng, most = reader_of(files), np.random.default_rng(0), 0
        contents = [path.read_bytes() for path in files]
        for _ in range(100):
            wanted = np.column_stack([rng.integers(40, size=64), rng.integers(900, size=64), rng.integers(1, 100, 64)])
            found = reader.read(wanted)
            for (file, offset, length), piece in zip(wanted.tolist(), found, strict=True):
                assert piece.dtype == np.uint8 and piece.tobytes() == contents[file][offset : offset + length]
            most = max(most, open_below(tmp_path))
        assert kept <= most <= kept + spans.READERS
        del reader
        assert open_below(tmp_path) == 0


def test_what_cannot_be_read_is_empty(files: list[Path]) -> None:
    files[1].unlink()
    reader = reader_of(files)
    assert len(reader.read(np.array([[2, 900, 100]]))[0]) == 100
    files[2].write_bytes(b"short")
    files[3].unlink()
    files[3].mkdir()
    found = reader.read(np.array([[0, 0, 10], [1, 0, 10], [2, 900, 100], [2, 0, 5], [3, 0, 10], [0, 995, 10]]))
    assert [len(piece) for piece in found] == [10, 0, 0, 5, 0, 0]


def test_a_file_that_is_replaced_stays_what_it_was_while_it_is_open(files: list[Path]) -> None:
    reader = reader_of(files)
    before = reader.read(np.array([[0, 0, 1000]]))[0].tobytes()
    files[1].rename(files[0])
    assert reader.read(np.array([[0, 0, 1000]]))[0].tobytes() == before


def test_reads_wait_side_by_side(tmp_path: Path) -> None:
    """Each read opens a named pipe, which waits for a writer; writers come in the order that reads one by one lack."""
    pipes = [tmp_path / f"{i}.pipe" for i in range(spans.READERS)]
    for pipe in pipes:
        os.mkfifo(pipe)
    found: list[np.ndarray] = []
    reader, wanted = reader_of(pipes), np.array([[i, 0, 1] for i in range(len(pipes))])
    reading = threading.Thread(target=lambda: found.extend(reader.read(wanted)))
    writing = threading.Thread(target=lambda: [os.close(os.open(pipe, os.O_WRONLY)) for pipe in reversed(pipes)])
    for thread in (reading, writing):
        thread.start()
    reading.join(timeout=60)
    side_by_side = not reading.is_alive()
    for pipe in pipes:  # lets go whoever still waits
        os.close(os.open(pipe, os.O_RDWR))
    assert side_by_side
    assert [len(piece) for piece in found] == [0] * len(pipes)  # a pipe has no positions to read from
