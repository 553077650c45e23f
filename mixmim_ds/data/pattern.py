"""Which files a pattern of tar shards names: `/data/train-{000000..001281}.tar`, `/data/{a,b}-*.tar`."""

import glob
import os
import re

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
    found = {name: [name] if os.path.exists(name) else glob.glob(name, recursive=True) for name in names}
    missing = [name for name, files in found.items() if not files]
    if len(missing) == len(names):
        raise ValueError(f"data.root={pattern} matches no file: give the tar files, as in '/data/train-*.tar'.")
    if missing:
        raise ValueError(
            f"data.root={pattern} names {missing[0]}, which does not exist ({len(missing):,} of {len(names):,} are "
            "missing): bring it there or correct the braces."
        )
    files = {file for files in found.values() for file in files}
    folders = sorted(filter(os.path.isdir, files))
    if folders:
        raise ValueError(
            f"data.root={pattern} names a folder, {folders[0]}: with data=shards give the tar files in it, as in "
            f"'{folders[0].rstrip('/')}/*.tar', or take data=folder."
        )
    return sorted(files, key=lambda file: (os.path.basename(file), file))
