"""Exports a run's encoder to timm: `python launch/convert.py RUN_OR_CHECKPOINT OUT_DIR`."""

import argparse
import sys
from pathlib import Path

import mixmim_ds  # noqa: F401  registers the encoders
from mixmim_ds.export.to_timm import export


def main() -> int:
    """Reads the command line and converts; a user's mistake ends in one line and exit code 2."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("source", type=Path, help="a run folder or one of its checkpoint folders")
    parser.add_argument("out", type=Path, help="the folder to create: model.safetensors and config.json")
    arguments = parser.parse_args()
    try:
        checkpoint = export(arguments.source, arguments.out)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{checkpoint} -> {arguments.out}")
    print(f'load it with: import timm, mixmim_ds; timm.create_model("local-dir:{arguments.out}", pretrained=True)')
    return 0


if __name__ == "__main__":
    sys.exit(main())
