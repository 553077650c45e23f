"""The images that a run learns from and is judged by: made once, found by every rank, and the same on all."""

from typing import Any

from mixmim_ds.config import DataConfig
from mixmim_ds.data.labelled import Labelled, open_labelled
from mixmim_ds.data.shards import Images, open_images
from mixmim_ds.finetune_config import LabelledDataConfig
from mixmim_ds.train.distributed import AgreedMistake, World, gather, made_once
from mixmim_ds.train.run_folder import facts_of
from mixmim_ds.train.slurm import node


def find_images(data: DataConfig, world: World) -> Images | None:
    """The index of the images, made by the first rank if need be and memory-mapped by the others after it. ValueError
    if they find other images than the first one."""
    index = made_once(world, lambda: open_images(data, progress=world.first))
    _check_same(world, facts_of(index), f"data.root={data.root}")
    return index


def find_labelled(data: LabelledDataConfig, world: World, option: str = "data.root") -> tuple[Labelled, Labelled]:
    """The images to learn from and to judge by, as `open_labelled` has them; see `find_images`."""
    train, val = made_once(world, lambda: open_labelled(data, option, progress=world.first))
    _check_same(world, facts_of(train) | {"judged by": facts_of(val)}, f"{option}={data.root}")
    return train, val


def _check_same(world: World, facts: dict[str, Any], option: str) -> None:
    """Refuses nodes that have other images under the same name: an unfinished copy, or an old one.

    Args:
        facts: of this rank's data, as by `facts_of`.
        option: the option that names them, with its value.

    Raises:
        ValueError: a rank has found others than the first one.
    """
    found = gather(world, (node(), facts))
    for rank, (name, there) in enumerate(found):
        if there != found[0][1]:
            raise AgreedMistake(
                f"{option} holds other images for rank {rank} on {name} than for rank 0 on {found[0][0]}; make the "
                "copies of all nodes alike."
            )
