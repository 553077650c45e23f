"""What a tar file in WebDataset's layout holds: where its images lie, their sizes and labels.

Members whose names agree up to the first dot of the basename, their key, are one sample: `dog/01.jpg` and `dog/01.cls`.
Names are keys and nothing else: nothing is ever extracted.

n  images of the file
"""

import json
import os
import tarfile
from dataclasses import dataclass, field
from typing import IO

from mixmim_ds.data import s3
from mixmim_ds.data.scan import SUFFIXES, image_size, reason_of

COMPRESSED = b"\x1f\x8b", b"BZh", b"\xfd7zXZ\0", b"\x28\xb5\x2f\xfd"  # gzip, bzip2, xz, zstd
AHEAD = 1 << 22  # bytes of a request to S3; a tenth of a second for some forty images beats a request for each
LABEL_BYTES = 1 << 20  # a label is short, and a member of any size must not fill the memory

Label = int | str | None


@dataclass
class Contents:
    """The images of a tar file in their order there, hidden members aside."""

    names: list[bytes] = field(default_factory=list)  # [n], of their members
    rows: list[tuple[int, int, int, int]] = field(default_factory=list)  # [n], height, width, offset, bytes
    labels: list[Label] = field(default_factory=list)  # [n], None = none
    broken: list[tuple[str, str]] = field(default_factory=list)  # members with an image's extension, and why not taken
    others: int = 0  # members of other kinds


def read_contents(path: str) -> Contents:
    """Look at every member of a tar file, or of one in S3.

    Raises:
        OSError: it cannot be read.
        ValueError: a phrase that says why it is no whole, plain tar file.
    """
    with s3.open_object(path, AHEAD) if s3.is_s3(path) else open(path, "rb") as file:
        if file.read(6).startswith(COMPRESSED):
            raise ValueError("is compressed, and samples could not be read one by one: unpack it (images gain nothing)")
        file.seek(0)
        try:
            archive = tarfile.TarFile(fileobj=file, encoding="utf-8")
        except (tarfile.TarError, ValueError) as error:
            raise ValueError(f"is no tar file ({error}): take it out or pack it again") from error
        try:
            contents = _walk(archive)
        except (tarfile.TarError, ValueError) as error:
            raise ValueError(f"is cut off or damaged ({error}): copy or pack it again") from error
        file.seek(archive.offset)
        # Python takes whatever is no header for the end; a whole archive ends with a block of zeros
        if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
            raise ValueError(f"is cut off or damaged at byte {archive.offset:,}: copy or pack it again")
    return contents


def _walk(archive: tarfile.TarFile) -> Contents:
    contents, keys, labels = Contents(), [], {}
    for member in archive:
        if member.isdir() or _hidden(member.name):
            continue
        key, extension = split_name(member.name)
        if member.name.lower().endswith(SUFFIXES):
            try:
                size = _measure(archive, member)
            except s3.StorageDown:
                raise
            except Exception as error:  # whatever strikes a parser that meets arbitrary bytes
                contents.broken.append((member.name, reason_of(error)))
                continue
            contents.names.append(os.fsencode(member.name))
            contents.rows.append((*size, member.offset_data, member.size))
            keys.append(key)
        else:
            contents.others += 1
            # .cls is the plainer of the two, so what it says goes before .json
            if extension in ("cls", "json") and member.isreg() and member.size <= LABEL_BYTES:
                label = _label(extension, _content(archive, member).read())
                if label is not None and (extension == "cls" or key not in labels):
                    labels[key] = label
    contents.labels = [labels.get(key) for key in keys]
    return contents


def split_name(name: str) -> tuple[str, str]:
    """Key and extension of a member: `a.b/c.d.jpg` -> `a.b/c`, `d.jpg`."""
    folder, slash, base = name.rpartition("/")
    stem, _, extension = base.partition(".")
    return folder + slash + stem, extension


def _hidden(name: str) -> bool:
    return any(part.startswith(".") and part not in (".", "..") for part in name.split("/"))


def _measure(archive: tarfile.TarFile, member: tarfile.TarInfo) -> tuple[int, int]:
    """Height and width of an image whose bytes lie in one piece."""
    if not member.isreg() or member.issparse():
        raise ValueError("not a regular file")
    return image_size(_content(archive, member))


def _content(archive: tarfile.TarFile, member: tarfile.TarInfo) -> IO[bytes]:
    content = archive.extractfile(member)
    assert content is not None  # as for every regular file
    return content


def _label(extension: str, content: bytes) -> Label:
    """The class that `.cls` or the "label" or "cls" of `.json` tells; None for whatever else is there."""
    try:
        if extension == "cls":
            label = int(content)
        else:
            found = json.loads(content)
            label = found.get("label", found.get("cls"))
    except (ValueError, AttributeError, RecursionError):
        return None
    if isinstance(label, str) or (type(label) is int and label >= 0):
        return label
    return None
