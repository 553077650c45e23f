"""Where a benchmark writes: in a folder of its own on the disk that is to be measured, removed at the end."""

import os
import tempfile
from pathlib import Path


def scratch(words: list[str]) -> tempfile.TemporaryDirectory[str]:
    """A new folder inside run_dir, or where temporary files go if it is not given. ValueError if it cannot be made."""
    chosen = next((word.partition("=")[2] for word in reversed(words) if word.startswith("run_dir=")), None)
    if chosen is not None:
        chosen = os.path.abspath(os.path.expanduser(chosen))  # its users may run in another folder
    if chosen is not None and not Path(chosen).is_dir():
        raise ValueError(f"run_dir={chosen} is no folder; name one on the disk to measure, what is in it stays.")
    try:
        return tempfile.TemporaryDirectory(prefix="benchmark-", dir=chosen)
    except OSError as error:
        raise ValueError(f"run_dir={chosen} cannot be written ({error.strerror}); name another folder.") from error


def size_of(folder: Path) -> int:
    """Bytes of all files in a folder."""
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
