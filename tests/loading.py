"""Reads the micro-batches of all ranks in one process, as the loop of a run would see them."""

import itertools

import numpy as np
import torch

from mixmim_ds.config import DataConfig, ModelConfig, PretrainConfig, TrainConfig
from mixmim_ds.data.loader import Loader, MicroBatch, Share, open_loader
from mixmim_ds.data.shards import Images

CPU = torch.device("cpu")


def config_of_loader() -> PretrainConfig:
    return PretrainConfig(
        run_dir="unused",
        model=ModelConfig("mixmim_tiny", img_size=64),
        data=DataConfig(root="unused", threads=2),
        train=TrainConfig(global_batch=32, micro_batch=8, seed=3),
    )


def loaders_of(index: Images, ranks: int) -> list[Loader]:
    """The loaders of all ranks."""
    config = config_of_loader()
    return [open_loader(config, index, Share(rank, ranks, 4 // ranks), CPU, cores=2) for rank in range(ranks)]


def global_batches(index: Images, ranks: int, start: int, steps: int) -> list[list[MicroBatch]]:
    """The micro-batches of each step in the order of the global batch, gathered from all ranks."""
    return read(loaders_of(index, ranks), start, steps)


def read(loaders: list[Loader], start: int, steps: int) -> list[list[MicroBatch]]:
    """As `global_batches`, from loaders at hand."""
    ranks, turns = len(loaders), 4 // len(loaders)
    streams = [list(itertools.islice(loader.batches(start), steps * turns)) for loader in loaders]
    return [
        [streams[rank][step * turns + turn] for turn in range(turns) for rank in range(ranks)] for step in range(steps)
    ]


def assert_same(a: list[MicroBatch], b: list[MicroBatch]) -> None:
    for left, right in zip(a, b, strict=True):
        assert np.array_equal(left.ids, right.ids)
        assert torch.equal(left.images, right.images) and torch.equal(left.mask, right.mask)
