"""Crops are distributed as torchvision's, masks fair to every cell."""

import numpy as np
import pytest
import torch
from scipy.stats import chi2, ks_2samp
from torchvision.transforms import RandomResizedCrop

from mixmim_ds.data.plan import (
    mask_at,
    windows_at,
)

UNLIKELY = 1e-3  # see test_plan.py
SCALE, RATIO = (0.2, 1.0), (3 / 4, 4 / 3)

SIZES = [
    (375, 500),
    (500, 333),
    (224, 224),
    (32, 32),
    (64, 4000),
    (3000, 100),
    (100, 600),
]  # height, width; of the last some tries fit


def crops(height: int, width: int, count: int) -> np.ndarray:
    sizes = np.broadcast_to(np.array([[height, width]], np.int32), (count, 2))
    return windows_at(0, 0, np.arange(count), sizes, SCALE, RATIO)


def torchvision_crops(height: int, width: int, count: int) -> np.ndarray:
    image = torch.empty(1, 1, 1).expand(1, height, width)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return np.array([RandomResizedCrop.get_params(image, SCALE, RATIO) for _ in range(count)])


@pytest.mark.parametrize(("height", "width"), SIZES)
def test_crops_are_distributed_as_those_of_torchvision(height: int, width: int) -> None:
    ours, theirs = (
        {"area": h * w / (height * width), "log ratio": np.log(w / h), "top": top, "left": left}
        for top, left, h, w in (crops(height, width, 20_000).T, torchvision_crops(height, width, 4000).T)
    )
    for name in ours:
        assert ks_2samp(ours[name], theirs[name]).pvalue > UNLIKELY, name


@pytest.mark.parametrize(("height", "width"), [(10, 400), (400, 10), (1, 1), (1, 7), (13, 2), (333, 90), (77, 1001)])
def test_central_crops_equal_those_of_torchvision(height: int, width: int) -> None:
    image, wide = torch.empty(1, 1, 1).expand(1, height, width), (2.0, 3.0)  # no crop of twice the area fits
    expected = list(RandomResizedCrop.get_params(image, wide, RATIO))
    sizes = np.array([[height, width]] * 3, np.int32)
    assert windows_at(0, 0, np.arange(3), sizes, wide, RATIO).tolist() == [expected] * 3


@pytest.mark.parametrize(("height", "width"), [*SIZES, (1, 1), (1, 7), (13, 2)])
def test_crops_lie_inside_the_image(height: int, width: int) -> None:
    top, left, h, w = crops(height, width, 5000).T
    assert top.min() >= 0 and left.min() >= 0 and h.min() > 0 and w.min() > 0
    assert (top + h).max() <= height and (left + w).max() <= width


def test_each_image_is_cut_by_its_own_size() -> None:
    sizes = np.array(SIZES * 3, np.int32)
    mixed = windows_at(5, 6, np.arange(len(sizes)), sizes, SCALE, RATIO)
    for place, size in enumerate(sizes):
        alone = windows_at(5, 6, np.array([place]), size[None], SCALE, RATIO)
        assert mixed[place].tolist() == alone[0].tolist()


def test_crops_differ_between_places_and_steps() -> None:
    sizes = np.array([[1000, 1000]] * 100, np.int32)
    windows = np.concatenate([windows_at(0, step, np.arange(100), sizes, SCALE, RATIO) for step in range(10)])
    assert len(np.unique(windows, axis=0)) == 1000


# Masks


@pytest.mark.parametrize(
    ("grid", "ratio", "masked"),
    [((7, 7), 0.5, 24), ((6, 6), 0.5, 18), ((7, 9), 0.3, 18), ((2, 3), 0.0, 0), ((2, 3), 1.0, 6)],
)
def test_masks_have_exactly_their_share(grid: tuple[int, int], ratio: float, masked: int) -> None:
    for step in range(20):
        mask = mask_at(0, step, 0, grid, ratio)
        assert mask.shape == grid and mask.sum() == masked


def test_masks_are_fair_to_every_cell_and_pair_of_cells() -> None:
    masks = np.array([mask_at(0, step, k, (4, 3), 0.5).ravel() for step in range(2000) for k in range(4)])
    both = masks.T.astype(int) @ masks
    # of 12 cells 6 are drawn without replacement: the variance of the counts is that of a binomial, shrunk by 11 / 12
    cells = np.diag(both)
    expected = len(masks) / 2
    assert chi2.sf(((cells - expected) ** 2).sum() / (len(masks) / 4) * 11 / 12, 11) > UNLIKELY
    # by chance one of the 66 pairs lies beyond 4 standard errors in 0.4 % of such tests
    pairs = both[np.triu_indices(12, 1)]
    assert abs(pairs / len(masks) - 5 / 22).max() < 4 * np.sqrt(5 / 22 * 17 / 22 / len(masks))


def test_masks_differ_between_micro_batches_steps_and_seeds() -> None:
    seen = {mask_at(s, step, k, (7, 7), 0.5).tobytes() for s in range(5) for step in range(50) for k in range(8)}
    assert len(seen) == 5 * 50 * 8
