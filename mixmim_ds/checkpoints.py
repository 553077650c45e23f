"""What is held for good: files and folders written as a whole, and checkpoints.

A checkpoint exists when a folder bears its name and holds COMPLETE.json, which is written last.
"""

import errno
import fcntl
import glob
import hashlib
import json
import logging
import os
import platform
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

MARKER = "COMPLETE.json"
OWNER = ".owner"  # in a hidden folder that is filled: the machine of the process at work there, which locks it
BEST = "best"  # beside the checkpoints, the name of the one that was judged best
log = logging.getLogger(__name__)


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """A draft to write, which then replaces the file: whoever reads that, even after a power cut, finds the old
    content or the new, never a part. If the writing fails the file stays and no draft is left."""
    draft = path.with_name(path.name + ".new")
    try:
        yield draft
        sync(draft)
        draft.replace(path)
        sync(path.parent)
    finally:
        with suppress(OSError):  # where it became the file, or was never begun
            draft.unlink()


@contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """A new folder to fill, which then gets the name; if the filling fails nothing is left of it. A process that is
    killed meanwhile leaves a hidden folder, whose name begins with a dot and this one's, until the next one fills a
    folder of this name on the same machine."""
    path.parent.mkdir(parents=True, exist_ok=True)
    for leftover in path.parent.glob(f".{glob.escape(path.name)}.*/{OWNER}"):
        _remove_if_left(leftover)
    with (
        tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent) as scratch,
        Path(scratch, OWNER).open("w") as owner,
    ):
        with suppress(OSError):  # of a disk without locks: then nobody removes what is left
            fcntl.flock(owner, fcntl.LOCK_EX)
            owner.write(platform.node())
            owner.flush()
        # One folder deeper: the temporary one is closed to other users, which the new one must not be.
        draft = Path(scratch, path.name)
        draft.mkdir()
        yield draft
        draft.rename(path)
    sync(path.parent)


def _remove_if_left(owner: Path) -> None:
    """Removes the hidden folder of a `whole_folder` whose process is gone; that of another machine may be alive, for
    not every disk tells of its locks."""
    with suppress(OSError), owner.open("r+") as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # the kernel lets go of it however a process ends
        if file.read() == platform.node():  # nothing while its process is about to lock it
            shutil.rmtree(owner.parent)


def write_whole(path: Path, text: str) -> None:
    """Replaces a file by this text, see `whole_file`."""
    with whole_file(path) as draft:
        draft.write_text(text)


def append_whole(path: Path, text: str) -> None:
    """Adds to a file all of the text; where that fails with an OSError, none of it."""
    data = text.encode()
    with path.open("ab", buffering=0) as file:
        end = file.seek(0, os.SEEK_END)
        try:
            if file.write(data) != len(data):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError:
            file.truncate(end)
            raise


def sync(path: Path) -> None:
    """Waits until a file, or a folder's list of names, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256(path: Path) -> str:
    """The digest of a file's bytes, hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint folder and what its marker says."""

    path: Path
    step: int
    files: dict[str, tuple[int, str]]  # size in bytes and sha256 of each, by the path inside the folder

    def altered(self, first: int = 0, stride: int = 1) -> list[str]:
        """Those files whose bytes are not what was written, or cannot be read, among files number `first`, first +
        stride, ..."""
        return [name for name in sorted(self.files)[first::stride] if not self._is_whole(name)]

    def _is_whole(self, name: str) -> bool:
        try:
            return sha256(self.path / name) == self.files[name][1]
        except OSError:
            return False

    def complaint(self, altered: list[str]) -> str:
        """The sentence about files that `altered` found."""
        return f"{self.path} is damaged: {altered[0]} is not what was written."


def read_checkpoint(path: Path) -> Checkpoint:
    """The checkpoint in a folder; the bytes of its files are not looked at.

    Raises:
        ValueError: its marker is missing, or a file that the marker names is missing or has another size.
    """
    try:
        marker = json.loads((path / MARKER).read_text())
        files = {name: (size, digest) for name, (size, digest) in marker["files"].items()}
        found = Checkpoint(path, marker["step"], files)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is no complete checkpoint: {MARKER} is missing or unreadable.") from error
    for name, (size, _) in files.items():
        try:
            there = (path / name).stat().st_size
        except OSError:
            there = None
        if there != size:
            raise ValueError(f"{path} is damaged: {name} is missing or not of {size} bytes.")
    return found


def read_whole_checkpoint(path: Path) -> Checkpoint:
    """The checkpoint in a folder, once every byte of it has been read and is what was written.

    Raises:
        ValueError: as `read_checkpoint`, or a file was altered.
    """
    found = read_checkpoint(path)
    if altered := found.altered():
        raise ValueError(found.complaint(altered))
    return found


def steps_of(run_dir: Path) -> list[Path]:
    """The checkpoint folders of a run, complete or not, newest first."""
    return sorted((run_dir / "checkpoints").glob("step_????????"), reverse=True)


def newest_complete(run_dir: Path) -> Checkpoint | None:
    """The newest checkpoint of a run folder that is whole; damaged ones are named in the log and passed over."""
    for path in steps_of(run_dir):
        try:
            return read_whole_checkpoint(path)
        except ValueError as error:
            if not path.exists():  # a run at work has removed it meanwhile, and has a newer one
                return newest_complete(run_dir)
            log.warning("%s It is passed over.", error)
    return None
