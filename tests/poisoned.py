"""launch/pretrain.py, whose rank 1 meets an infinite pixel in step POISONED (or else 3).

No file holds one, a broken GPU may make one.
"""

import os
import sys
from collections.abc import Iterator
from typing import Any

from mixmim_ds.compose import load_config
from mixmim_ds.data.loader import Loader, MicroBatch
from mixmim_ds.train import pretrain
from mixmim_ds.train.command import command

POISONED = int(os.environ.get("POISONED", 3)) - 1
open_loader = pretrain.open_loader


def open_poisoned(*arguments: Any) -> Loader:
    loader: Any = open_loader(*arguments)
    batches = loader.batches

    def poisoned(start: int) -> Iterator[MicroBatch]:
        for turn, batch in enumerate(batches(start), start * loader.share.accumulation):
            if loader.share.rank == 1 and loader.share.place(turn)[0] == POISONED:
                batch.images[0, 0, 0, 0] = float("inf")
            yield batch

    loader.batches = poisoned
    return loader


pretrain.open_loader = open_poisoned
sys.exit(command(None, load_config, pretrain.pretrain))
