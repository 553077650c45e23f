"""launch/finetune.py, which is asked to stop in such a way that it stops after step ASKED."""

import os
import sys

from mixmim_ds.compose import load_finetune_config
from mixmim_ds.train.command import command
from mixmim_ds.train.finetune import finetune
from mixmim_ds.train.stop import StopRequest

steps = iter(range(1, 1000))
StopRequest.agreed = lambda self: next(steps) == int(os.environ["ASKED"])
sys.exit(command(None, load_finetune_config, finetune))
