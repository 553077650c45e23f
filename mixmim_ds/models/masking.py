"""Mixing two images into one input and taking them apart again; pure functions.

A mask is bool [H/32, W/32], one for all images of a micro-batch: **True = this cell is taken from the partner image**.
The partner of image i is image B-1-i (arXiv 2205.13137, section 3.2).
"""

from torch import Tensor


def upsample(mask: Tensor, height: int, width: int) -> Tensor:
    """The mask [h, w] repeated to a grid of whole cells, [height, width]; both are multiples of h and w."""
    cell_h, cell_w = height // mask.shape[0], width // mask.shape[1]
    return mask.repeat_interleave(cell_h, 0).repeat_interleave(cell_w, 1)


def mix(images: Tensor, mask: Tensor) -> Tensor:
    """Mixed image i shows image i where the mask is False and image B-1-i where it is True; [B, C, H, W].

    A cell is a whole number of patches and the patch norm is per token, so mixing pixels gives the tokens that mixing
    after the patch embedding would give, at 3/8 of the traffic.
    """
    return images.flip(0).where(upsample(mask, images.shape[-2], images.shape[-1]), images)


def split(tokens: Tensor, mask: Tensor, mask_token: Tensor) -> tuple[Tensor, Tensor]:
    """Two sequences per image, each showing only tokens of that image.

    Args:
        tokens: [B, L, D], tokens of the mixed images, L = cells of the mask in row-major order.
        mask: bool [H/32, W/32].
        mask_token: [1, 1, D], stands at the places of the other image.

    Returns:
        Row i of the first shows image i where the mask is False (seen in mixed image i); row i of the second shows
        image i where the mask is True (seen in mixed image B-1-i).
    """
    partner = mask.flatten()[:, None]
    return mask_token.where(partner, tokens), tokens.where(partner, mask_token).flip(0)


def choose(without_masked: Tensor, without_visible: Tensor, mask: Tensor) -> Tensor:
    """For every place what the sequence says that did not see it, from the two of `split`; [B, L, D]."""
    return without_masked.where(mask.flatten()[:, None], without_visible)
