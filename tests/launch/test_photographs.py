"""The demo's photographs: the same bytes every time, whole or not there, and mistakes in one sentence."""

from pathlib import Path

import pytest
from launching import typed

from mixmim_ds.checkpoints import sha256

SCRIPT = "launch/photographs.py"


def digests(folder: Path) -> dict[str, str]:
    """sha256 of every file, by its path in the folder."""
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    return {str(file.relative_to(folder)): sha256(file) for file in files}


def test_the_same_call_writes_the_same_bytes_and_leaves_a_set_that_is_there(tmp_path: Path) -> None:
    first, again = tmp_path / "first", tmp_path / "again"
    for out in (first, again):
        assert typed(SCRIPT, out, "--count", 40, "--size", 32, 64).returncode == 0
    made = digests(first)
    assert made == digests(again) and len(made) == 41 and first.stat().st_mode & 0o055 == 0o055
    assert len({name.split("/")[0] for name in made if "/" in name}) == 13, "photographs"
    assert "nothing to do" in typed(SCRIPT, first, "--count", 40, "--size", 32, 64).stdout
    other = typed(SCRIPT, first, "--count", 50)
    assert other.returncode == 2 and other.stderr.startswith(f"error: OUT_DIR: {first} exists and is not the set asked")
    assert digests(first) == made and sorted(path.name for path in tmp_path.iterdir()) == ["again", "first"]


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["OUT", "--count", "20"], "--count 20 must be at least 21"),
        (["OUT", "--size", "64", "32"], "--size 64 32 must be two numbers MIN <= MAX from 16 to 400"),
        (["OUT", "--views", "-1"], "--views -1 must be 0"),
        (
            ["/proc/none/out", "--count", "30"],
            "OUT_DIR: /proc/none/out cannot be written ([Errno 2] No such file or directory",
        ),
    ],
)
def test_a_mistake_is_one_sentence(words: list[str], sentence: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = typed(SCRIPT, *(str(out) if word == "OUT" else word for word in words))
    assert done.returncode == 2 and done.stderr.startswith("error: ") and sentence in done.stderr, done.stderr
    assert done.stderr.count("\n") == 1 and not any(tmp_path.iterdir())
