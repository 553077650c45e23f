"""The run that a benchmark's key=value words describe."""

import os
from collections.abc import Mapping
from typing import Any

from mixmim_ds.compose import load_config
from mixmim_ds.config import PretrainConfig
from mixmim_ds.train.slurm import adopt


def run_options(words: list[str], defaults: Mapping[str, Any]) -> PretrainConfig:
    """The run's options, with a benchmark's own defaults where a word is not given; its global batch is one
    micro-batch of each process unless it is given.

    Raises:
        ValueError: one sentence that names the word.
    """
    given = {word.partition("=")[0] for word in words}
    if "data.root" in given:
        given.add("data")  # real images are asked for, as folder unless said otherwise
    own = [f"{name}={value}" for name, value in ({"run_dir": "UNUSED"} | dict(defaults)).items() if name not in given]
    words = [*own, *words]
    if "train.global_batch" not in given | set(defaults):
        sizes = [word.partition("=")[2] for word in words if word.startswith("train.micro_batch=")]
        adopt()  # of srun, whose words for the number of processes are others
        processes = int(os.environ.get("WORLD_SIZE", 1))
        size = int(sizes[-1]) if sizes and sizes[-1].isdecimal() else 128
        words.append(f"train.global_batch={size * processes}")
    return load_config(words)
