"""Pretrains MixMIM: `deepspeed launch/pretrain.py data.root=DIR run_dir=DIR [key=value ...]`."""

import argparse
import sys
from dataclasses import asdict

from omegaconf import OmegaConf

from mixmim_ds.config import load_config
from mixmim_ds.train.distributed import RunFailed, tell


def main() -> int:
    """Reads the command line and runs.

    A user's mistake ends in one line of rank 0 and exit code 2, a run that cannot go on in one line and exit code 1.
    """
    parser = argparse.ArgumentParser(description=__doc__, epilog="Options: mixmim_ds/config.py, launch/conf/.")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="Hydra overrides; +experiment=NAME a recipe")
    parser.add_argument("--cfg", choices=["job"], help="print the composed configuration and stop")
    parser.add_argument("--local_rank", help=argparse.SUPPRESS)  # the deepspeed launcher adds it; we read LOCAL_RANK
    arguments = parser.parse_args()
    try:
        config = load_config(arguments.overrides)
        if arguments.cfg:
            print(OmegaConf.to_yaml(OmegaConf.create(asdict(config))))
            return 0
        # Here, for a mistake need not wait for the seconds that DeepSpeed and DALI take.
        from mixmim_ds.train.pretrain import pretrain

        return pretrain(config)
    except (ValueError, RunFailed) as error:
        return tell(error)


if __name__ == "__main__":
    sys.exit(main())
