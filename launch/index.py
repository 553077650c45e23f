"""Looks after data sets.

python launch/index.py --pack DIR OUT [--per-shard N]   writes the images of a folder as tar shards for data=shards
"""

import argparse
import sys
from pathlib import Path

from mixmim_ds.config import DataConfig
from mixmim_ds.data.index import open_index
from mixmim_ds.data.pack import pack


def pack_folder(arguments: argparse.Namespace) -> str:
    """Packs as asked; returns what was written and how to train on it. ValueError on a user's mistake."""
    if arguments.out is None:
        raise ValueError("--pack wants two folders: DIR, of the images, and OUT, to be made for the shards.")
    index = open_index(arguments.root, arguments.index_dir.expanduser(), progress=True)
    shards = pack(index, arguments.out, arguments.per_shard, progress=True)
    left_out = f" ({len(index.broken):,} broken files left out)" if index.broken else ""
    pattern = arguments.out.resolve() / f"train-{{000000..{len(shards) - 1:06}}}.tar"
    return (
        f"{arguments.root} -> {arguments.out}: {len(index):,} images of {len(index.classes):,} classes in "
        f"{len(shards):,} shards{left_out}\ntrain with: data=shards 'data.root={pattern}'"
    )


def main() -> int:
    """Reads the command line; a user's mistake ends in one line and exit code 2."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("root", type=Path, metavar="DIR", help="the folder of the images")
    parser.add_argument("out", type=Path, metavar="OUT", nargs="?", help="with --pack, the folder to make")
    parser.add_argument("--pack", action="store_true", required=True, help="write the images of DIR as tar shards")
    parser.add_argument("--per-shard", type=int, default=10_000, help="images of a shard (default: %(default)s)")
    parser.add_argument("--index-dir", type=Path, default=DataConfig.index_dir, help="default: %(default)s")
    arguments = parser.parse_args()
    try:
        print(pack_folder(arguments))
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
