"""What the model sees and says, drawn."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mixmim_ds.models import masking
from mixmim_ds.models.mixmim import normalise, patchify, unpatchify

COLUMNS = "original A | original B | mixed input | mask (white = B) | A reconstructed | B reconstructed"
GAP = 4  # pixels between two pictures
ROWS = 4  # of pictures, at most
ACROSS = 8  # training images in a row


@dataclass(frozen=True)
class Picture:
    """A picture for TensorBoard."""

    name: str
    pixels: Tensor  # uint8 [3, H, W] on the CPU
    caption: str


def draw_batch(images: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """The first images of a batch, as the model takes them: float [B, 3, H, W] -> uint8 [3, ...] on the CPU."""
    pixels = _pixels(images, mean, std).cpu()
    across = min(ACROSS, len(pixels))
    shown = pixels[: min(ROWS, len(pixels) // across) * across]
    return _grid(shown.reshape(-1, across, *shown.shape[1:]))


@torch.no_grad()
def draw(
    images: Tensor, mask: Tensor, prediction: Tensor, norm_pix_loss: bool, mean: Sequence[float], std: Sequence[float]
) -> Tensor:
    """The originals, their mix, the mask and both reconstructions: one row per mixed image, in the order of COLUMNS.

    In the last two columns the cells that the mixed input shows are copied from it, the others are the model's; where
    it predicts normalised cells, they get the mean and deviation of the original.

    Args:
        images: [B, 3, H, W], normalised as the model takes them.
        mask: bool [H/32, W/32].
        prediction: [B, L, P], as MixMIM returns it.

    Returns:
        uint8 [3, rows * (H + GAP) - GAP, 6 * (W + GAP) - GAP] on the CPU.
    """
    rows = min(ROWS, len(images) // 2)
    cells = prediction.float()
    if norm_pix_loss:
        _, center, deviation = normalise(patchify(images.float()))
        cells = cells * deviation + center
    predicted = unpatchify(cells, (mask.shape[0], mask.shape[1]))
    a, b = images[:rows], images.flip(0)[:rows]
    predicted_a, predicted_b = predicted[:rows], predicted.flip(0)[:rows]
    from_b = masking.upsample(mask, *images.shape[-2:])
    shown = [a, b, b.where(from_b, a), None, predicted_a.where(from_b, a), b.where(from_b, predicted_b)]
    white = from_b.to(torch.uint8).mul(255).expand_as(a)
    columns = [white if picture is None else _pixels(picture, mean, std) for picture in shown]
    return _grid(torch.stack(columns, dim=1).cpu())


def _pixels(images: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """The inverse of the data's normalisation: uint8 [B, 3, H, W]."""
    shift, scale = (torch.tensor(v, device=images.device)[:, None, None] for v in (mean, std))
    return ((images.float() * scale + shift) * 255).round().clamp(0, 255).to(torch.uint8)


def _grid(pictures: Tensor) -> Tensor:
    """uint8 [rows, columns, 3, H, W] -> [3, ...], with white gaps between pictures."""
    framed = torch.nn.functional.pad(pictures, (0, GAP, 0, GAP), value=255)
    rows, columns, channels, height, width = framed.shape
    grid = framed.permute(2, 0, 3, 1, 4).reshape(channels, rows * height, columns * width)
    return grid[:, :-GAP, :-GAP]
