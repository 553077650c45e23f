"""What the loop gets: the same global batches for any number of ranks, from any step on."""

import itertools
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from tars import picture, write_tar

from mixmim_ds.config import DataConfig, ModelConfig, RunConfig, TrainConfig
from mixmim_ds.data.index import open_index
from mixmim_ds.data.loader import Images, MicroBatch, Normalise, Share, open_loader
from mixmim_ds.data.pack import pack
from mixmim_ds.data.shards import open_shards

CPU = torch.device("cpu")


def config_of_loader() -> RunConfig:
    return RunConfig(
        run_dir="unused",
        model=ModelConfig("mixmim_tiny", img_size=64),
        data=DataConfig(root="unused", threads=2),
        train=TrainConfig(global_batch=32, micro_batch=8, seed=3),
    )


@pytest.fixture(params=["folder", "shards"])
def index(request: pytest.FixtureRequest, photographs: Path, tmp_path: Path) -> Images:
    folder = open_index(photographs, tmp_path / "index")
    if request.param == "folder":
        return folder
    pack(folder, tmp_path / "shards", per_shard=64)
    return open_shards(f"{tmp_path}/shards/train-{{000000..000004}}.tar", tmp_path / "index")


def global_batches(index: Images, ranks: int, start: int, steps: int) -> list[list[MicroBatch]]:
    """The micro-batches of each step in the order of the global batch, gathered from all ranks."""
    config, turns = config_of_loader(), 4 // ranks
    loaders = [open_loader(config, index, Share(rank, ranks, turns), CPU, cores=2) for rank in range(ranks)]
    streams = [list(itertools.islice(loader.batches(start), steps * turns)) for loader in loaders]
    return [
        [streams[rank][step * turns + turn] for turn in range(turns) for rank in range(ranks)] for step in range(steps)
    ]


def assert_same(a: list[MicroBatch], b: list[MicroBatch]) -> None:
    for left, right in zip(a, b, strict=True):
        assert np.array_equal(left.ids, right.ids)
        assert torch.equal(left.images, right.images) and torch.equal(left.mask, right.mask)


def test_ranks_share_out_the_same_global_batches(index: Images) -> None:
    alone = global_batches(index, 1, start=0, steps=2)
    for ranks in (2, 4):
        for step, batch in enumerate(global_batches(index, ranks, start=0, steps=2)):
            assert_same(batch, alone[step])


def test_a_loader_starts_at_any_step_and_passes_the_end_of_an_epoch(index: Images) -> None:
    steps_per_epoch = len(index) // 32
    whole = global_batches(index, 1, start=0, steps=steps_per_epoch + 2)
    for step, batch in enumerate(global_batches(index, 2, start=steps_per_epoch - 1, steps=3)):
        assert_same(batch, whole[steps_per_epoch - 1 + step])
    seen = [i for step in whole[:steps_per_epoch] for batch in step for i in batch.ids]
    assert len(seen) == len(set(seen)) == steps_per_epoch * 32


def test_images_and_mask_are_what_the_model_takes(index: Images) -> None:
    loader = open_loader(config_of_loader(), index, Share(0, 1, 4), CPU, cores=2)
    batch = next(loader.batches(0))
    assert batch.images.shape == (8, 3, 64, 64) and batch.images.dtype == torch.float32
    assert batch.mask.shape == (2, 2) and batch.mask.dtype == torch.bool and batch.mask.sum() == 2
    assert loader.wait_s > 0


def test_normalisation_is_torchvisions() -> None:
    data = DataConfig()
    pixels = torch.randint(256, (2, 3, 8, 8), dtype=torch.uint8)
    expected = (pixels.double() / 255 - torch.tensor(data.mean)[:, None, None]) / torch.tensor(data.std)[:, None, None]
    torch.testing.assert_close(Normalise(data, CPU)(pixels).double(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("content", [b"plain text, no picture", b"", b"GIF89a\x01\x00\x01\x00", bytes(4096)])
def test_a_file_that_breaks_after_indexing_is_named_and_kills_no_process(tmp_path: Path, content: bytes) -> None:
    """Without the guard in the graph such files end the process with SIGSEGV (seen in batches of real size)."""
    from PIL import Image

    root = tmp_path / "images"
    root.mkdir()
    for i in range(64):
        Image.effect_mandelbrot((80 + i, 70), (-2, -1, 1, 1), 50).save(root / f"{i:02}.jpg")
    index = open_index(root, tmp_path / "index")
    (root / "33.jpg").write_bytes(content)
    config = config_of_loader()
    config.train.global_batch = config.train.micro_batch = 64
    loader = open_loader(config, index, Share(0, 1, 1), CPU, cores=2)
    with pytest.raises(RuntimeError, match=r"33\.jpg cannot be decoded"):
        next(loader.batches(0))


@pytest.mark.parametrize("shrunk", [True, False], ids=["shrunk", "vanished"])
def test_a_shard_that_is_lost_after_indexing_is_named_and_kills_no_process(tmp_path: Path, shrunk: bool) -> None:
    for shard in range(4):
        write_tar(tmp_path / f"{shard}.tar", {f"{i:02}.jpg": picture(80 + i, 70) for i in range(16)})
    index = open_shards(f"{tmp_path}/*.tar", tmp_path / "index")
    if shrunk:
        os.truncate(tmp_path / "3.tar", index.spans[-1, 1] + 100)  # the last image loses its end
    else:
        (tmp_path / "3.tar").unlink()
    config = config_of_loader()
    config.train.global_batch = config.train.micro_batch = 64
    loader = open_loader(config, index, Share(0, 1, 1), CPU, cores=2)
    lost = r"3\.tar:15\.jpg" if shrunk else r"3\.tar:\d\d\.jpg"
    with pytest.raises(RuntimeError, match=lost + r" cannot be decoded \(empty file\)"):
        next(loader.batches(0))


def test_synthetic_images_need_no_data_and_follow_the_masks_of_the_plan() -> None:
    config = RunConfig(
        run_dir="unused",
        model=ModelConfig("mixmim_tiny", img_size=128),
        data=DataConfig(kind="synthetic"),
        train=TrainConfig(global_batch=16, micro_batch=8),
    )
    stream = open_loader(config, None, Share(0, 1, 2), CPU, cores=1).batches(0)
    first, second = next(stream), next(stream)
    assert first.images.shape == (8, 3, 128, 128) and torch.equal(first.images, second.images)
    assert first.mask.sum() == second.mask.sum() == 8 and not torch.equal(first.mask, second.mask)
