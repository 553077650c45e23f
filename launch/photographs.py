"""Cut the real photographs that scikit-image's wheel ships into a set of image files, a folder a photograph.

    python launch/photographs.py OUT_DIR [--count 2000] [--size 96 256] [--views 4]

Nothing is downloaded. OUT_DIR/<photograph>/0000.jpg ... are crops of varied place, shape and scale; the folder
is the class. Most are JPEGs (quality 70 to 95, some progressive, some 4:4:4, the grey ones of one channel), 2 %
are PNG and 2 % WebP. The same call writes the same bytes. Crops of one photograph overlap: a probe on held-out
crops tells whether something was learned, and no more. With --views all crops of a photograph are copies of that
many, in different sizes and encodings: what a small model can learn by heart in minutes.

| folder            | colour | source and licence, as scikit-image 0.26 documents them in skimage/data |
| ----------------- | ------ | ----------------------------------------------------------------------- |
| astronaut         | RGB    | NASA Great Images, Eileen Collins: public domain                        |
| chelsea           | RGB    | Stefan van der Walt: CC0                                                |
| coffee            | RGB    | Rachel Michetti, courtesy of Pikolo Espresso Bar: CC0                   |
| hubble_deep_field | RGB    | NASA, HubbleSite release 2012-37: public domain                         |
| ihc               | RGB    | stained tissue, CMMI: no known copyright restrictions                   |
| motorcycle_left   | RGB    | Middlebury 2014 stereo (Scharstein et al., GCPR 2014): no licence named |
| retina            | RGB    | Mikael Häggström, Wikimedia Commons: CC0 1.0                            |
| rocket            | RGB    | SpaceX: public domain (its Flickr page says CC BY-NC: their issue 5095) |
| brick             | grey   | CC0Textures, Bricks25: CC0                                              |
| camera            | grey   | Lav Varshney: CC0                                                       |
| coins             | grey   | Brooklyn Museum, coins from Pompeii: no known copyright restrictions    |
| grass             | grey   | DeviantArt, linolafett, Grass 01: CC0                                   |
| gravel            | grey   | CC0Textures, Gravel04: CC0                                              |

Left out: moon (no source documented), clock (blurred on purpose), cell (a phase image), microaneurysms (102
pixels), page and text (print), lfw_subset (25 pixels), motorcycle_right (the same scene), and what is drawn.
"""

import argparse
import functools
import importlib.util
import itertools
import math
import os
import random
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from PIL import Image, ImageStat

from mixmim_ds.checkpoints import whole_folder
from mixmim_ds.commands import exit_code, typed_path

# Raise it when the crops of given parameters change, so that an older folder is not taken for the new set.
RECIPE = 2
MARKER = "SOURCES.md"
# Nothing is ever scaled up: of photographs with a shorter side below MIN (chelsea and coins) crops are smaller.
LARGEST_SIDE = 400
LONGEST_ASPECT = 1.6
# Standard deviation of the luminance under which a crop is sky or a scan's border, with nothing to learn.
FLATTEST = 6.0
COLOUR = (
    "astronaut.png",
    "chelsea.png",
    "coffee.png",
    "hubble_deep_field.jpg",
    "ihc.png",
    "motorcycle_left.png",
    "retina.jpg",
    "rocket.jpg",
)
GREY = ("brick.png", "camera.png", "coins.png", "grass.png", "gravel.png")
# A colour photograph gets twice a grey one's crops: no collection of photographs is nearly half grey.
SHARES = dict.fromkeys(COLOUR, 2) | dict.fromkeys(GREY, 1)
FEWEST = sum(SHARES.values())


def wheel_folder() -> Path:
    """The folder of photographs in the installed scikit-image.

    Raises:
        ValueError: it is not there.
    """
    # Not skimage.data.data_dir: where pooch is installed that is a download cache, empty without a network.
    spec = importlib.util.find_spec("skimage")
    if spec is None or spec.origin is None:
        raise ValueError("scikit-image, whose wheel ships the photographs, is missing: pip install scikit-image.")
    folder = Path(spec.origin).parent / "data"
    missing = [name for name in SHARES if not (folder / name).is_file()]
    if missing:
        raise ValueError(f"{folder} lacks {', '.join(missing)}: install scikit-image 0.26 from its wheel.")
    return folder


def load(file: Path) -> Image.Image:
    """Decode one photograph, without its metadata."""
    with Image.open(file) as image:
        image.load()
    # Pillow would copy the colour profile and comments of the source into each of the crops.
    image.info.clear()
    return image


def place(photo: Image.Image, shortest: int, rng: random.Random) -> tuple[int, int, int, int]:
    """Draw a window of a photograph: left, top, right, bottom."""
    aspect = math.exp(rng.uniform(0, math.log(LONGEST_ASPECT)))
    wide, high = (1.0, aspect) if rng.random() < 0.5 else (aspect, 1.0)
    largest = min(photo.width / wide, photo.height / high)
    short = math.exp(rng.uniform(math.log(min(shortest, largest)), math.log(largest)))
    width, height = round(short * wide), round(short * high)
    left, top = rng.randint(0, photo.width - width), rng.randint(0, photo.height - height)
    return left, top, left + width, top + height


def cut(photo: Image.Image, box: tuple[int, int, int, int], bounds: tuple[int, int], rng: random.Random) -> Image.Image:
    """Cut a window, scaled down to a shorter side within the bounds, or as large as it is if that is less."""
    width, height = box[2] - box[0], box[3] - box[1]
    scale = min(1.0, rng.randint(*bounds) / min(width, height))
    return photo.resize((round(width * scale), round(height * scale)), Image.Resampling.LANCZOS, box=box)


def save(crop: Image.Image, stem: Path, number: int, rng: random.Random) -> None:
    """Write one crop, encoded as its number in the whole set and the generator say."""
    quality = rng.randint(70, 95)
    # By number and not by chance, so that the smallest set of a test has each of the formats too.
    if number % 50 == 9:
        crop.save(stem.with_suffix(".png"))
    elif number % 50 == 17:
        crop.save(stem.with_suffix(".webp"), quality=quality)
    else:
        progressive, full_chroma = rng.random() < 0.15, rng.random() < 0.1
        subsampling = "4:4:4" if full_chroma else "4:2:0"
        crop.save(stem.with_suffix(".jpg"), quality=quality, progressive=progressive, subsampling=subsampling)


def cut_class(source: Path, numbers: range, out: Path, size: tuple[int, int], views: int) -> int:
    """Write the crops of one photograph, whose numbers in the whole set are given, and return their bytes."""
    folder = out / source.stem
    folder.mkdir()
    photo = load(source)
    for index, number in enumerate(numbers):
        # A generator a crop: the bytes depend neither on the threads' order nor on the crops before.
        rng = random.Random(f"{source.name}/{index}")
        where = random.Random(f"{source.name}/view {index % views}") if views else rng
        for _ in range(20):
            crop = cut(photo, place(photo, size[0], where), size, rng)
            if ImageStat.Stat(crop.convert("L")).stddev[0] >= FLATTEST:
                break
        save(crop, folder / f"{index:04d}", number, rng)
    return sum(file.stat().st_size for file in folder.iterdir())


def write_set(out: Path, wheel: Path, count: int, size: tuple[int, int], views: int, parameters: str) -> int:
    """Write the whole set into an empty folder, the marker last, and return the images' bytes."""
    ends = [end * count // FEWEST for end in itertools.accumulate(SHARES.values(), initial=0)]
    spans = [range(start, end) for start, end in itertools.pairwise(ends)]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        sources = (wheel / name for name in SHARES)
        work = functools.partial(cut_class, out=out, size=size, views=views)
        written = sum(pool.map(work, sources, spans))
    table = "\n".join(line for line in (__doc__ or "").splitlines() if line.startswith("|"))
    text = f"# Crops of photographs, written by launch/photographs.py\n\n{parameters}\n\n{table}\n"
    (out / MARKER).write_text(text, encoding="utf-8")
    return written


def holds_set(out: Path, parameters: str) -> bool:
    """Tell whether a folder is a finished set of these parameters."""
    marker = out / MARKER
    return marker.is_file() and parameters in marker.read_text("utf-8", errors="replace").splitlines()


def make(out: Path, count: int, size: tuple[int, int], views: int) -> str:
    """Bring the set into being where it is not there yet, and return what was done as a sentence.

    Raises:
        ValueError: `out` is something else, or there are no photographs.
    """
    parameters = f"count {count}, size {size[0]} to {size[1]}, views {views}, recipe {RECIPE}"
    if holds_set(out, parameters):
        return f"{out} already holds this set ({parameters}); nothing to do."
    if out.exists():
        raise ValueError(f"OUT_DIR: {out} exists and is not the set asked for; remove it or name another.")
    wheel, start = wheel_folder(), time.monotonic()
    with whole_folder(out) as draft:
        written = write_set(draft, wheel, count, size, views, parameters)
    seconds = time.monotonic() - start
    return f"{out}: {count} images of {len(SHARES)} photographs, {written / 1e6:.1f} MB, {seconds:.1f} s."


def main() -> int:
    """Read the command line and make the set. ValueError on a user's mistake."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("out", type=typed_path, metavar="OUT_DIR", help="the folder to make; it must not exist yet")
    parser.add_argument("--count", type=int, default=2000, help="images in all (default: %(default)s)")
    bounds = "bounds of the crops' shorter side in pixels (default: 96 256)"
    parser.add_argument("--size", type=int, nargs=2, default=[96, 256], metavar=("MIN", "MAX"), help=bounds)
    parser.add_argument("--views", type=int, default=0, help="windows a photograph (default: each crop its own)")
    options = parser.parse_args()
    low, high = options.size
    if options.count < FEWEST:
        raise ValueError(f"--count {options.count} must be at least {FEWEST}, so that each photograph has a crop.")
    if not 16 <= low <= high <= LARGEST_SIDE:
        raise ValueError(f"--size {low} {high} must be two numbers MIN <= MAX from 16 to {LARGEST_SIDE}.")
    if options.views < 0:
        raise ValueError(f"--views {options.views} must be 0 (each crop its own window) or a number of windows.")
    out = options.out.resolve()
    try:
        print(make(out, options.count, (low, high), options.views))
    except OSError as error:
        raise ValueError(f"OUT_DIR: {out} cannot be written ({error}); name one that can be, with room.") from error
    return 0


if __name__ == "__main__":
    sys.exit(exit_code(main))
