"""The pictures in a run's TensorBoard files, without reading its curves.

A long run has a million points there, each a record of its own, which TensorBoard's reader would parse one by one.
"""

import io
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from PIL import Image
from tensorboard.compat.proto.event_pb2 import Event

TAGS = ("reconstructions", "augmented")  # of pretraining, of fine-tuning
SMALLEST = 1024  # bytes of a record that may hold a picture; a point of a curve takes under 100


@dataclass(frozen=True)
class Place:
    """Where a record with a picture lies."""

    file: Path
    offset: int
    length: int

    def read(self) -> tuple[int, bytes] | None:
        """The step and the PNG, if the record is a picture of ours."""
        with self.file.open("rb") as file:
            file.seek(self.offset)
            event = Event.FromString(file.read(self.length))
        return next(((event.step, v.image.encoded_image_string) for v in event.summary.value if v.tag in TAGS), None)


def read_pictures(folder: Path) -> list[tuple[int, bytes]]:
    """The first, the middle and the last picture of event files: step, and WebP, a tenth of the PNG."""
    places: dict[int, Place] = {}  # of a step that was drawn twice, the later one
    for file in sorted(folder.glob("events.out.tfevents.*")):
        for place in _large_records(file):
            if found := place.read():
                places[found[0]] = place
    steps = sorted(places)
    chosen = sorted({steps[0], steps[len(steps) // 2], steps[-1]}) if steps else []
    return [(step, _smaller(found[1])) for step in chosen if (found := places[step].read())]


def _large_records(path: Path) -> Iterator[Place]:
    """TFRecord: length (8 bytes), its checksum (4), the record, its checksum (4); a last one may be incomplete."""
    size = path.stat().st_size
    with path.open("rb") as file:
        while len(head := file.read(12)) == 12:
            length, start = struct.unpack_from("<Q", head)[0], file.tell()
            if start + length > size:
                return
            if length >= SMALLEST:
                yield Place(path, start, length)
            file.seek(start + length + 4)


def _smaller(png: bytes) -> bytes:
    out = io.BytesIO()
    Image.open(io.BytesIO(png)).save(out, "WEBP", quality=88)
    return out.getvalue()
