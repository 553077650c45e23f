"""Exports a run's encoder to timm: `python launch/convert.py RUN_OR_CHECKPOINT OUT_DIR`."""

import argparse
import resource
import sys
import time
from pathlib import Path

import torch

import mixmim_ds  # noqa: F401  registers the encoders
from mixmim_ds.export.to_timm import export

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def main() -> int:
    """Reads the command line and converts; a user's mistake ends in one line and exit code 2."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("source", type=Path, help="a run folder (its newest checkpoint) or one of its checkpoints")
    parser.add_argument("out", type=Path, help="the folder to create: model.safetensors, config.json, README.md")
    parser.add_argument("--dtype", choices=DTYPES, default="fp32", help="of the weights written (default: fp32)")
    parser.add_argument("--with-decoder", action="store_true", help="also write decoder.safetensors")
    parser.add_argument(
        "--architecture-file",
        action="store_true",
        help="also write mixmim.py, for those who have timm alone",
    )
    arguments = parser.parse_args()
    start = time.perf_counter()
    try:
        checkpoint = export(
            arguments.source,
            arguments.out,
            dtype=DTYPES[arguments.dtype],
            with_decoder=arguments.with_decoder,
            architecture_file=arguments.architecture_file,
        )
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    seconds, peak = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"{checkpoint.path} -> {arguments.out} ({seconds:.1f} s, peak memory {peak:.1f} GiB)")
    print(f'load it with: import timm, mixmim_ds; timm.create_model("local-dir:{arguments.out}", pretrained=True)')
    return 0


if __name__ == "__main__":
    sys.exit(main())
