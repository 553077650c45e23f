"""launch/pretrain.py, which writes down in SYNCED, in order and for all ranks, what was synced to the disk (fsync(2))
and what got its final name: what is there after a power cut, since no test can cut the power."""

import os
import sys
from typing import Any

from mixmim_ds.compose import load_config
from mixmim_ds.train.command import command
from mixmim_ds.train.pretrain import pretrain

fsync, replace = os.fsync, os.replace


def tell(*words: Any) -> None:
    with open(os.environ["SYNCED"], "a", buffering=1) as file:
        file.write(" ".join(map(str, words)) + "\n")


def tell_sync(descriptor: int) -> None:
    fsync(descriptor)
    tell("sync", os.readlink(f"/proc/self/fd/{descriptor}"))


def tell_name(old: Any, new: Any, **options: Any) -> None:
    replace(old, new, **options)
    tell("name", new)


os.fsync, os.rename, os.replace = tell_sync, tell_name, tell_name
sys.exit(command(None, load_config, pretrain))
