"""What the loop gets: the same global batches for any number of ranks, from any step on."""

import itertools
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from loading import CPU, assert_same, config_of_loader, global_batches

from mixmim_ds.config import DataConfig, ModelConfig, PretrainConfig, TrainConfig
from mixmim_ds.data.index import open_index
from mixmim_ds.data.loader import Normalise, Share, open_loader
from mixmim_ds.data.pack import pack
from mixmim_ds.data.shards import Images, open_shards


@pytest.fixture(params=["folder", "shards"])
def index(request: pytest.FixtureRequest, photographs: Path, tmp_path: Path) -> Images:
    folder = open_index(photographs, tmp_path / "index")
    if request.param == "folder":
        return folder
    pack(folder, tmp_path / "shards", per_shard=64)
    return open_shards(f"{tmp_path}/shards/train-{{000000..000004}}.tar", tmp_path / "index")


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


def test_the_options_decide_what_is_planned(index: Images) -> None:
    config = config_of_loader()
    config.data.crop_scale, config.data.crop_ratio, config.data.flip = [0.5, 0.6], [1.0, 2.0], False
    config.model.mask_ratio = 0.25
    plan = open_loader(config, index, Share(0, 1, 4), CPU, cores=2).plan
    assert (plan.seed, plan.global_batch, plan.micro_batch, plan.mask_grid, plan.mask_ratio) == (3, 32, 8, (2, 2), 0.25)
    assert (plan.crop_scale, plan.crop_ratio, plan.flip) == ((0.5, 0.6), (1, 2), False)


def test_storage_never_makes_the_loop_wait_in_its_own_thread(index: Images, monkeypatch: pytest.MonkeyPatch) -> None:
    readers, give = [], type(index).give

    def noted(self: Images, ids: np.ndarray) -> object:
        readers.append(threading.current_thread())
        return give(self, ids)

    monkeypatch.setattr(type(index), "give", noted)
    batches = open_loader(config_of_loader(), index, Share(0, 1, 4), CPU, cores=2).batches(0)
    for _ in range(3):
        next(batches)
    assert len(readers) >= 3 and threading.main_thread() not in readers
    batches.close()
    assert not any(reader.is_alive() for reader in readers), "the threads end with the iterator"


def test_normalisation_is_torchvisions() -> None:
    data = DataConfig()
    pixels = torch.randint(256, (2, 3, 8, 8), dtype=torch.uint8)
    expected = (pixels.double() / 255 - torch.tensor(data.mean)[:, None, None]) / torch.tensor(data.std)[:, None, None]
    torch.testing.assert_close(Normalise(data.mean, data.std, CPU)(pixels).double(), expected, rtol=1e-5, atol=1e-6)


def test_synthetic_images_need_no_data_and_follow_the_masks_of_the_plan() -> None:
    config = PretrainConfig(
        run_dir="unused",
        model=ModelConfig("mixmim_tiny", img_size=128),
        data=DataConfig(kind="synthetic"),
        train=TrainConfig(global_batch=16, micro_batch=8),
    )
    loader = open_loader(config, None, Share(0, 1, 2), CPU, cores=1)
    first, second, third = itertools.islice(loader.batches(0), 3)
    assert first.images.shape == (8, 3, 128, 128) and torch.equal(first.images, second.images)
    assert first.mask.sum() == second.mask.sum() == 8 and not torch.equal(first.mask, second.mask)
    resumed = next(loader.batches(1))
    assert torch.equal(resumed.mask, third.mask) and np.array_equal(resumed.ids, third.ids)
