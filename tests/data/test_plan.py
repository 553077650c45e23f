"""The plan: the same for any number of ranks, fair to every image, distributed as what it stands for."""

import timeit
import warnings
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import chi2, chisquare

from mixmim_ds.data.plan import (
    CROP,
    FLIP,
    MASK,
    ORDER,
    Plan,
    bits,
    order_at,
    replacements_at,
    splitmix64,
    uniform,
    windows_at,
)

# Seeds are fixed, so a statistical test has one outcome for ever. A correct distribution fails it with this
# probability, once, when the code changes; the defects it is there for lead to p-values far below.
UNLIKELY = 1e-3

SCALE, RATIO = (0.2, 1.0), (3 / 4, 4 / 3)


def plan(images: int = 100, global_batch: int = 24, micro_batch: int = 4, seed: int = 7, **options: Any) -> Plan:
    sizes = np.broadcast_to(np.array([[375, 500]], np.int32), (images, 2))
    return Plan(seed, sizes, global_batch, micro_batch, (7, 7), **options)


@cache
def orders(count: int, epochs: int, seed: int = 0) -> np.ndarray:
    """The whole orders of many epochs, [epochs, count]."""
    return np.array([order_at(seed, epoch, np.arange(count), count) for epoch in range(epochs)])


# The generator


def test_splitmix64_gives_the_published_sequence() -> None:
    # First outputs of splitmix64.c for the seed 1234567, as published on rosettacode.org ("Splitmix64").
    published = [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
        4593380528125082431,
        16408922859458223821,
    ]
    assert splitmix64(np.uint64(1234567), np.arange(5, dtype=np.uint64)).tolist() == published


def test_bits_chain_over_counters_and_broadcast() -> None:
    table = bits(3, CROP, np.arange(4)[:, None], np.arange(5))
    assert table.shape == (4, 5) and table.dtype == np.uint64
    assert table[2, 3] == bits(3, CROP, 2, 3) == splitmix64(bits(3, CROP, 2), np.uint64(3))
    grid = np.arange(50)[:, None], np.arange(50)
    everything = np.concatenate([bits(seed, stream, *grid) for seed in (0, 1) for stream in (ORDER, CROP, FLIP, MASK)])
    assert len(np.unique(everything)) == everything.size


def test_uniform_is_uniform_and_below_one() -> None:
    draws = uniform(0, CROP, np.arange(100_000))
    assert draws.min() >= 0 and draws.max() < 1
    assert chisquare(np.bincount((draws * 100).astype(int), minlength=100)).pvalue > UNLIKELY


# Whole plans


def test_known_answers() -> None:
    """Runs of released versions must be resumed and repeated for ever: these numbers may never change."""
    batch = plan().micro_batch_at(11, 3)
    assert bits(0, MASK, 1, 2).item() == 11535378179678478120
    assert batch.ids.tolist() == [77, 6, 74, 46]
    assert batch.windows.tolist() == [[30, 11, 258, 280], [114, 85, 251, 249], [19, 8, 297, 309], [30, 126, 226, 224]]
    assert batch.flips.tolist() == [False, False, True, False]
    assert np.packbits(batch.mask).tolist() == [219, 96, 131, 213, 83, 30, 0]
    assert order_at(0, 0, np.arange(4), 10**9).tolist() == [421119360, 56025798, 899552759, 406941901]


def test_types_and_shapes() -> None:
    batch = plan(micro_batch=6).micro_batch_at(0, 1)
    assert (batch.ids.dtype, batch.ids.shape) == (np.int64, (6,))
    assert (batch.windows.dtype, batch.windows.shape) == (np.int32, (6, 4))
    assert (batch.flips.dtype, batch.flips.shape) == (bool, (6,))
    assert (batch.mask.dtype, batch.mask.shape) == (bool, (7, 7))


def test_a_step_is_the_same_whatever_was_asked_before_and_whoever_asks() -> None:
    here, there = plan(), plan()
    for k in range(6):
        for step in (0, 3, 9):
            here.micro_batch_at(step, k)
    for k in range(6):
        one, other = here.micro_batch_at(5, k), there.micro_batch_at(5, k)
        for field in ("ids", "windows", "flips", "mask"):
            assert np.array_equal(getattr(one, field), getattr(other, field))


@pytest.mark.parametrize("ranks", [1, 2, 3, 6])
def test_ranks_that_share_out_the_micro_batches_see_one_global_batch(ranks: int) -> None:
    shared = plan()
    seen = [
        shared.micro_batch_at(2, turn * ranks + rank).ids
        for rank in range(ranks)
        for turn in range(shared.micro_batches // ranks)
    ]
    expected = order_at(7, 0, 2 * 24 + np.arange(24), 100)
    assert sorted(np.concatenate(seen)) == sorted(expected)


def test_crops_and_flips_do_not_depend_on_the_size_of_micro_batches() -> None:
    small, large = plan(micro_batch=4), plan(micro_batch=12)
    for field in ("ids", "windows", "flips"):
        pieces = [getattr(small.micro_batch_at(6, k), field) for k in range(3)]
        assert np.array_equal(np.concatenate(pieces), getattr(large.micro_batch_at(6, 0), field))


def test_windows_belong_to_the_sizes_of_their_images() -> None:
    sizes = np.random.default_rng(0).integers(20, 900, (100, 2), dtype=np.int32)
    batch = Plan(7, sizes, 24, 12, (7, 7)).micro_batch_at(9, 1)
    expected = windows_at(7, 9, np.arange(12, 24), sizes[batch.ids], SCALE, RATIO)
    assert np.array_equal(batch.windows, expected)


def test_an_epoch_visits_every_image_once_up_to_the_dropped_tail() -> None:
    epochs = plan(images=100, global_batch=24)
    assert epochs.steps_per_epoch == 4
    for epoch in range(5):
        steps = range(epoch * 4, epoch * 4 + 4)
        ids = np.concatenate([epochs.micro_batch_at(step, k).ids for step in steps for k in range(6)])
        assert len(np.unique(ids)) == len(ids) == 96


def test_images_of_the_tail_change_from_epoch_to_epoch() -> None:
    tails = [set(order_at(7, epoch, np.arange(96, 100), 100)) for epoch in range(5)]
    assert len(set.union(*tails)) > 10


def test_flips_are_even_and_can_be_off() -> None:
    flips = np.concatenate([plan().micro_batch_at(step, 0).flips for step in range(2500)])
    assert chisquare(np.bincount(flips)).pvalue > UNLIKELY
    assert not any(plan(flip=False).micro_batch_at(step, 0).flips.any() for step in range(100))


def test_global_generators_are_left_alone() -> None:
    numpy_before, torch_before = np.random.get_state()[1].copy(), torch.get_rng_state()
    plan().micro_batch_at(3, 1)
    assert np.array_equal(np.random.get_state()[1], numpy_before)
    assert torch.equal(torch.get_rng_state(), torch_before)


def test_the_arithmetic_wraps_around_without_a_warning() -> None:
    with warnings.catch_warnings(record=True) as raised:
        warnings.simplefilter("always")
        plan(seed=2**64 - 1).micro_batch_at(2**40, 5)
    assert raised == []


def test_a_set_of_one_step_is_enough_and_one_image_less_is_refused() -> None:
    assert plan(images=24).steps_per_epoch == 1
    sentence = r"There are 23 images \(data\.root\), too few for one step of train\.global_batch=24"
    with pytest.raises(ValueError, match=sentence) as refused:
        plan(images=23)
    assert str(refused.value).count(". ") == 0


@pytest.mark.parametrize(("step", "k"), [(-1, 0), (0, -1), (0, 6)])
def test_places_outside_the_global_batch_are_refused(step: int, k: int) -> None:
    with pytest.raises(IndexError, match="no micro-batch"):
        plan().micro_batch_at(step, k)


# Replacements


def test_choices_name_other_images_and_leave_all_else_as_it_is() -> None:
    sizes = np.random.default_rng(0).integers(64, 900, (1000, 2)).astype(np.int32)
    varied = Plan(5, sizes, 32, 8, (7, 7))
    first, choices = varied.micro_batch_at(3, 1), np.array([0, 1, 0, 2, 0, 0, 7, 0])
    second = varied.micro_batch_at(3, 1, choices)
    assert ((second.ids != first.ids) == (choices > 0)).all()
    assert (second.windows[choices == 0] == first.windows[choices == 0]).all()
    assert (second.windows[:, :2] + second.windows[:, 2:] <= sizes[second.ids]).all()
    assert (second.flips == first.flips).all() and (second.mask == first.mask).all()


def test_replacements_are_even_over_the_set_and_differ_between_steps_places_and_choices() -> None:
    steps, places, choices = np.arange(300)[:, None, None], np.arange(32)[:, None], np.arange(1, 11)
    drawn = replacements_at(1, steps, places, choices, 100)
    assert drawn.min() == 0 and drawn.max() == 99
    assert chisquare(np.bincount(drawn.ravel(), minlength=100)).pvalue > UNLIKELY
    many = replacements_at(1, steps, places, choices, 10**12)
    assert len(np.unique(many)) == many.size and not np.isin(replacements_at(2, 0, places, choices, 10**12), many).any()


# The order of an epoch


@pytest.mark.parametrize("count", [*range(1, 40), 97, 256, 257, 1000, 65_537])
def test_every_order_is_a_permutation(count: int) -> None:
    for seed in range(3):
        assert np.array_equal(np.sort(order_at(seed, seed, np.arange(count), count)), np.arange(count))


def test_orders_differ_between_epochs_and_seeds() -> None:
    seen = {tuple(order_at(seed, epoch, np.arange(50), 50)) for seed in range(20) for epoch in range(20)}
    assert len(seen) == 400


@pytest.mark.parametrize("count", [2, 3, 4, 5])
def test_small_sets_take_all_their_orders_equally_often(count: int) -> None:
    _, times = np.unique(orders(count, 6000), axis=0, return_counts=True)
    assert len(times) == np.prod(np.arange(1, count + 1))
    assert chisquare(times).pvalue > UNLIKELY


@pytest.mark.parametrize(("count", "epochs"), [(7, 4000), (9, 4000), (10, 4000), (16, 4000), (97, 2000)])
def test_every_image_is_equally_often_at_every_position(count: int, epochs: int) -> None:
    positions = np.array([np.bincount(column, minlength=count) for column in orders(count, epochs).T])
    deviation = ((positions - epochs / count) ** 2 / (epochs / count)).sum()
    # rows and columns of the table have fixed sums, which leaves (count - 1)**2 degrees of freedom
    assert chi2.sf(deviation, (count - 1) ** 2) > UNLIKELY


@pytest.mark.parametrize(("count", "epochs"), [(7, 4000), (9, 4000), (10, 4000), (16, 4000), (97, 2000)])
def test_no_image_prefers_a_successor(count: int, epochs: int) -> None:
    order = orders(count, epochs)
    different = ~np.eye(count, dtype=bool)
    pairs = np.bincount((order[:, :-1] * count + order[:, 1:]).ravel(), minlength=count**2).reshape(count, count)
    assert chisquare(pairs[different]).pvalue > UNLIKELY
    distances = np.bincount(((order[:, 1:] - order[:, :-1]) % count).ravel(), minlength=count)
    assert chisquare(distances[1:]).pvalue > UNLIKELY


@pytest.mark.parametrize("count", [1_281_167, 10**9, 2**40 + 1])
def test_huge_sets_are_evaluated_for_the_asked_positions_alone(count: int) -> None:
    positions = np.arange(count - 100_000, count)
    images = order_at(1, 2, positions, count)
    assert len(np.unique(images)) == len(images)
    assert images.min() >= 0 and images.max() < count
    assert chisquare(np.bincount(images * 100 // count, minlength=100)).pvalue > UNLIKELY
    assert order_at(1, 2, positions[:5], count).tolist() == images[:5].tolist()


def test_a_batch_of_a_billion_images_is_planned_quickly() -> None:
    huge = plan(images=10**9, global_batch=4096, micro_batch=256)
    huge.micro_batch_at(10**6, 3)
    # 0.4 ms on two cores of a server; the limit leaves room for a busy machine and none for work per image
    assert min(timeit.repeat(lambda: huge.micro_batch_at(10**6, 3), number=1, repeat=20)) < 0.01
