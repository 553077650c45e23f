"""What timm does to training images here: the same for any number of processes, and what timm's own script does."""

import os
import random
import signal
from collections.abc import Callable, Iterator
from threading import Event

import numpy as np
import pytest
import torch
from forks import goes_with_its_parent
from PIL import Image
from timm.data import Mixup, create_transform

from mixmim_ds.data.ahead import ahead
from mixmim_ds.data.augment import BatchAugment, RandAugmentPool, rand_augment
from mixmim_ds.data.recover import DataFailed
from mixmim_ds.finetune_config import AugmentConfig

WORDS, MEAN = "rand-m9-mstd0.5-inc1", [0.485, 0.456, 0.406]
CPU = torch.device("cpu")


def some_images(count: int) -> np.ndarray:
    """Smooth ones, uint8 [count, 64, 64, 3]: of noise no augmentation is to be told from another."""
    coarse = np.random.default_rng(0).integers(0, 256, (count, 4, 4, 3), np.uint8)
    return np.stack([np.asarray(Image.fromarray(image).resize((64, 64))) for image in coarse])


def test_the_pool_does_what_timms_script_does_whatever_the_number_of_workers() -> None:
    images, seeds = some_images(7), np.arange(7, dtype=np.uint64) + 2**40
    script = create_transform((3, 64, 64), is_training=True, auto_augment=WORDS, mean=MEAN, interpolation="bicubic")
    (theirs,) = (each for each in script.transforms if type(each).__name__ == "RandAugment")
    expected = []
    for image, seed in zip(images, seeds.tolist(), strict=True):
        random.seed(seed)
        np.random.seed(seed % 2**32)
        expected.append(np.asarray(theirs(Image.fromarray(image))))
    pixels = torch.from_numpy(images).permute(0, 3, 1, 2)
    for workers in (1, 3, 9):  # of which the last has more workers than images
        pool = RandAugmentPool(WORDS, 64, MEAN, workers)
        try:
            assert np.array_equal(pool(pixels, seeds).permute(0, 2, 3, 1).numpy(), np.stack(expected))
            assert np.array_equal(pool(pixels, seeds + 1).permute(0, 2, 3, 1).numpy(), np.stack(expected)) is False
        finally:
            pool.close()


def test_the_strongest_posterisation_is_a_black_image_and_no_crash() -> None:
    """timm asks Pillow for 0 bits at magnitude 10, which the noise of mstd0.5 reaches once in forty draws."""
    transform = rand_augment("rand-m10-n1-p1.0-inc1", 64, MEAN)
    (posterise,) = (each for each in transform.ops if each.name == "PosterizeIncreasing")
    out = posterise(Image.fromarray(some_images(1)[0]))
    assert out.size == (64, 64) and not np.asarray(out).any()


def test_what_fails_in_a_worker_is_one_sentence() -> None:
    pool = RandAugmentPool(WORDS, 64, MEAN, 1)
    try:
        with pytest.raises(DataFailed, match=f"augment.rand_augment={WORDS} failed"):
            pool(torch.zeros(2, 5, 8, 8, dtype=torch.uint8), np.zeros(2, np.uint64))  # no picture has five channels
    finally:
        pool.close()


def test_the_processes_leave_stops_to_their_parent_and_go_with_it() -> None:
    def use(tell: Callable[[int], object]) -> None:
        pool = RandAugmentPool(WORDS, 64, MEAN, 1)
        (worker,) = pool.pool._processes
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
            os.kill(worker, number)
        pool(torch.zeros(2, 3, 8, 8, dtype=torch.uint8), np.zeros(2, np.uint64))
        tell(worker)
        signal.pause()

    assert goes_with_its_parent(use)


def test_a_batch_is_mixed_as_timm_mixes_it_by_its_seed_alone() -> None:
    options = AugmentConfig(erase=0)
    images, labels = torch.randn(8, 3, 16, 16, generator=torch.Generator().manual_seed(1)), torch.arange(8) % 5
    augment = BatchAugment(options, 5, CPU)
    for seed in range(6):
        mixed, targets = augment(images.clone(), labels, seed)
        np.random.seed(seed)
        expected = Mixup(mixup_alpha=0.8, cutmix_alpha=1.0, label_smoothing=0.1, num_classes=5)(images.clone(), labels)
        assert torch.equal(mixed, expected[0]) and torch.equal(targets, expected[1])
        noise = torch.rand(1)
        augment(images.clone(), labels, seed)
        assert torch.equal(torch.rand(1), noise), "the forward pass finds torch's generator where the seed puts it"
    assert not torch.equal(augment(images.clone(), labels, 1)[0], augment(images.clone(), labels, 2)[0])


def test_erasing_fills_rectangles_with_the_same_noise_for_the_same_seed() -> None:
    augment = BatchAugment(AugmentConfig(erase=0.9, mixup=0, cutmix=0, label_smoothing=0.1), 4, CPU)
    images, labels = torch.zeros(16, 3, 32, 32), torch.arange(16) % 4
    once, targets = augment(images.clone(), labels, 5)
    again, _ = augment(images.clone(), labels, 5)
    assert torch.equal(once, again) and 10 <= (once.flatten(1).abs().sum(1) > 0).sum() <= 16
    expected = torch.nn.functional.one_hot(labels, 4) * 0.9 + 0.1 / 4
    torch.testing.assert_close(targets, expected)


def test_items_come_in_order_ahead_of_time_and_errors_at_their_place() -> None:
    made_three = Event()

    def items() -> Iterator[int]:
        for i in range(10):
            if i == 3:
                made_three.set()
            yield i
        raise OSError("no more")

    stream = ahead(items(), 3)
    assert next(stream) == 0
    assert made_three.wait(30), "three are made ahead, beside the one that was asked for"
    assert [next(stream) for _ in range(9)] == list(range(1, 10))
    with pytest.raises(OSError, match="no more"):
        next(stream)


def test_who_stops_listening_ends_the_work() -> None:
    made: list[int] = []
    stream = ahead((made.append(i) or i for i in range(10**9)), 2)
    assert next(stream) == 0
    stream.close()
    count = len(made)
    assert count < 10 and list(ahead(iter("abc"), 2)) == ["a", "b", "c"] and len(made) == count
