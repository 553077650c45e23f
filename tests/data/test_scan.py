"""The scan: which files are taken for images, and their sizes from headers alone."""

import os
import shutil
import struct
import warnings
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from mixmim_ds.data import scan


def write_image(path: Path, width: int = 8, height: int = 6, **options: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (width, height)).save(path, **options)
    return path


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for name in ("dog/deep/er/x.png", "dog/y.JPG", "cat/z.Jpeg", "top.bmp"):
        write_image(tmp_path / "data" / name)
    return tmp_path / "data"


def listed(root: Path) -> list[str]:
    """The images below the root, which holds no index."""
    images = scan.list_images(os.fsencode(root), b"/", progress=False).images
    return [os.fsdecode(name) for name in images.tolist()]


def measured(folder: Path) -> tuple[dict[str, list[int]], dict[str, str]]:
    """Height, width and bytes of the readable images of a folder, and why the others are broken."""
    names = np.array(sorted(os.listdir(os.fsencode(folder))))
    rows, broken = scan.measure(os.fsencode(folder), names, scan.measure_file, 8, progress=False)
    sizes = {os.fsdecode(name): row.tolist() for name, row in zip(names.tolist(), rows, strict=True) if row[0]}
    assert set(sizes).isdisjoint(dict(broken)) and len(sizes) + len(broken) == len(names)
    return sizes, dict(broken)


# Directories


def test_images_are_found_at_any_depth_and_sorted(root: Path) -> None:
    assert listed(root) == ["cat/z.Jpeg", "dog/deep/er/x.png", "dog/y.JPG", "top.bmp"]


def test_directories_and_other_files_are_counted(root: Path) -> None:
    for name in ("readme.txt", "cat/noextension", "dog/jpg", ".hidden.txt"):
        (root / name).touch()
    os.utime(root / "cat", ns=(0, 123456789))
    listing = scan.list_images(os.fsencode(root), b"/", progress=False)
    assert listing.others == 3
    times = dict(zip(listing.directories.tolist(), listing.mtimes.tolist(), strict=True))
    assert sorted(times) == [b"", b"cat", b"dog", b"dog/deep", b"dog/deep/er"]
    assert times[b"cat"] == 123456789
    assert np.array_equal(scan.mtimes_of(os.fsencode(root), listing.directories), listing.mtimes)


def test_hidden_files_and_folders_are_skipped(root: Path) -> None:
    before = listed(root)
    for name in (".x.png", ".hidden/x.png", "cat/.cache/deep/x.png", "dog/.y.png"):
        write_image(root / name)
    assert listed(root) == before


def test_the_folder_of_the_index_is_skipped(root: Path) -> None:
    write_image(root / "index" / "x.png")
    listing = scan.list_images(os.fsencode(root), os.fsencode(root / "index"), progress=False)
    assert b"index/x.png" not in listing.images and b"index" not in listing.directories


def test_links_are_followed_and_loops_are_not(root: Path, tmp_path: Path) -> None:
    write_image(tmp_path / "elsewhere" / "linked.png")
    (root / "bird").symlink_to(tmp_path / "elsewhere")
    (root / "fowl").symlink_to(tmp_path / "elsewhere")
    (root / "cat" / "file.png").symlink_to(root / "dog" / "y.JPG")
    (root / "cat" / "up").symlink_to(root)
    (root / "cat" / "itself").symlink_to("itself")
    (tmp_path / "elsewhere" / "back").symlink_to(root)
    found = ["bird/linked.png", "cat/file.png", "cat/z.Jpeg", "dog/deep/er/x.png", "dog/y.JPG", "fowl/linked.png"]
    assert listed(root) == [*found, "top.bmp"]


def test_a_directory_is_listed_once_its_time_can_no_longer_repeat(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    slept: list[float] = []
    monkeypatch.setattr(scan.time, "sleep", slept.append)
    monkeypatch.setattr(scan.time, "time_ns", lambda: 10**18)
    for age in (scan.TICK_NS // 2, scan.TICK_NS, -1):  # a time of the future stems from the clock of a server
        scan._list_folder(os.fsencode(root), 10**18 - age)
    assert slept == [scan.TICK_NS / 2 / 1e9]


def test_a_folder_that_cannot_be_read_is_refused(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def forbidden(path: bytes, mtime_ns: int) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(scan, "_list_folder", forbidden)
    with pytest.raises(ValueError) as refused:
        listed(root)
    assert str(refused.value) == (
        f"data.root={root} cannot be read as a whole: {root}/: Permission denied; make it readable or take it out."
    )


# Headers


def test_sizes_are_height_width_and_bytes(tmp_path: Path) -> None:
    for place, name in enumerate(("a.jpg", "b.png", "c.webp", "d.bmp")):
        write_image(tmp_path / name, width=30 + place, height=20 + place)
    sizes, _ = measured(tmp_path)
    assert sizes == {
        name: [20 + place, 30 + place, (tmp_path / name).stat().st_size] for place, name in enumerate(sorted(sizes))
    }


def test_broken_headers_come_with_reasons(tmp_path: Path) -> None:
    reasons = {
        "empty.jpg": (b"", "empty file"),
        "gif.JPEG": (b"GIF89a" + bytes(100), "neither JPEG, PNG, WebP nor BMP"),
        "text.JPEG": (b"<html>404 Not Found</html>", "neither JPEG, PNG, WebP nor BMP"),
        "zeros.bmp": (bytes(1000), "neither JPEG, PNG, WebP nor BMP"),
        "vp8.webp": (b"RIFF\0\0\0\0WEBPVP8 " + bytes(30), "damaged WebP header"),
        "short.webp": (b"RIFF\0\0\0\0WEBPVP8X", "damaged WebP header"),
        "nothing.webp": (b"RIFF\0\0\0\0WEBPVP8 \0\0\0\0\0\0\0\x9d\x01\x2a\0\0\0\0", "0 x 0 pixels"),
    }
    for name, (content, _) in reasons.items():
        (tmp_path / name).write_bytes(content)
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "gone.png").symlink_to("nowhere")
    (tmp_path / "loop.png").symlink_to("loop.png")
    (tmp_path / "half.png").write_bytes(b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR")
    (tmp_path / "half.jpg").write_bytes(b"\xff\xd8\xff\xe0" + bytes(40))
    write_image(tmp_path / "intact.png")
    sizes, broken = measured(tmp_path)
    assert list(sizes) == ["intact.png"]
    assert {name: broken[name] for name in reasons} == {name: reason for name, (_, reason) in reasons.items()}
    assert broken["pipe.png"] == "not a regular file"
    assert broken["gone.png"] == "No such file or directory"
    assert all(broken.values())


def test_content_decides_what_a_file_is(tmp_path: Path) -> None:
    write_image(tmp_path / "x.png", 30, 20).rename(tmp_path / "x.jpg")
    assert measured(tmp_path)[0]["x.jpg"][:2] == [20, 30]


@pytest.mark.parametrize(
    ("mode", "options", "kind"),
    [
        ("RGB", {}, b"VP8 "),
        ("RGB", {"lossless": True}, b"VP8L"),
        ("RGBA", {"lossless": True}, b"VP8L"),
        ("RGB", {"exif": b"Exif\0\0" + bytes(8)}, b"VP8X"),
    ],
)
@pytest.mark.parametrize(("width", "height"), [(1, 1), (301, 17), (16383, 2), (2, 16383)])
def test_sizes_of_all_kinds_of_webp(
    tmp_path: Path, mode: str, options: dict, kind: bytes, width: int, height: int
) -> None:
    Image.new(mode, (width, height)).save(tmp_path / "x.webp", **options)
    assert (tmp_path / "x.webp").read_bytes()[12:16] == kind
    assert measured(tmp_path)[0]["x.webp"][:2] == [height, width]


def test_orientation_is_not_applied(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # rotated by a quarter
    write_image(tmp_path / "x.jpg", 40, 20, exif=exif)
    assert measured(tmp_path)[0]["x.jpg"][:2] == [20, 40]


def test_huge_photographs_are_measured_without_a_warning(tmp_path: Path) -> None:
    header = struct.pack(">IIBBBBB", 20_000, 20_000, 8, 2, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", b""))
    png = b"".join(struct.pack(">I", len(c)) + n + c + struct.pack(">I", zlib.crc32(n + c)) for n, c in chunks)
    (tmp_path / "x.png").write_bytes(b"\x89PNG\r\n\x1a\n" + png)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert measured(tmp_path)[0]["x.png"][:2] == [20_000, 20_000]


def test_more_images_than_one_batch_keep_their_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scan, "BATCH", 3)
    for i in range(10):
        write_image(tmp_path / f"{i}.png", width=i + 1)
    (tmp_path / "4.png").write_text("broken")
    sizes, broken = measured(tmp_path)
    assert {name: size[1] for name, size in sizes.items()} == {f"{i}.png": i + 1 for i in range(10) if i != 4}
    assert list(broken) == ["4.png"]


def test_removed_directories_are_an_error(root: Path) -> None:
    shutil.rmtree(root / "dog" / "deep")
    with pytest.raises(FileNotFoundError):
        scan.mtimes_of(os.fsencode(root), np.array([b"cat", b"dog/deep"]))
