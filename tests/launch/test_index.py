"""launch/index.py as a user types it, on real files."""

import os
import shutil
import struct
import subprocess
import zlib
from collections.abc import Callable
from pathlib import Path

import pytest
from broken_files import DAMAGES
from launching import typed
from PIL import Image

from mixmim_ds.data.index import open_index


@pytest.fixture
def look(tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Runs the command, its indices in a folder of the test."""

    def run(*arguments: object) -> subprocess.CompletedProcess[str]:
        done = typed("launch/index.py", *arguments, "--index-dir", tmp_path / "index")
        assert "Traceback" not in done.stderr, done.stderr
        return done

    return run


@pytest.fixture
def copy(photographs: Path, tmp_path: Path) -> Path:
    return shutil.copytree(photographs, tmp_path / "copy")


def png(width: int, height: int, depth: int) -> bytes:
    """An RGB PNG, which Pillow does not write in 16 bits, nor in sizes it cannot hold."""
    rows = (b"\0" + bytes(width * 3 * depth // 8)) * min(height, 100)
    chunks = (
        (b"IHDR", struct.pack(">IIBBBBB", width, height, depth, 2, 0, 0, 0)),
        (b"IDAT", zlib.compress(rows)),
        (b"IEND", b""),
    )
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))
        for name, content in chunks
    )


def test_it_tells_what_the_folder_holds(look: Callable, copy: Path, tmp_path: Path) -> None:
    (copy / "rocket" / "text.jpg").write_text("no picture")
    (copy / "rocket" / "scan.tif").write_bytes(b"II*")  # beside the photographs' own note of what they are
    lines = dict(line.split(maxsplit=1) for line in look(copy).stdout.splitlines())
    index = open_index(copy, tmp_path / "index")
    left_out = "1 files without a readable header are left out; 2 other files are no .bmp, .jpeg, .jpg, .png, .webp"
    assert lines["images"] == f"300; {left_out}"
    assert lines["classes"] == "13" and lines["fingerprint"] == index.fingerprint
    assert lines["sizes"].endswith(f"median of the shorter side {sorted(index.sizes.min(1))[150]:.0f}")
    assert (Path(lines["index"]) / "meta.json").is_file() and [Path(lines["index"])] == list(tmp_path.glob("index/*"))
    assert look(copy).returncode == 0, "it is broken, but nobody asked"


def test_an_intact_folder_is_clean(look: Callable, photographs: Path) -> None:
    done = look(photographs, "--verify")
    assert done.returncode == 0
    assert done.stdout.splitlines()[5:] == ["300 files: 0 broken, 0 too small, 0 too large, 0 odd"]


def test_broken_files_are_listed_with_reasons_whenever_they_broke(look: Callable, copy: Path, tmp_path: Path) -> None:
    files = sorted(copy.rglob("*.jpg"))[:: 300 // (2 * len(DAMAGES))]
    damages = list(DAMAGES.values())
    for i, path in enumerate(files):
        if i == len(damages):
            open_index(copy, tmp_path / "index")
        path.write_bytes(damages[i % len(damages)](path.read_bytes()))
    done = look(copy, "--verify")
    assert done.returncode == 1
    listed = [line for line in done.stdout.splitlines() if line.startswith("broken: ")]
    names = [line.removeprefix("broken: ").split(" (")[0] for line in listed]
    assert sorted(names) == sorted(str(path.relative_to(copy)) for path in files)
    assert all(line.endswith(")") and not line.endswith("()") for line in listed)
    assert done.stdout.splitlines()[-1].startswith(f"300 files: {len(files)} broken, 0 too small")


def test_odd_images_are_listed_and_are_no_failure(look: Callable, copy: Path) -> None:
    image = Image.open(next(copy.glob("chelsea/*.jpg"))).convert("RGB")
    image.resize((40, 31)).save(copy / "small.jpg")
    image.convert("CMYK").save(copy / "print.JPG")
    image.save(copy / "photo.jpeg", "PNG")
    image.save(copy / "film.webp", save_all=True, append_images=[image.rotate(90), image.rotate(180)])
    image.save(copy / "camera.jpg", "MPO", save_all=True, append_images=[image.resize((32, 32))])
    Image.new("I;16", (50, 50)).save(copy / "depth.png")
    Image.new("1", (128, 50)).save(copy / "line.bmp")  # 16 bytes a row, and nothing odd
    (copy / "deep.png").write_bytes(png(50, 50, 16))
    (copy / "huge.png").write_bytes(png(10_000, 9_000, 8))
    os.rename(copy / "photo.jpeg", os.fsencode(copy / "caf") + b"\xe9.jpeg")
    done = look(copy, "--verify")
    assert done.returncode == 0
    assert sorted(done.stdout.splitlines()[5:-1]) == [
        "odd: caf\udce9.jpeg (a PNG by its content)",
        "odd: deep.png (16 bits a channel, of which 8 are used)",
        "odd: depth.png (16 bits a channel, of which 8 are used)",
        "odd: film.webp (animated, 3 frames of which the first is used)",
        "odd: print.JPG (CMYK, for print)",
        "too large: huge.png (10000 x 9000 pixels, more than 89,478,485; not decoded)",
        "too small: small.jpg (40 x 31 pixels, a side under 32)",
    ]
    assert done.stdout.splitlines()[-1] == "309 files: 0 broken, 1 too small, 1 too large, 5 odd"


@pytest.mark.parametrize("words", [["OUT"], ["--per-shard", 10], ["OUT", "--verify"]], ids=str)
def test_words_for_packing_are_refused_where_nothing_is_packed(look: Callable, copy: Path, words: list[object]) -> None:
    done = look(copy, *words)
    assert (done.returncode, done.stdout) == (2, "") and "have no effect without --pack" in done.stderr


def test_mistakes_are_one_line(look: Callable, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for folder, sentence in (("nowhere", "does not exist"), ("empty", "holds no image")):
        done = look(tmp_path / folder, "--verify")
        assert done.returncode == 2 and done.stdout == ""
        assert sentence in done.stderr and done.stderr.count("\n") == 1 and str(tmp_path / folder) in done.stderr
