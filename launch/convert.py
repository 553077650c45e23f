"""Moves weights between runs, timm and the authors' files.

python launch/convert.py RUN_OR_CHECKPOINT OUT_DIR               a run's encoder, for timm
python launch/convert.py --from-official FILE OUT_DIR            the authors' or OpenMMLab's, for timm
python launch/convert.py --to-official RUN_OR_OUT_DIR OUT_FILE   a run or an OUT_DIR, in the authors' layout
"""

import argparse
import resource
import sys
import time

import torch

import mixmim_ds  # noqa: F401  registers the encoders
from mixmim_ds.commands import exit_code, typed_path
from mixmim_ds.export.card import how_to_load
from mixmim_ds.export.to_official import export_official
from mixmim_ds.export.to_timm import Form, export_file, export_run

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def convert(arguments: argparse.Namespace) -> str:
    """Converts as asked; returns how to load what was written. ValueError on a user's mistake."""
    source, out = arguments.source, arguments.out
    form = Form(DTYPES[arguments.dtype], arguments.with_decoder, arguments.architecture_file)
    if arguments.to_official:
        if form != Form():
            raise ValueError("--dtype, --with-decoder and --architecture-file have no effect with --to-official.")
        export_official(source, out)
        return f'from mixmim_ds.export.official import load_official; load_official(model, "{out}")'
    if arguments.from_official:
        export_file(source, out, form)
    else:
        print(export_run(source, out, form).path)
    return "; ".join(how_to_load(str(out), form.architecture_file))


def main() -> int:
    """Reads the command line and converts. ValueError on a user's mistake."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    direction = parser.add_mutually_exclusive_group()
    direction.add_argument("--from-official", action="store_true", help="SOURCE is the authors' or OpenMMLab's file")
    direction.add_argument("--to-official", action="store_true", help="OUT is a file to write in the authors' layout")
    parser.add_argument(
        "source", type=typed_path, help="a run (its newest checkpoint), one of its checkpoints, or as above"
    )
    parser.add_argument("out", type=typed_path, help="the folder to create: model.safetensors, config.json, README.md")
    parser.add_argument("--dtype", choices=DTYPES, default="fp32", help="of the weights written (default: fp32)")
    parser.add_argument("--with-decoder", action="store_true", help="also write decoder.safetensors")
    parser.add_argument(
        "--architecture-file", action="store_true", help="also write mixmim.py, for those who have timm alone"
    )
    start = time.perf_counter()
    arguments = parser.parse_args()
    usage = convert(arguments)
    seconds, peak = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"{arguments.source} -> {arguments.out} ({seconds:.1f} s, peak memory {peak:.1f} GiB)")
    print(f"load it with: {usage}")
    return 0


if __name__ == "__main__":
    sys.exit(exit_code(main))
