"""Pretrains MixMIM: `deepspeed launch/pretrain.py data.root=DIR run_dir=DIR [key=value ...]`."""

import sys

from mixmim_ds.compose import load_config
from mixmim_ds.config import PretrainConfig
from mixmim_ds.train.command import command


def story(config: PretrainConfig) -> int:
    """Pretrains."""
    from mixmim_ds.train.pretrain import pretrain

    return pretrain(config)


if __name__ == "__main__":
    sys.exit(command(__doc__, load_config, story))
