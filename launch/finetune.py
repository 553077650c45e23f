"""Fine-tunes a classifier: `deepspeed launch/finetune.py init=EXPORT_OR_RUN data.root=DIR run_dir=DIR [key=value ...]`.

DIR/train and DIR/val of data.root hold a folder for each class. init=random trains from scratch. eval_only=true judges
the classifier that init is, an exported folder or a fine-tuning run, and takes no run_dir.
"""

import sys

from mixmim_ds.compose import load_finetune_config
from mixmim_ds.finetune_config import FinetuneConfig
from mixmim_ds.train.command import command


def story(config: FinetuneConfig) -> int:
    """Fine-tunes, or judges only."""
    from mixmim_ds.train.finetune import evaluate, finetune

    return evaluate(config) if config.eval_only else finetune(config)


if __name__ == "__main__":
    sys.exit(command(__doc__, load_finetune_config, story))
