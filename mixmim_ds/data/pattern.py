"""Which files a pattern of tar shards names: `/data/train-{000000..001281}.tar`, `/data/{a,b}-*.tar`."""

import glob
import os
import re
from concurrent.futures import ThreadPoolExecutor

from mixmim_ds.data.scan import threads

INNERMOST = re.compile(r"\{([^{}]*)\}")


def expand_braces(pattern: str) -> list[str]:
    """The pattern with each choice of its braces: {a,b} lists them, {08..11} counts, with as many digits as written.

    Raises:
        ValueError: a phrase, for a range that is none of whole numbers, upwards.
    """
    braces = INNERMOST.search(pattern)
    if braces is None:
        return [pattern]
    before, after = pattern[: braces.start()], pattern[braces.end() :]
    names = [name for choice in _choices(braces[1]) for name in expand_braces(before + choice + after)]
    return list(dict.fromkeys(names))  # nested braces repeat themselves


def _choices(inside: str) -> list[str]:
    first, dots, last = inside.partition("..")
    if not dots:
        return inside.split(",")
    if not (re.fullmatch("[0-9]+", first) and re.fullmatch("[0-9]+", last) and int(first) <= int(last)):
        raise ValueError(f"has {{{inside}}}, which does not count upwards: write a range like {{000000..001281}}")
    padded = any(len(end) > 1 and end.startswith("0") for end in (first, last))
    width = max(len(first), len(last)) if padded else 0
    return [f"{number:0{width}}" for number in range(int(first), int(last) + 1)]


def find_shards(pattern: str) -> list[str]:
    """The files that a pattern of braces and globs names, ordered by their names whatever folder they lie in.

    Raises:
        ValueError: one sentence, if there are none, if one that the braces name is missing, or one is a folder.
    """
    try:
        names = expand_braces(pattern)
    except ValueError as error:
        raise ValueError(f"data.root={pattern} {error}.") from error
    with ThreadPoolExecutor(threads()) as pool:  # each look at a file may wait for the storage
        found = dict(zip(names, pool.map(_files_of, names), strict=True))
        files = sorted({file for group in found.values() for file in group}, key=lambda file: os.path.split(file)[::-1])
        folders = [file for file, is_folder in zip(files, pool.map(os.path.isdir, files), strict=True) if is_folder]
    missing = [name for name, group in found.items() if not group]
    if len(missing) == len(names):
        raise ValueError(f"data.root={pattern} matches no file: give the tar files, as in '/data/train-*.tar'.")
    if missing:
        raise ValueError(
            f"data.root={pattern} names {missing[0]}, which does not exist ({len(missing):,} of {len(names):,} are "
            "missing): bring it there or correct the braces."
        )
    if folders:
        raise ValueError(
            f"data.root={pattern} names a folder, {folders[0]}: with data=shards give the tar files in it, as in "
            f"'{folders[0].rstrip('/')}/*.tar', or take data=folder."
        )
    return files


def _files_of(name: str) -> list[str]:
    return [name] if os.path.exists(name) else glob.glob(name, recursive=True)
