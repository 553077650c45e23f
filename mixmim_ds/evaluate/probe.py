"""How well frozen vectors tell classes apart: weighted k nearest neighbours, and a linear classifier.

N, M images of the training and validation sets    D channels    K classes
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from mixmim_ds.evaluate.features import Vectors

NEIGHBOURS, TEMPERATURE = 20, 0.07  # those of Wu et al. (arXiv 1805.01978) and DINO, but that they look at more
ROWS = 1024  # of the validation set at once
KNOWN = 65_536  # of the training set at once: what a device holds beside the model does not grow with the set
PENALTIES = tuple(10.0**power for power in range(-4, 1))  # weight decays that are tried
HELD_OUT = 5  # every fifth image of the training set chooses among them
STEPS = 100


def nearest(known: Vectors, asked: Tensor, device: torch.device) -> tuple[Tensor, Tensor]:
    """For vectors [M, D] the most similar known ones by cosine: float32 similarities and int64 labels, [M, k].

    k is NEIGHBOURS, or the number of known ones if there are fewer. The device computes; what is given and what is
    found lies on the CPU.
    """
    parts = []
    for vectors, labels in zip(known.vectors.split(KNOWN), known.labels.split(KNOWN), strict=True):
        sides, k = F.normalize(vectors.to(device)), min(NEIGHBOURS, len(labels))
        found = [(F.normalize(rows.to(device)) @ sides.T).topk(k) for rows in asked.split(ROWS)]
        places = torch.cat([part.indices for part in found]).cpu()
        parts.append((torch.cat([part.values for part in found]).cpu(), labels[places]))
    return nearest_of(parts)


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


def accuracy_of_neighbours(train: Vectors, val: Vectors, device: torch.device) -> float:
    """Top-1 by the votes of the nearest vectors."""
    return accuracy_of_votes(*nearest(train, val.vectors, device), val.labels)


def accuracy_of_classifier(train: Vectors, val: Vectors, device: torch.device) -> tuple[float, float]:
    """Top-1 of a linear classifier on the vectors, and its weight decay, chosen on a part of the training set."""
    held_out = torch.arange(len(train.labels)) % HELD_OUT == 0
    part = Vectors(train.vectors[~held_out], train.labels[~held_out])
    judge = Vectors(train.vectors[held_out], train.labels[held_out])
    scores = {penalty: _score(part, judge, penalty, device) for penalty in PENALTIES}
    best = max(scores, key=lambda penalty: scores[penalty])
    return _score(train, val, best, device), best


def _score(train: Vectors, val: Vectors, penalty: float, device: torch.device) -> float:
    spread, middle = torch.std_mean(train.vectors, 0)
    inputs, tested = ((each.vectors - middle) / (spread + 1e-6) for each in (train, val))
    classes = int(max(train.labels.max(), val.labels.max())) + 1
    weight, bias = (found.cpu() for found in fit(inputs.to(device), train.labels.to(device), classes, penalty))
    return (F.linear(tested, weight, bias).argmax(1) == val.labels).float().mean().item()


def fit(inputs: Tensor, labels: Tensor, classes: int, penalty: float) -> tuple[Tensor, Tensor]:
    """Softmax regression by LBFGS from zero, which has one minimum: weight [K, D] and bias [K], where the inputs are.

    Args:
        penalty: times half the squared norm of the weight, beside the mean cross entropy.
    """
    weight = torch.zeros(classes, inputs.shape[1], device=inputs.device, requires_grad=True)
    bias = torch.zeros(classes, device=inputs.device, requires_grad=True)
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=STEPS, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        value = penalty / 2 * weight.square().sum()
        value.backward()
        for rows, told in zip(inputs.split(KNOWN), labels.split(KNOWN), strict=True):  # all at once have [N, K] logits
            part = F.cross_entropy(F.linear(rows, weight, bias), told) * (len(told) / len(labels))
            part.backward()
            value = value.detach() + part.detach()
        return value

    optimizer.step(loss)
    return weight.detach(), bias.detach()
