"""Mixing and unmixing."""

import torch

from mixmim_ds.models import masking
from mixmim_ds.models.groups import pair_mask

MASK = torch.tensor([[True, False], [False, False]])


def test_true_takes_the_cell_from_the_partner() -> None:
    images = torch.arange(4.0)[:, None, None, None].expand(4, 3, 64, 64)
    mixed = masking.mix(images, MASK)
    assert mixed[:, :, :32, :32].unique(dim=0)[:, 0, 0, 0].tolist() == [0, 1, 2, 3]
    for i in range(4):
        assert (mixed[i, :, :32, :32] == 3 - i).all()
        assert (mixed[i, :, 32:] == i).all() and (mixed[i, :, :, 32:] == i).all()


def test_split_shows_each_image_its_own_tokens_only() -> None:
    tokens = torch.arange(16.0).reshape(4, 4, 1)  # token l of mixed image i is 4 i + l
    without_masked, without_visible = masking.split(tokens, MASK, torch.full((1, 1, 1), -1.0))
    assert without_masked[1, :, 0].tolist() == [-1, 5, 6, 7]
    assert without_visible[1, :, 0].tolist() == [8, -1, -1, -1], "cell 0 of image 1 stands in mixed image 2"
    chosen = masking.choose(without_masked, without_visible, MASK)
    assert (chosen == -1).all(), "what is chosen for a place comes from the sequence that did not see it"


def test_pairs_of_a_window_attend_within_their_image() -> None:
    same = pair_mask(MASK, grid=(4, 4), window=(2, 4))
    assert same.shape == (2, 8, 8)
    source = [True, True, False, False] * 2
    assert same[0].tolist() == [[a == b for b in source] for a in source]
    assert same[1].all()
