"""Looks after folders of images; DIR may be s3://bucket/prefix, but for --pack.

python launch/index.py DIR             builds the index that training uses, or opens it if the folder is unchanged
python launch/index.py DIR --verify    decodes every image and lists what is broken, too small, too large or odd
python launch/index.py --pack DIR OUT [--per-shard N]   writes the images as tar shards for data=shards
"""

import argparse
import os
import sys
from collections import Counter
from os.path import expanduser
from pathlib import Path

import numpy as np

from mixmim_ds.commands import exit_code, typed_path
from mixmim_ds.config import DataConfig
from mixmim_ds.data.index import Index, open_index
from mixmim_ds.data.pack import pack
from mixmim_ds.data.s3 import StorageDown, is_s3, refusal
from mixmim_ds.data.s3_folder import S3Index, open_folder
from mixmim_ds.data.scan import SUFFIXES
from mixmim_ds.data.storage import place_of
from mixmim_ds.data.verify import KINDS, verify

PER_SHARD = 10_000


def describe(index: Index | S3Index, place: Path) -> str:
    """What the index holds, a line each."""
    order = np.argsort(index.sizes.prod(1, dtype=np.int64))
    smallest, largest = (f"{width} x {height}" for height, width in index.sizes[order[[0, -1]]].tolist())
    left_out = f"; {len(index.broken):,} files without a readable header are left out" if index.broken else ""
    if index.others:
        left_out += f"; {index.others:,} other files are no {', '.join(SUFFIXES)}"
    return (
        f"images       {len(index):,}{left_out}\n"
        f"classes      {len(index.classes):,}\n"
        f"sizes        {smallest} to {largest} pixels, median of the shorter side "
        f"{np.median(index.sizes.min(1)):.0f}\n"
        f"fingerprint  {index.fingerprint}\n"
        f"index        {place}"
    )


def list_findings(index: Index | S3Index) -> bool:
    """Decodes all images, prints what was found and a summary; whether something is broken."""
    found = list(verify(index, progress=True))
    for finding in found:
        print(f"{finding.kind}: {finding.image} ({finding.reason})")
    count = Counter(finding.kind for finding in found)
    print(f"{len(index) + len(index.broken):,} files: " + ", ".join(f"{count[kind]:,} {kind}" for kind in KINDS))
    return count["broken"] > 0


def pack_folder(arguments: argparse.Namespace) -> str:
    """Packs as asked; returns what was written and how to train on it. ValueError on a user's mistake."""
    if arguments.out is None:
        raise ValueError("--pack wants two folders: DIR, of the images, and OUT, to be made for the shards.")
    if is_s3(arguments.root) or is_s3(arguments.out):
        raise ValueError("--pack reads and writes folders on disk: copy from and to s3:// with `aws s3 sync`.")
    index, out = open_index(Path(arguments.root), arguments.index_dir, progress=True), Path(arguments.out)
    shards = pack(index, out, PER_SHARD if arguments.per_shard is None else arguments.per_shard, progress=True)
    left_out = f" ({len(index.broken):,} broken files left out)" if index.broken else ""
    pattern = out.resolve() / f"train-{{000000..{len(shards) - 1:06}}}.tar"
    return (
        f"{arguments.root} -> {arguments.out}: {len(index):,} images of {len(index.classes):,} classes in "
        f"{len(shards):,} shards{left_out}\ntrain with: data=shards 'data.root={pattern}'"
    )


def main() -> int:
    """Reads the command line and looks; 1 if --verify has found something broken. ValueError on a user's mistake."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("root", type=expanduser, metavar="DIR", help="the folder of the images, data.root of a run")
    parser.add_argument("out", type=expanduser, metavar="OUT", nargs="?", help="with --pack, the folder to make")
    task = parser.add_mutually_exclusive_group()
    task.add_argument("--verify", action="store_true", help="decode every image; exit code 1 if one is broken")
    task.add_argument("--pack", action="store_true", help="write the images of DIR as tar shards")
    parser.add_argument("--per-shard", type=int, metavar="N", help=f"images of a shard (default: {PER_SHARD})")
    parser.add_argument("--index-dir", type=typed_path, default=DataConfig.index_dir, help="default: %(default)s")
    arguments = parser.parse_args()
    sys.stdout.reconfigure(errors="surrogateescape")  # type: ignore[union-attr]  # names need not be UTF-8
    if arguments.pack:
        print(pack_folder(arguments))
        return 0
    if arguments.out is not None or arguments.per_shard is not None:
        raise ValueError("OUT and --per-shard have no effect without --pack; add it or leave them out.")
    try:
        index = open_folder(arguments.root, arguments.index_dir, progress=True)
        print(describe(index, place_of(arguments.index_dir, os.fsencode(index.root))))
        return int(arguments.verify and list_findings(index))
    except StorageDown as error:
        raise refusal(arguments.root, error) from error


if __name__ == "__main__":
    sys.exit(exit_code(main))
