"""Pretraining: masked images in pairs, reconstructed."""

import torch
from torch import Tensor

from mixmim_ds.config import DataConfig, PretrainConfig
from mixmim_ds.data.loader import MicroBatch, Share, open_loader
from mixmim_ds.data.shards import Images, open_images
from mixmim_ds.models import build_model
from mixmim_ds.train.distributed import World, on_first_rank, share_of_cores
from mixmim_ds.train.engine import accumulation
from mixmim_ds.train.loop import Task, conduct
from mixmim_ds.train.pictures import COLUMNS, Picture, draw


def pretrain(config: PretrainConfig) -> int:
    """Pretrains until the end or a request to stop; the exit code of the process. Raises as `conduct`."""
    return conduct(config, lambda world: _prepare(config, world))


def _prepare(config: PretrainConfig, world: World) -> Task:
    share = Share(world.rank, world.size, accumulation(config, world.size))
    torch.manual_seed(config.train.seed)
    model = build_model(config.model)
    index = find_images(config.data, world)
    loader = open_loader(config, index, share, world.device, share_of_cores())

    def picture(batch: MicroBatch, prediction: Tensor) -> Picture:
        pixels = draw(batch.images, batch.mask, prediction, config.model.norm_pix_loss, config.data)
        return Picture("reconstructions", pixels, COLUMNS)

    return Task(config, config.model.encoder, model, loader, index, picture)


def find_images(data: DataConfig, world: World) -> Images | None:
    """The index of the images, made by the first rank if need be and memory-mapped by the others after it."""
    on_first_rank(world, lambda: open_images(data, progress=True) is not None)
    return open_images(data)
