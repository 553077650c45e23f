"""The data path alone: DALI as the training loop has it, in turn with torchvision's DataLoader on the same images."""

import argparse
import gc
import itertools
import time
from collections.abc import Callable, Generator
from contextlib import closing
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, RandomSampler
from torchvision import transforms
from torchvision.transforms import InterpolationMode

from mixmim_ds.benchmark.options import run_options
from mixmim_ds.benchmark.report import Measured
from mixmim_ds.benchmark.timing import in_turn, medians, spread
from mixmim_ds.config import PretrainConfig
from mixmim_ds.data.loader import Share, open_loader
from mixmim_ds.data.shards import Images
from mixmim_ds.train.distributed import World, connected, share_of_cores
from mixmim_ds.train.engine import accumulation
from mixmim_ds.train.images import find_images

Tensors = Generator[Tensor, None, None]


def add_options(parser: argparse.ArgumentParser) -> None:
    """What `loader` knows beside the run's own options."""
    parser.add_argument("--threads", metavar="N,N", help="numbers of threads or workers (default: 1 and all cores)")
    parser.add_argument("--batches", type=int, default=20, help="micro-batches that are timed (default: 20)")


class Photographs(Dataset[Tensor]):
    """The images of an index, cut and normalised by torchvision as the run's options say."""

    def __init__(self, index: Images, config: PretrainConfig) -> None:
        data, size = config.data, config.model.img_size
        self.index = index
        self.transform = transforms.Compose(
            [
                transforms.RandomResizedCrop(
                    size, tuple(data.crop_scale), tuple(data.crop_ratio), InterpolationMode.BICUBIC, antialias=True
                ),
                *([transforms.RandomHorizontalFlip()] if data.flip else []),
                transforms.ToTensor(),
                transforms.Normalize(data.mean, data.std),
            ]
        )

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, i: int) -> Tensor:
        """Image i, float32 [3, H, W]."""
        with self.index.open(i) as file, Image.open(file) as image:
            return self.transform(image.convert("RGB"))


def measure(arguments: argparse.Namespace) -> Measured:
    """Times micro-batches for each number of threads.

    Raises:
        ValueError: the options do not go together.
    """
    config = run_options(arguments.words, {"train.micro_batch": 64})
    threads = thread_numbers(arguments.threads)
    if arguments.batches < 1:
        raise ValueError("--batches must be at least 1.")
    with connected(config.train.start_timeout_s) as world:
        index = find_images(config.data, world)
        if index is None:
            raise ValueError("loader measures real images; give data.root=DIR instead of data=synthetic.")
        rows = {}
        for number in threads:
            sides = {
                name: partial(_rate, partial(opened, config, index, world, number), config, arguments.batches, world)
                for name, opened in (("dali", dali), ("torchvision", torchvision_loader))
            }
            rows[number] = in_turn(sides, arguments.warmup, arguments.repeats)
        numbers = _describe(arguments, config, index, world) | {
            "by_threads": {str(number): _rates(number, kept) for number, kept in rows.items()}
        }
        return Measured(_said(numbers), numbers)


def thread_numbers(given: str | None) -> list[int]:
    """1,2,4 as a list; without it one and all of this process's cores. ValueError if it is something else."""
    if given is None:
        return sorted({1, share_of_cores()})
    words = given.split(",")
    if not all(word.isdecimal() and int(word) for word in words):
        raise ValueError(f"--threads={given} must be positive whole numbers with commas between them.")
    return [int(word) for word in words]


def dali(config: PretrainConfig, index: Images, world: World, threads: int) -> Tensors:
    """The run's loader, without a model."""
    config = replace(config, data=replace(config.data, threads=threads))
    share = Share(world.rank, world.size, accumulation(config, world.size))
    for batch in open_loader(config, index, share, world.device, threads).batches(0):
        yield batch.images


def torchvision_loader(config: PretrainConfig, index: Images, world: World, threads: int) -> Tensors:
    """As many workers as DALI has threads; to the GPU if there is one."""
    images, on_gpu = Photographs(index, config), world.device.type == "cuda"
    sampler = RandomSampler(images, replacement=True, num_samples=2**31)
    loader = DataLoader(
        images, config.train.micro_batch, sampler=sampler, num_workers=threads, pin_memory=on_gpu, drop_last=True,
        prefetch_factor=config.data.prefetch,
    )  # fmt: skip
    for batch in loader:
        yield batch.to(world.device, non_blocking=True)


def _rate(open_side: Callable[[], Tensors], config: PretrainConfig, batches: int, world: World) -> dict[str, float]:
    """Images per second of this process, from a loader made for the purpose: one that waited would have its queue full,
    and would fill it again at the other's expense. As many as the queue holds are taken first."""
    with closing(open_side()) as images:
        for _ in itertools.islice(images, config.data.prefetch + 1):
            continue
        _wait(world)
        began = time.perf_counter()
        for _ in itertools.islice(images, batches):
            continue
        _wait(world)
        seconds = time.perf_counter() - began
    gc.collect()
    return {"images_per_s": batches * config.train.micro_batch / seconds}


def _wait(world: World) -> None:
    if world.device.type == "cuda":
        torch.cuda.synchronize()


def _describe(arguments: argparse.Namespace, config: PretrainConfig, index: Images, world: World) -> dict[str, Any]:
    sides = np.median(index.sizes, axis=0).astype(int)
    return {
        "images": len(index), "median_height": int(sides[0]), "median_width": int(sides[1]),
        "img_size": config.model.img_size, "micro_batch": config.train.micro_batch, "batches": arguments.batches,
        "repeats": arguments.repeats, "decodes_on": world.device.type, "processes": world.size,
    }  # fmt: skip


def _rates(threads: int, kept: dict[str, list[dict[str, float]]]) -> dict[str, Any]:
    """Medians of both sides; a process feeds one GPU, so its rate is that per GPU."""
    found: dict[str, Any] = {}
    for name, rows in kept.items():
        rate = medians(rows)["images_per_s"]
        found[name] = {
            "images_per_s_per_gpu": round(rate, 2),
            "images_per_s_per_thread": round(rate / threads, 2),
            "range": spread([row["images_per_s"] for row in rows]),
        }
    rates = [found[name]["images_per_s_per_gpu"] for name in ("dali", "torchvision")]
    return found | {"ratio": round(rates[0] / rates[1], 4)}


def _said(numbers: dict[str, Any]) -> str:
    """The cell of the row."""
    parts = []
    for threads, found in numbers["by_threads"].items():
        dali_said, torchvision_said = (
            f"{side['images_per_s_per_gpu']:.4g} img/s {side['range']}, {side['images_per_s_per_thread']:.4g} a thread"
            for side in (found["dali"], found["torchvision"])
        )
        parts.append(
            f"threads or workers {threads}: DALI {dali_said}; torchvision {torchvision_said}; "
            f"DALI / torchvision {found['ratio']:.2f}"
        )
    sizes = f"{numbers['images']:,} images of median {numbers['median_height']} x {numbers['median_width']}"
    return "; ".join([*parts, f"{sizes}, decoded on {numbers['decodes_on']}; medians of {numbers['repeats']}"])
