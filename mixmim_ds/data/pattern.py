"""Which files a pattern of tar shards names: `/data/train-{000000..001281}.tar`, `s3://bucket/{a,b}-*.tar`."""

import glob
import os
import re
from concurrent.futures import ThreadPoolExecutor
from fnmatch import fnmatchcase

from mixmim_ds.data import s3
from mixmim_ds.data.scan import threads

CHOICES = re.compile(r"\{([^{}]*(?:,|\.\.)[^{}]*)\}")  # the innermost; braces around one name are its own, as in shells
WILD = re.compile(r"[*?[]")


def expand_braces(pattern: str) -> list[str]:
    """The pattern with each choice of its braces: {a,b} lists them, {08..11} counts, with as many digits as written.

    Raises:
        ValueError: a phrase, for a range that is none of whole numbers, upwards.
    """
    braces = CHOICES.search(pattern)
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
    """The files, or objects in S3, that a pattern of braces and globs names, ordered by their names whatever folder
    they lie in.

    Raises:
        ValueError: one sentence, if there are none, if one that the braces name is missing, or one is a folder, or if
            S3 does not tell.
    """
    try:
        names = expand_braces(pattern)
    except ValueError as error:
        raise ValueError(f"data.root={pattern} {error}.") from error
    with ThreadPoolExecutor(threads()) as pool:  # each look at a file may wait for the storage
        try:
            groups = _objects_of(names) if s3.is_s3(pattern) else pool.map(_files_of, names)
        except OSError as error:
            raise s3.refusal(pattern, error) from error
        found = dict(zip(names, groups, strict=True))
        files = sorted({file for group in found.values() for file in group}, key=lambda file: os.path.split(file)[::-1])
        folders = [file for file, is_folder in zip(files, pool.map(os.path.isdir, files), strict=True) if is_folder]
    missing = [name for name, group in found.items() if not group]
    if len(missing) == len(names):
        example = "s3://bucket" if s3.is_s3(pattern) else "/data"
        raise ValueError(f"data.root={pattern} matches no file: give the tar files, as in '{example}/train-*.tar'.")
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


def _objects_of(names: list[str]) -> list[list[str]]:
    """As `_files_of` of each of them, in S3; the errors are those of `s3.look_up`."""
    wild = {name: match.start() for name in names if (match := WILD.search(name, len(s3.SCHEME)))}
    deep = [name[:start] for name, start in wild.items() if "/" in name[start:]]
    shallow = [name[: wild.get(name)] for name in names if "/" not in name[wild.get(name, len(name)) :]]
    objects = s3.look_up(shallow) | s3.look_up(deep, deep=True)
    paths = {each: each.split("/") for each in objects} if wild else {}

    def matched(name: str) -> list[str]:
        if name in objects or name not in wild:
            return [name] if name in objects else []
        return [each for each, path in paths.items() if _matches(path, name.split("/"))]

    return [matched(name) for name in names]


def _matches(path: list[str], pattern: list[str]) -> bool:
    """Whether glob would find the path by the pattern, both cut at their slashes: hidden names by no wildcard."""
    if not (path and pattern):
        return not (path or pattern)
    if pattern[0] == "**" and len(pattern) > 1:
        beyond = not path[0].startswith(".") and _matches(path[1:], pattern)
        return beyond or _matches(path, pattern[1:])
    hidden = path[0].startswith(".") and not pattern[0].startswith(".")
    return not hidden and fnmatchcase(path[0], pattern[0]) and _matches(path[1:], pattern[1:])
