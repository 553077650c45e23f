"""Tar files: which members are images, their labels, and the files that are refused."""

import gzip
import io
import json
import random
import tarfile
from pathlib import Path

import pytest
from tars import picture, write_tar

from mixmim_ds.data.tars import Contents, read_contents, split_name


def contents_of(tmp_path: Path, members: dict[str, bytes]) -> Contents:
    return read_contents(str(write_tar(tmp_path / "x.tar", members)))


def test_images_are_found_with_their_places(tmp_path: Path) -> None:
    members = {
        "b.JPG": picture(41, 31),
        "b.txt": b"text",
        "a/a.png": picture(42, 32, "PNG"),
        "a/c.webp": picture(43, 33, "WEBP"),
    }
    contents = contents_of(tmp_path, members)
    assert contents.names == [b"b.JPG", b"a/a.png", b"a/c.webp"]
    assert [row[:2] for row in contents.rows] == [(31, 41), (32, 42), (33, 43)]
    whole = (tmp_path / "x.tar").read_bytes()
    for name, (_, _, offset, size) in zip(contents.names, contents.rows, strict=True):
        assert whole[offset : offset + size] == members[name.decode()]
    assert (contents.others, contents.broken) == (1, [])


@pytest.mark.parametrize(
    ("name", "key", "extension"),
    [("a.jpg", "a", "jpg"), ("a.b/c.d.jpg", "a.b/c", "d.jpg"), ("x", "x", ""), ("./a.cls", "./a", "cls")],
)
def test_the_key_ends_at_the_first_dot_of_the_basename(name: str, key: str, extension: str) -> None:
    assert split_name(name) == (key, extension)


@pytest.mark.parametrize(
    ("others", "label"),
    [
        ({"a.cls": b"7\n"}, 7),
        ({"a.json": b'{"label": 3}'}, 3),
        ({"a.json": b'{"cls": "dog"}'}, "dog"),
        ({"a.json": b'{"label": 3}', "a.cls": b"7"}, 7),
        ({"a.cls": b"7", "a.json": b'{"label": 3}'}, 7),
        ({"a.cls": b"seven", "a.json": b'{"label": 3}'}, 3),
        ({"b.cls": b"7"}, None),
        ({"a.cls": b"-1"}, None),
        ({"a.cls": b"\xff\xfe"}, None),
        ({"a.json": b'{"label": '}, None),
        ({"a.json": b'{"label": true}'}, None),
        ({"a.json": b'{"label": 1.5}'}, None),
        ({"a.json": b'["label"]'}, None),
        ({"a.json": b"[" * 100_000}, None),
        ({"a.json": b'{"label": ' + b"9" * 10_000 + b"}"}, None),
        ({"a.json": json.dumps({"label": 3, "caption": "x" * 2_000_000}).encode()}, None),
    ],
)
def test_labels_come_from_cls_or_json(tmp_path: Path, others: dict[str, bytes], label: int | str | None) -> None:
    before = contents_of(tmp_path, others | {"a.jpg": picture()})
    after = contents_of(tmp_path, {"a.jpg": picture()} | others)
    assert before.labels == after.labels == [label]


def test_hidden_members_are_left_out_and_strange_names_are_only_names(tmp_path: Path) -> None:
    strange = ["../../x.jpg", "/etc/y.jpg", "./z.jpg", "a\nb.jpg", "é" * 200 + ".jpg"]
    hidden = [".a.jpg", "._b.jpg", ".cache/c.jpg", "d/.e/f.jpg"]
    contents = contents_of(tmp_path / "in", dict.fromkeys(strange + hidden, picture()))
    assert [name.decode() for name in contents.names] == strange
    assert sorted(tmp_path.rglob("*")) == [tmp_path / "in", tmp_path / "in" / "x.tar"]


def test_names_that_are_no_utf8_are_kept(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "x.tar", "w", format=tarfile.GNU_FORMAT, encoding="latin-1") as archive:
        member = tarfile.TarInfo("caf\xe9.jpg")
        member.size = len(picture())
        archive.addfile(member, io.BytesIO(picture()))
    assert read_contents(str(tmp_path / "x.tar")).names == [b"caf\xe9.jpg"]


def test_members_that_are_no_image_are_told(tmp_path: Path) -> None:
    write_tar(tmp_path / "x.tar", {"empty.jpg": b"", "text.jpg": b"text", "half.jpg": picture()[:10]})
    with tarfile.open(tmp_path / "x.tar", "a") as archive:
        for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.DIRTYPE):
            member = tarfile.TarInfo(f"{kind.decode()}.jpg")
            member.type, member.linkname = kind, "/etc/passwd"
            archive.addfile(member)
    contents = read_contents(str(tmp_path / "x.tar"))
    assert contents.names == contents.rows == contents.labels == []
    reasons = dict(contents.broken)
    assert reasons.pop("half.jpg")
    assert reasons == {"empty.jpg": "empty file", "text.jpg": "neither JPEG, PNG, WebP nor BMP"} | dict.fromkeys(
        ("2.jpg", "1.jpg", "6.jpg"), "not a regular file"
    )


def refusal(path: Path) -> str:
    with pytest.raises(ValueError) as refused:
        read_contents(str(path))
    return str(refused.value)


def test_what_is_no_plain_tar_is_refused(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "x.tar", {"a.jpg": picture()})
    whole = path.read_bytes()
    for content, phrase in (
        (b"text, but no archive", "is no tar file"),
        (b"", "is no tar file (empty file)"),
        (picture(200, 200), "is no tar file"),
        (gzip.compress(whole), "is compressed, and samples could not be read one by one: unpack it"),
    ):
        path.write_bytes(content)
        assert refusal(path).startswith(phrase)


def test_an_archive_without_members_holds_nothing(tmp_path: Path) -> None:
    assert contents_of(tmp_path, {}).names == []


def test_an_archive_that_is_cut_off_anywhere_is_refused(tmp_path: Path) -> None:
    members = {f"{i}.{kind}": content for i in range(3) for kind, content in (("jpg", picture()), ("cls", b"1"))}
    path = write_tar(tmp_path / "x.tar", members)
    whole = path.read_bytes()
    with tarfile.open(path) as archive:
        end = archive.getmembers()[-1].offset_data + tarfile.BLOCKSIZE
    for size in (*range(512, end + 1, 512), *range(700, end, 977)):
        path.write_bytes(whole[:size])
        assert refusal(path).startswith("is cut off or damaged"), size
    path.write_bytes(whole[:1024] + b"x" + whole[1025:])  # in an image, where nobody can notice
    assert len(read_contents(str(path)).names) == 3


def test_damage_anywhere_raises_nothing_else(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "x.tar", {f"{i}.{kind}": picture() for i in range(3) for kind in ("jpg", "json")})
    whole, rng = path.read_bytes(), random.Random(0)
    refused = 0
    for _ in range(300):
        damaged = bytearray(whole)
        start = rng.randrange(0, len(whole) - 512, 512)  # where headers begin
        for _ in range(rng.choice([1, 8, 200])):
            damaged[start + rng.randrange(512)] = rng.randrange(256)
        path.write_bytes(damaged)
        try:
            read_contents(str(path))
        except ValueError:
            refused += 1
    assert refused > 20
