"""Patterns: what braces and globs name, and the sentences for what they do not."""

import os
from pathlib import Path

import pytest

from mixmim_ds.data.pattern import expand_braces, find_shards


@pytest.mark.parametrize(
    ("pattern", "names"),
    [
        ("a.tar", ["a.tar"]),
        ("t-{000000..000002}.tar", ["t-000000.tar", "t-000001.tar", "t-000002.tar"]),
        ("{8..11}", ["8", "9", "10", "11"]),
        ("{08..11}", ["08", "09", "10", "11"]),
        ("{0..10..}", None),
        ("{a,b}/{0..1}", ["a/0", "a/1", "b/0", "b/1"]),
        ("{a,{b,0{1..2}}}", ["a", "b", "01", "02"]),
        ("{x}/{y,z}", ["{x}/y", "{x}/z"]),
        ("{a..c}", None),
        ("{3..1}", None),
        ("open{", ["open{"]),
    ],
)
def test_braces_are_those_of_webdataset(pattern: str, names: list[str] | None) -> None:
    if names is None:
        with pytest.raises(ValueError, match="does not count upwards"):
            expand_braces(pattern)
    else:
        assert expand_braces(pattern) == names


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("a/t-2.tar", "b/t-1.tar", "b/t-10.tar", "b/x[1].tar", "b/deep/er/t-3.tar"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    return tmp_path


@pytest.mark.parametrize(
    ("pattern", "files"),
    [
        ("b/t-*.tar", ["b/t-1.tar", "b/t-10.tar"]),
        ("{b,a}/t-*.tar", ["b/t-1.tar", "b/t-10.tar", "a/t-2.tar"]),
        ("{b/t-1,a/t-2,b/t-1}.tar", ["b/t-1.tar", "a/t-2.tar"]),
        ("b/x[1].tar", ["b/x[1].tar"]),
        ("**/t-[23].tar", ["a/t-2.tar", "b/deep/er/t-3.tar"]),
    ],
)
def test_files_are_ordered_by_name_whatever_folder_they_lie_in(folder: Path, pattern: str, files: list[str]) -> None:
    assert [os.path.relpath(file, folder) for file in find_shards(f"{folder}/{pattern}")] == files


@pytest.mark.parametrize(
    ("pattern", "sentence"),
    [
        ("none-*.tar", "data.root={} matches no file: give the tar files, as in '/data/train-*.tar'."),
        ("c/t-{1..2}.tar", "data.root={} matches no file: give the tar files, as in '/data/train-*.tar'."),
        (
            "b/t-{1..11}.tar",
            "data.root={} names {folder}/b/t-2.tar, which does not exist (9 of 11 are missing): bring it there or "
            "correct the braces.",
        ),
        (
            "b/{t,u}-*.tar",
            "data.root={} names {folder}/b/u-*.tar, which does not exist (1 of 2 are missing): bring it there or "
            "correct the braces.",
        ),
        ("t-{a..b}", "data.root={} has {{a..b}}, which does not count upwards: write a range like {{000000..001281}}."),
        (
            "b/",
            "data.root={} names a folder, {folder}/b/: with data=shards give the tar files in it, as in "
            "'{folder}/b/*.tar', or take data=folder.",
        ),
    ],
)
def test_what_is_not_there_is_one_sentence(folder: Path, pattern: str, sentence: str) -> None:
    with pytest.raises(ValueError) as error:
        find_shards(f"{folder}/{pattern}")
    assert str(error.value) == sentence.format(f"{folder}/{pattern}", folder=folder)
