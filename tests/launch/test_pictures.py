"""The labelled pictures: which become files, and what is refused; against the real data set where it is to be had."""

import gzip
import hashlib
import importlib.util
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from launching import ROOT, typed
from PIL import Image

from mixmim_ds.commands import exit_code
from mixmim_ds.data.index import open_index


@pytest.fixture
def small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[ModuleType, dict[str, tuple[np.ndarray, ...]]]:
    """The command, for a data set of 60 pictures to learn from and 30 to tell; and these with their labels."""
    spec = importlib.util.spec_from_file_location("pictures", ROOT / "launch" / "pictures.py")
    command = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(command)
    parts, held, dice = {}, {}, np.random.default_rng(0)
    for part, (name, count) in {"train": ("train", 60), "val": ("t10k", 30)}.items():
        images = dice.integers(0, 256, (count, 28, 28), dtype=np.uint8)
        labels = dice.permutation(np.arange(count) % 10).astype(np.uint8)
        sums = []
        for file, header, values in (("images-idx3", 16, images), ("labels-idx1", 8, labels)):
            packed = gzip.compress(bytes(header) + values.tobytes())
            (tmp_path / f"{name}-{file}-ubyte.gz").write_bytes(packed)
            sums.append(hashlib.sha256(packed).hexdigest())
        parts[part], held[part] = (name, count, *sums), (images, labels)
    monkeypatch.setattr(command, "PARTS", parts)
    return command, held


def code_of(command: ModuleType, words: list[str]) -> int:
    """The exit code of a command line."""
    return exit_code(lambda: command.main(words))


def test_the_first_of_each_class_become_files_that_say_their_class(small: tuple, tmp_path: Path) -> None:
    command, held = small
    words = [str(tmp_path / "out"), "--train", "40", "--val", "30", "--source", str(tmp_path)]
    assert code_of(command, words) == 0
    for part, count in (("train", 40), ("val", 30)):
        images, labels = held[part]
        index = open_index(tmp_path / "out" / part, tmp_path / "index")
        assert len(index) == count and sorted(index.classes) == sorted(command.CLASSES)
        for label, name in enumerate(command.CLASSES):
            first = np.flatnonzero(labels == label)[: count // 10]
            files = sorted((tmp_path / "out" / part / name).iterdir())
            assert [int(file.stem) for file in files] == first.tolist()
            assert all(np.array_equal(Image.open(file), images[int(file.stem)]) for file in files)


def test_a_set_that_is_there_is_left_as_it_is(small: tuple, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command, _ = small
    words = [str(tmp_path / "out"), "--val", "10", "--source", str(tmp_path)]
    assert code_of(command, [*words, "--train", "20"]) == 0
    before = {file: file.stat().st_mtime_ns for file in (tmp_path / "out").rglob("*")}
    assert code_of(command, [*words, "--train", "20"]) == 0 and "nothing to do" in capsys.readouterr().out
    assert code_of(command, [*words, "--train", "30"]) == 2 and "is not the set asked for" in capsys.readouterr().err
    assert {file: file.stat().st_mtime_ns for file in (tmp_path / "out").rglob("*")} == before


def test_files_that_are_not_the_data_set_are_refused(
    small: tuple, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command, _ = small
    words = [str(tmp_path / "out"), "--train", "20", "--val", "10", "--source", str(tmp_path)]
    (tmp_path / "t10k-labels-idx1-ubyte.gz").write_bytes(gzip.compress(bytes(38)))
    assert code_of(command, words) == 2 and "its sha256 differs" in capsys.readouterr().err
    (tmp_path / "train-images-idx3-ubyte.gz").unlink()
    assert code_of(command, words) == 2 and "train-images-idx3-ubyte.gz is missing" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("words", ["--train 25", "--train 70", "--train 0"])
def test_counts_that_cannot_be_had_are_refused(
    words: str, small: tuple, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command, _ = small
    assert code_of(command, [str(tmp_path / "out"), *words.split()]) == 2
    option, _ = words.split()
    assert capsys.readouterr().err.startswith(f"error: {option} ") and not (tmp_path / "out").exists()


@pytest.mark.slow
def test_the_real_data_set_is_fetched_and_written(tmp_path: Path) -> None:
    done = typed("launch/pictures.py", tmp_path / "out", "--train", "20", "--val", "10")
    if done.returncode and "apt-get cannot fetch it" in done.stderr:
        pytest.skip(
            "the distribution's package of Fashion-MNIST, whose real pictures would be written, is out of reach"
        )
    assert done.returncode == 0, done.stderr
    boot = Image.open(tmp_path / "out" / "train" / "ankle-boot" / "00000.png")  # the data set's first picture
    assert boot.size == (28, 28) and np.asarray(boot)[:3].sum() == 0 and np.asarray(boot).std() > 50
    assert len(list((tmp_path / "out").glob("*/*/*.png"))) == 30
