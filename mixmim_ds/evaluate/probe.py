"""How well frozen vectors tell classes apart: weighted k nearest neighbours, and a linear classifier.

N, M images of the training and validation sets    D channels    K classes
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from mixmim_ds.evaluate.features import Vectors

NEIGHBOURS, TEMPERATURE = 20, 0.07  # those of Wu et al. (arXiv 1805.01978) and DINO, but that they look at more
ROWS = 1024  # of the validation set at once
PENALTIES = tuple(10.0**power for power in range(-4, 1))  # weight decays that are tried
HELD_OUT = 5  # every fifth image of the training set chooses among them
STEPS = 100


def nearest(known: Vectors, asked: Tensor) -> tuple[Tensor, Tensor]:
    """For vectors [M, D] the most similar known ones by cosine: float32 similarities and int64 labels, [M, k].

    k is NEIGHBOURS, or the number of known ones if there are fewer.
    """
    sides, k = F.normalize(known.vectors), min(NEIGHBOURS, len(known.labels))
    found = [(F.normalize(rows) @ sides.T).topk(k) for rows in asked.split(ROWS)]
    return torch.cat([part.values for part in found]), known.labels[torch.cat([part.indices for part in found])]


def nearest_of(parts: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """As `nearest` would find among the known vectors of all parts."""
    similarities, labels = (torch.cat(some, dim=1) for some in zip(*parts, strict=True))
    best = similarities.topk(min(NEIGHBOURS, similarities.shape[1]))
    return best.values, labels.gather(1, best.indices)


def accuracy_of_votes(similarities: Tensor, labels: Tensor, wanted: Tensor) -> float:
    """Top-1 where each neighbour votes with the weight exp(similarity / temperature).

    Args:
        similarities, labels: of the neighbours, [M, k].
        wanted: int64 [M].
    """
    votes = torch.zeros(len(wanted), int(labels.max()) + 1)
    votes.scatter_add_(1, labels, (similarities / TEMPERATURE).exp())
    return int((votes.argmax(1) == wanted).sum()) / len(wanted)


def accuracy_of_neighbours(train: Vectors, val: Vectors) -> float:
    """Top-1 by the votes of the nearest vectors."""
    return accuracy_of_votes(*nearest(train, val.vectors), val.labels)


def accuracy_of_classifier(train: Vectors, val: Vectors) -> tuple[float, float]:
    """Top-1 of a linear classifier on the vectors, and its weight decay, chosen on a part of the training set."""
    held_out = torch.arange(len(train.labels)) % HELD_OUT == 0
    part = Vectors(train.vectors[~held_out], train.labels[~held_out])
    judge = Vectors(train.vectors[held_out], train.labels[held_out])
    scores = {penalty: _score(part, judge, penalty) for penalty in PENALTIES}
    best = max(scores, key=lambda penalty: scores[penalty])
    return _score(train, val, best), best


def _score(train: Vectors, val: Vectors, penalty: float) -> float:
    spread, middle = torch.std_mean(train.vectors, 0)
    inputs, tested = ((each.vectors - middle) / (spread + 1e-6) for each in (train, val))
    weight, bias = fit(inputs, train.labels, int(max(train.labels.max(), val.labels.max())) + 1, penalty)
    return (F.linear(tested, weight, bias).argmax(1) == val.labels).float().mean().item()


def fit(inputs: Tensor, labels: Tensor, classes: int, penalty: float) -> tuple[Tensor, Tensor]:
    """Softmax regression by LBFGS from zero, which has one minimum: weight [K, D] and bias [K].

    Args:
        penalty: times half the squared norm of the weight, beside the mean cross entropy.
    """
    weight = torch.zeros(classes, inputs.shape[1], requires_grad=True)
    bias = torch.zeros(classes, requires_grad=True)
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=STEPS, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        value = F.cross_entropy(F.linear(inputs, weight, bias), labels) + penalty / 2 * weight.square().sum()
        value.backward()
        return value

    optimizer.step(loss)
    return weight.detach(), bias.detach()
