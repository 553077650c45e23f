"""Pretraining: masked images in pairs, reconstructed."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from mixmim_ds.config import PretrainConfig
from mixmim_ds.data.central import tell_left_out
from mixmim_ds.data.labelled import Labelled
from mixmim_ds.data.loader import MicroBatch, Share, open_loader
from mixmim_ds.evaluate.features import Vectors, View, extract
from mixmim_ds.evaluate.pictures import COLUMNS, Picture, draw
from mixmim_ds.evaluate.probe import accuracy_of_votes, nearest, nearest_of
from mixmim_ds.export.layouts import encoder_of
from mixmim_ds.finetune_config import LabelledDataConfig
from mixmim_ds.models import build_model
from mixmim_ds.train.distributed import World, gather_on_first, made_once, on_every_rank, share_of_cores
from mixmim_ds.train.engine import accumulation
from mixmim_ds.train.images import find_images, find_labelled
from mixmim_ds.train.loop import Judge, Task, conduct
from mixmim_ds.train.restore import load_weights
from mixmim_ds.train.run_folder import facts_of
from mixmim_ds.zero_files import read_saved


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
        data = config.data
        pixels = draw(batch.images, batch.mask, prediction, config.model.norm_pix_loss, data.mean, data.std)
        return Picture("reconstructions", pixels, COLUMNS)

    judge = None
    if config.probe.data:
        judge = Judge(config.probe.every * loader.plan.steps_per_epoch, probe(config, world))
    return Task(config, config.model.encoder, model, loader, index, facts_of(index), picture, judge=judge)


def probe(config: PretrainConfig, world: World) -> Callable[[Path], dict[str, float]]:
    """Judges a checkpoint by the nearest neighbours of its features.

    Each rank looks at its share of the images, and for neighbours of all to judge by among its share of those to learn
    from.

    Raises:
        ValueError: `probe.data` holds no labelled images.
    """
    data = LabelledDataConfig(root=config.probe.data, index_dir=config.data.index_dir)
    learn, judge_by = find_labelled(data, world, "probe.data")
    encoder = build_model(config.model).encoder
    encoder.pretrained_cfg |= {"mean": tuple(config.data.mean), "std": tuple(config.data.std)}
    batch, threads = config.train.micro_batch, config.data.threads or share_of_cores()

    def vectors(part: Labelled, broken: dict[int, str]) -> Vectors:
        return extract(encoder, View(), part, world.device, threads, batch, world.rank, world.size, broken)

    met: tuple[dict[int, str], dict[int, str]] = {}, {}  # what is broken of either set need not be found each time

    def scores(path: Path) -> dict[str, float]:
        """Of a checkpoint, on the first rank; nothing elsewhere."""
        load_weights(encoder, encoder_of(made_once(world, lambda: read_saved(path)).weights))
        known: list[Vectors] = []

        def look() -> Vectors:
            known.append(vectors(learn, met[0]))  # these stay on their rank, for there may be millions
            found = vectors(judge_by, met[1])
            return replace(found, left_out=known[0].left_out + found.left_out)

        asked = on_every_rank(world, look)
        parts = gather_on_first(world, nearest(known[0], torch.cat([each.vectors for each in asked]), world.device))
        if not world.first:
            return {}
        tell_left_out(each.left_out for each in asked)
        return {"knn": accuracy_of_votes(*nearest_of(parts), torch.cat([each.labels for each in asked]))}

    return scores
