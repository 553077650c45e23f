"""The command line of a run."""

import argparse
import sys
import traceback
from collections.abc import Callable
from dataclasses import asdict
from typing import TypeVar

from omegaconf import OmegaConf

from mixmim_ds.config import RunConfig
from mixmim_ds.train.distributed import RunFailed, end, rank_before_connecting, tell

C = TypeVar("C", bound=RunConfig)


def command(words: str | None, load: Callable[[list[str]], C], story: Callable[[C], int]) -> int:
    """Reads the command line and runs; returns the exit code.

    A user's mistake ends in one line of rank 0 and exit code 2, a run that cannot go on in one line and exit code 1.
    Any other error is shown whole, with a last line that tells it from those of other ranks.

    Args:
        words: what the script is, for --help.
        load: makes the options of the words key=value.
        story: runs with the options, and imports what it needs: a mistake need not wait for the seconds that DeepSpeed
            and DALI take.
    """
    parser = argparse.ArgumentParser(
        description=words,
        epilog="Options: mixmim_ds/config.py, finetune_config.py, launch/conf/.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="Hydra overrides; +experiment=NAME a recipe")
    parser.add_argument("--cfg", choices=["job"], help="print the composed configuration and stop")
    parser.add_argument("--local_rank", help=argparse.SUPPRESS)  # the deepspeed launcher adds it; we read LOCAL_RANK
    arguments = parser.parse_intermixed_args()
    try:
        config = load(arguments.overrides)
        if arguments.cfg:
            print(OmegaConf.to_yaml(OmegaConf.create(asdict(config))))
            return 0
        return story(config)
    except (ValueError, RunFailed) as error:
        return end(tell(error))
    except Exception as error:
        traceback.print_exc()
        reason = f"{type(error).__name__}: {error}".partition("\n")[0]
        print(f"error: rank {rank_before_connecting()}: {reason}", file=sys.stderr)
        return end(1)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return end(130)  # as shells say it of SIGINT
