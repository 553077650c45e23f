"""Measures: python launch/benchmark.py SUBCOMMAND [key=value ...] [--repeats N] [--warmup N]

key=value are options of a run (mixmim_ds/config.py): model=, precision=, train.micro_batch=, ds=, compile=, ...
Prints medians over repeats after warm-up as a row of BENCHMARKS.md, and as JSON on the last line.
"""

import argparse
import sys
from importlib import import_module

from mixmim_ds.benchmark.report import print_report
from mixmim_ds.train.distributed import RunFailed, end, rank_before_connecting, tell

# Each is a module of mixmim_ds/benchmark with add_options(parser) and measure(arguments) -> Measured.
SUBCOMMANDS = {
    "train": "the training step: img/s, MFU, memory, and where the time goes; also against the plain method",
    "attention": "attention layers alone, each way to attend in turn with the plain one",
    "loader": "DALI alone, in turn with torchvision's DataLoader on the same images; data.root=DIR",
    "checkpoint": "saving and resuming a run's state; run_dir=DIR names the disk to measure",
    "convert": "launch/convert.py on a run's checkpoint: time and peak memory; run_dir=DIR names the disk",
}


def main() -> int:
    """Reads the command line and measures; a mistake ends in one line and exit code 2."""
    about = "\n".join(f"  {name:12}{what}" for name, what in SUBCOMMANDS.items())
    parser = argparse.ArgumentParser(
        description=f"{__doc__}\n{about}", formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("subcommand", choices=SUBCOMMANDS, help="see above; its own options: SUBCOMMAND --help")
    parser.add_argument("words", nargs="*", metavar="key=value", help="options of a run")
    parser.add_argument("--repeats", type=int, default=5, help="of which the median counts (default: 5)")
    parser.add_argument("--warmup", type=int, default=2, help="repeats before those (default: 2)")
    parser.add_argument("--local_rank", help=argparse.SUPPRESS)  # the deepspeed launcher adds it; we read LOCAL_RANK
    chosen = next((word for word in sys.argv[1:] if not word.startswith("-")), None)
    if chosen in SUBCOMMANDS:
        module = import_module(f"mixmim_ds.benchmark.{chosen}")  # no other: DALI and DeepSpeed take seconds
        module.add_options(parser)
    arguments = parser.parse_intermixed_args()  # words and options in any order
    try:
        if arguments.repeats < 1 or arguments.warmup < 0:
            raise ValueError("--repeats must be at least 1 and --warmup at least 0.")
        measured = module.measure(arguments)
    except (ValueError, RunFailed) as error:
        return end(tell(error))
    if rank_before_connecting() == 0:
        print_report(arguments.subcommand, measured)
    return 0


if __name__ == "__main__":
    sys.exit(main())
