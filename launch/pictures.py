"""Write Fashion-MNIST, real photographs of articles of clothing, as image files with a folder a class.

    python launch/pictures.py OUT_DIR [--train 20000] [--val 2000] [--source DIR]

OUT_DIR/train/<class>/00000.png ... and OUT_DIR/val/<class>/... are the first of each class in the files of the data
set, as many of each, so that a smaller set is part of a larger one. Pictures are grey, 28 x 28 pixels; at most 60,000
to learn from and 10,000 to tell, none in both. The same call writes the same bytes.

Source: Debian's and Ubuntu's package dataset-fashion-mnist, as it is installed, or fetched by apt-get (which needs no
root) where it is not; --source names a folder that holds the four files otherwise. Their sha256 is checked. Licence:
MIT, copyright 2017 Zalando SE (Xiao, Rasul, Vollgraf: Fashion-MNIST, arXiv 1708.07747).
"""

import argparse
import gzip
import hashlib
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from mixmim_ds.checkpoints import whole_folder
from mixmim_ds.commands import exit_code, typed_path

PACKAGE = "dataset-fashion-mnist"
INSTALLED = Path("/usr/share/datasets/fashion-mnist")
CLASSES = ["t-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle-boot"]
SIDE = 28
# Part of the set: the data set's name for it, how many pictures it has, sha256 of the pictures' and the labels' file.
PARTS = {
    "train": (
        "train", 60_000,
        "b0564c3eedabfbf835052cff8503ea422014ce006caf5b757f851416ee8300c7",
        "0ae29f65d86684f32d1b9c85147786c547b9c6aebcaf235f0400a0cce308b056",
    ),
    "val": (
        "t10k", 10_000,
        "cc1d090a38ace84dfa1aa66e3ada7c336ef481a96936906477e6dd344da56eaa",
        "8d3605d196f4be44669e46906da9733c8131fef761fdbfec72c424d5222f1a05",
    ),
}  # fmt: skip
IMAGES_HEADER, LABELS_HEADER = 16, 8  # bytes before the first value (the IDX format)
MARKER = "SOURCES.md"


def fetch(folder: Path) -> Path:
    """Fetches the distribution's package, unpacks it into `folder`, and returns where its files are.

    Raises:
        ValueError: this machine's distribution has no such package.
    """
    try:
        subprocess.run(["apt-get", "download", PACKAGE], cwd=folder, check=True, capture_output=True)
        (archive,) = folder.glob("*.deb")
        subprocess.run(["dpkg-deb", "-x", archive.name, "."], cwd=folder, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError) as error:
        raise ValueError(
            f"{PACKAGE} is not in {INSTALLED} and apt-get cannot fetch it ({error}): install that package of Debian "
            "or Ubuntu, or name the folder that holds its four files by --source DIR."
        ) from error
    return folder / INSTALLED.relative_to("/")


def unpack(file: Path, sha256: str, header: int) -> np.ndarray:
    """The values of an IDX file, uint8 [all of them]. ValueError if it is missing or not the file that is meant."""
    if not file.is_file():
        raise ValueError(f"--source: {file} is missing; name the folder that holds the files of {PACKAGE}.")
    packed = file.read_bytes()
    if hashlib.sha256(packed).hexdigest() != sha256:
        raise ValueError(f"--source: {file} is not the file of Fashion-MNIST (its sha256 differs); fetch it anew.")
    return np.frombuffer(gzip.decompress(packed), np.uint8)[header:]


def read(source: Path, part: str) -> tuple[np.ndarray, np.ndarray]:
    """Pictures uint8 [N, 28, 28] and labels uint8 [N] of train or val. ValueError as `unpack`."""
    name, count, of_images, of_labels = PARTS[part]
    images = unpack(source / f"{name}-images-idx3-ubyte.gz", of_images, IMAGES_HEADER)
    return images.reshape(count, SIDE, SIDE), unpack(source / f"{name}-labels-idx1-ubyte.gz", of_labels, LABELS_HEADER)


def write(out: Path, images: np.ndarray, labels: np.ndarray, count: int) -> None:
    """Writes the first count / 10 pictures of each class, out/<class>/<number in the data set>.png."""
    for label, name in enumerate(tqdm(CLASSES, out.name, unit=" classes", disable=None)):
        (out / name).mkdir(parents=True)
        for number in np.flatnonzero(labels == label)[: count // len(CLASSES)]:
            Image.fromarray(images[number]).save(out / name / f"{number:05d}.png")


def make(out: Path, counts: dict[str, int], source: Path | None) -> str:
    """Brings the set into being where it is not there yet; returns what was done as a sentence.

    Raises:
        ValueError: `out` is something else, or the data set cannot be had.
    """
    parameters = ", ".join(f"{part} {count}" for part, count in counts.items())
    if (out / MARKER).is_file() and parameters in (out / MARKER).read_text().splitlines():
        return f"{out} already holds this set ({parameters}); nothing to do."
    if out.exists():
        raise ValueError(f"OUT_DIR: {out} exists and is not the set asked for; remove it or name another.")
    with tempfile.TemporaryDirectory() as fetched, whole_folder(out) as made:
        files = source or (INSTALLED if INSTALLED.is_dir() else fetch(Path(fetched)))
        for part, count in counts.items():
            write(made / part, *read(files, part), count)
        text = f"# Written by launch/pictures.py\n\n{parameters}\n\n{(__doc__ or '').split('Source: ')[1]}"
        (made / MARKER).write_text(text)
    return f"{out}: pictures of {len(CLASSES)} classes, {parameters}."


def main(arguments: list[str] | None = None) -> int:
    """Reads the command line and makes the set. ValueError on a user's mistake."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=typed_path, metavar="OUT_DIR", help="the folder to make; it must not exist yet")
    parser.add_argument("--train", type=int, default=20_000, help="pictures to learn from (default: %(default)s)")
    parser.add_argument("--val", type=int, default=2_000, help="pictures to tell the class of (default: %(default)s)")
    parser.add_argument(
        "--source", type=typed_path, metavar="DIR", help="holds the four files (default: the distribution's)"
    )
    options = parser.parse_args(arguments)
    counts = {"train": options.train, "val": options.val}
    for part, count in counts.items():
        # Each of the ten classes has a tenth of the pictures, in the data set too.
        if not 0 < count <= PARTS[part][1] or count % len(CLASSES):
            raise ValueError(f"--{part} {count} must be a multiple of {len(CLASSES)} up to {PARTS[part][1]:,}.")
    out = options.out.resolve()
    try:
        print(make(out, counts, options.source))
    except OSError as error:
        raise ValueError(f"OUT_DIR: {out} cannot be written ({error}); name one that can be, with room.") from error
    return 0


if __name__ == "__main__":
    sys.exit(exit_code(main))
