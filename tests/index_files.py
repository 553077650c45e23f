"""Image files to index, and what an index tells of them."""

from pathlib import Path

from PIL import Image

from mixmim_ds.data.index import Index


def write_image(path: Path, width: int = 8, height: int = 6) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    kind = {".jpg": "JPEG", ".jpeg": "JPEG"}.get(path.suffix.lower(), path.suffix[1:].upper())
    Image.new("RGB", (width, height), "teal").save(path, kind)
    return path


def names(index: Index) -> list[str]:
    return [str(index.path(i).relative_to(index.root)) for i in range(len(index))]


def contents(index: Index) -> tuple:
    """All that an index tells, in objects of their own."""
    return names(index), index.sizes.tolist(), index.labels.tolist(), index.classes, index.fingerprint, index.broken


def place_of(index_dir: Path) -> Path:
    """The one index in the folder, beside which nothing may be left."""
    (place,) = index_dir.iterdir()
    return place
