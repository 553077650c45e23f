"""Checks every node before a run: `srun ... python launch/healthcheck.py [--of finetune] [the options of the run]`.

GPUs present, idle and alike; data and run folder readable, writable, shared and with room for two checkpoints; clocks;
interconnect. Names the node that is not fit and ends with exit code 1, or 2 if an option is wrong. The jobs in this
folder call it; `deepspeed launch/healthcheck.py ...` and `torchrun` start it as well.
"""

import argparse
import sys
from collections.abc import Callable

from mixmim_ds.compose import load_config, load_finetune_config
from mixmim_ds.config import PretrainConfig
from mixmim_ds.finetune_config import FinetuneConfig
from mixmim_ds.train.distributed import RunFailed, end, tell

LOADERS: dict[str, Callable[[list[str]], PretrainConfig | FinetuneConfig]] = {
    "pretrain": load_config,
    "finetune": load_finetune_config,
}
WAIT_S = 300  # a node may have to read gigabytes of libraries from a cold shared disk first


def main() -> int:
    """Reads the command line and checks; a mistake or an unfit node is one line of rank 0."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="those of the run that is to start")
    parser.add_argument("--of", choices=LOADERS, default="pretrain", help="which script is to run (default: pretrain)")
    parser.add_argument("--wait", type=int, default=WAIT_S, help="seconds for nodes to answer (default: %(default)s)")
    parser.add_argument("--local_rank", help=argparse.SUPPRESS)  # the deepspeed launcher adds it; we read LOCAL_RANK
    arguments = parser.parse_intermixed_args()
    try:
        config = LOADERS[arguments.of](arguments.overrides)
        # Here, for a mistake need not wait for the seconds that DeepSpeed and DALI take.
        from mixmim_ds.train.health import healthcheck

        healthcheck(config, arguments.wait)
    except (ValueError, RunFailed) as error:
        return end(tell(error))
    return 0


if __name__ == "__main__":
    sys.exit(main())
