"""What a model makes of your images: python launch/visualize.py RUN_OR_EXPORT IMAGES... OUT.png

Draws pairs of images with their mix, the mask and both reconstructions, and below them, for each image, those of the
others that are nearest by the encoder's features. IMAGES are files, or folders of them; an export must have been made
with --with-decoder.
"""

import argparse
import sys
from pathlib import Path

import mixmim_ds  # noqa: F401  registers the encoders
from mixmim_ds.commands import exit_code, typed_path
from mixmim_ds.config import check_seed


def visualize(arguments: argparse.Namespace) -> str:
    """Draws the sheet; returns what is on it. ValueError on a user's mistake."""
    out: Path = arguments.out
    if out.suffix.lower() != ".png" or out.exists():
        raise ValueError(f"OUT={out} must be a file that does not exist yet and ends in .png.")
    for name in ("rows", "neighbours"):
        if getattr(arguments, name) < 1:
            raise ValueError(f"--{name} {getattr(arguments, name)} must be positive.")
    check_seed("--seed ", arguments.seed)
    # Here, for a mistake in the words need not wait for the seconds that these take.
    from mixmim_ds.evaluate.look import as_the_model_takes_them, draw_pairs, find_files, find_neighbours, read_images
    from mixmim_ds.evaluate.sheet import Captioned, Sheet
    from mixmim_ds.export.pretrained import load_pretrained

    files = find_files(arguments.images)
    pretrained = load_pretrained(arguments.source)
    pixels = read_images(files, pretrained.options.img_size)
    images = as_the_model_takes_them(pretrained, pixels)
    pairs = draw_pairs(pretrained, images, arguments.rows, arguments.seed)
    places, cosines = find_neighbours(pretrained, images, arguments.rows, arguments.neighbours)
    sheet = Sheet(pixels.shape[-1])
    sheet.title("What the model paints behind the mask")
    sheet.pairs(pairs)
    sheet.title("The nearest of the other images, by the encoder's features")
    for query, (near, alike) in enumerate(zip(places.tolist(), cosines.tolist(), strict=True)):
        found = [Captioned(pixels[i], f"{c:.3f}  {files[i].name}") for i, c in zip(near, alike, strict=True)]
        sheet.row([Captioned(pixels[query], files[query].name), *found])
    try:
        sheet.image().save(out)
    except OSError as error:
        raise ValueError(f"OUT={out} cannot be written ({error.strerror}); choose another file.") from error
    odd = ", the last one mixed with the first" if len(files) % 2 and 2 * len(pairs) > len(files) else ""
    return f"{out}: {len(pairs)} pairs of {len(files):,} images{odd}, and the neighbours of {len(places)}"


def main() -> int:
    """Reads the command line and draws. ValueError on a user's mistake."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=typed_path, metavar="RUN_OR_EXPORT", help="a run, a checkpoint or an export")
    parser.add_argument("images", type=typed_path, nargs="+", metavar="IMAGES", help="image files, or folders of them")
    parser.add_argument("out", type=typed_path, metavar="OUT.png", help="the picture to write")
    parser.add_argument("--neighbours", type=int, default=5, metavar="N", help="of each image (default: %(default)s)")
    parser.add_argument("--rows", type=int, default=8, help="most pairs, and images, drawn (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the masks (default: %(default)s)")
    print(visualize(parser.parse_args()))
    return 0


if __name__ == "__main__":
    sys.exit(exit_code(main))
