"""How many images a classifier names rightly, counted over ranks.

K classes
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from math import fsum

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

NEAR = 5  # of top-5; of all classes where there are fewer


@dataclass
class Counts:
    """What one rank has counted."""

    images: int = 0
    top1: int = 0  # images whose class got the highest logit
    top5: int = 0  # ... one of the five highest
    losses: list[float] = field(default_factory=list)  # sums of the cross entropy, one a batch


@torch.inference_mode()
def count(classify: Callable[[Tensor], Tensor], batches: Iterable[tuple[Tensor, np.ndarray]], labels: Tensor) -> Counts:
    """Counts what a classifier makes of images.

    Args:
        classify: float32 [B, 3, H, W] -> logits [B, K].
        batches: images and their rows, as `CentralBatches` yields them.
        labels: int64 [N] on the CPU, of all rows.
    """
    counts = Counts()
    for images, rows in batches:
        logits = classify(images)[: len(rows)].float()
        wanted = labels[torch.from_numpy(rows)].to(logits.device)
        ranking = logits.topk(min(NEAR, logits.shape[1])).indices == wanted[:, None]
        counts.images += len(rows)
        counts.top1 += int(ranking[:, 0].sum())
        counts.top5 += int(ranking.any(1).sum())
        counts.losses.append(F.cross_entropy(logits.double(), wanted, reduction="sum").item())
    return counts


def scores(parts: list[Counts]) -> dict[str, float]:
    """Of all ranks together: top1 and top5 from 0 to 1, the mean loss, and of how many images.

    The sum of the losses is exact (fsum), so it does not depend on who has counted what.
    """
    images = sum(part.images for part in parts)
    return {
        "top1": sum(part.top1 for part in parts) / images,
        "top5": sum(part.top5 for part in parts) / images,
        "loss": fsum(loss for part in parts for loss in part.losses) / images,
        "images": images,
    }
