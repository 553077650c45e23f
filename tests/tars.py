"""Writes tar files for tests, with Python's tarfile alone."""

import io
import tarfile
from pathlib import Path

from PIL import Image


def picture(width: int = 40, height: int = 30, kind: str = "JPEG") -> bytes:
    content = io.BytesIO()
    Image.effect_mandelbrot((width, height), (-2, -1, 1, 1), 50).save(content, kind)
    return content.getvalue()


def write_tar(path: Path, members: dict[str, bytes]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path


def members_of(path: Path) -> dict[str, bytes]:
    with tarfile.open(path) as archive:
        return {member.name: archive.extractfile(member).read() for member in archive}
