"""What an encoder makes of labelled images: one vector an image, mean over the tokens of a stage.

B images of a batch    N images of a set    D channels
"""

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import timm
import torch
from timm.data import resolve_data_config
from torch import Tensor
from tqdm import tqdm

from mixmim_ds.data.central import CentralBatches, LeftOut
from mixmim_ds.data.labelled import Labelled
from mixmim_ds.data.loader import Normalise
from mixmim_ds.export.pretrained import load_exported
from mixmim_ds.export.weights import read_weights
from mixmim_ds.models import MixMIMTransformer

RANDOM = "random:"


@dataclass(frozen=True)
class View:
    """Which vector is taken of an encoder."""

    stage: int = 0  # 1, 2, 3 ...; 0 = the last
    norm: bool = True  # the encoder's final LayerNorm, which only the last stage has

    def __call__(self, encoder: MixMIMTransformer, images: Tensor) -> Tensor:
        """float [B, 3, H, W] -> float32 [B, D]."""
        wanted = [(self.stage or len(encoder.layers)) - 1]
        _, (tokens,) = encoder.forward_intermediates(images, wanted, norm=self.norm, stop_early=True, output_fmt="NHWC")
        return tokens.float().mean((1, 2))

    def check(self, encoder: MixMIMTransformer) -> None:
        """ValueError if the encoder has no such stage."""
        if not 0 <= self.stage <= len(encoder.layers):
            raise ValueError(f"--stage {self.stage} must be one of 1 to {len(encoder.layers)}, or 0 for the last.")
        if not self.norm and self.stage not in (0, len(encoder.layers)):
            raise ValueError(f"--no-norm has no effect with --stage {self.stage}: only the last stage has a LayerNorm.")


@dataclass(frozen=True)
class Vectors:
    """A labelled set of images as vectors."""

    vectors: Tensor  # float32 [N, D]
    labels: Tensor  # int64 [N], positions in the classes of the training set
    left_out: LeftOut = field(default_factory=list)  # images that have no vector, but for those known to have none


def load_encoder(source: str, seed: int, option: str, head: bool = False) -> MixMIMTransformer:
    """The encoder of an exported folder, of a run or one of its checkpoints, or an untrained one ("random:tiny").

    Args:
        seed: of the untrained one's weights.
        option: what the user calls the source.
        head: with the classifier that it has, if it has one.

    Raises:
        ValueError: there is none, or it is not made for colour.
    """
    try:
        encoder = _load(source, seed, head)
        if encoder.in_chans != 3:
            raise ValueError(f"{source} takes {encoder.in_chans} channels, images have 3; give an encoder of 3.")
        return encoder
    except ValueError as error:
        raise ValueError(f"{option}: {error}") from error


def _load(source: str, seed: int, head: bool) -> MixMIMTransformer:
    if source.startswith(RANDOM):
        return _untrained(source, seed)
    if Path(source, "config.json").is_file():
        return load_exported(Path(source), head)
    return _of_run(Path(source), head)


def _untrained(source: str, seed: int) -> MixMIMTransformer:
    name = f"mixmim_{source.removeprefix(RANDOM)}"
    if not timm.is_model(name):
        raise ValueError(f"{source} names no size; give random:tiny, random:base, random:large or random:huge.")
    torch.manual_seed(seed)
    encoder: MixMIMTransformer = timm.create_model(name, num_classes=0)
    return encoder


def _of_run(source: Path, head: bool) -> MixMIMTransformer:
    weights = read_weights(source)
    model, data = weights.config.model, weights.config.data
    found = {name: pieces.contiguous() for name, pieces in weights.encoder.items()}
    kept = {name: tensor for name, tensor in found.items() if head or not name.startswith("head.")}
    encoder: MixMIMTransformer = timm.create_model(
        model.encoder, img_size=model.img_size, num_classes=len(kept.get("head.fc.bias", ()))
    )
    encoder.load_state_dict(kept)
    encoder.pretrained_cfg |= {"mean": tuple(data.mean), "std": tuple(data.std), "label_names": data.get("classes")}
    return encoder


def normalise_of(encoder: MixMIMTransformer, device: torch.device) -> Normalise:
    """By the mean and deviation that the encoder was trained with."""
    options = resolve_data_config(encoder.pretrained_cfg)
    return Normalise(options["mean"], options["std"], device)


def side_of(encoder: MixMIMTransformer) -> int:
    """Pixels of the side of the squares that the encoder takes. ValueError if they are no squares."""
    height, width = encoder.patch_embed.img_size
    if height != width:
        raise ValueError(
            f"the encoder takes images of {height}x{width} pixels, and squares are shown to it; give it another size "
            "(--img-size of a probe, set_input_size in Python)."
        )
    return int(height)


@torch.no_grad()
def extract(
    encoder: MixMIMTransformer, view: View, images: Labelled, device: torch.device, threads: int, batch: int,
    rank: int = 0, size: int = 1, broken: dict[int, str] | None = None,
) -> Vectors:  # fmt: skip
    """The vectors of all images that can be decoded, each once, in the order of the index; of several ranks, this
    one's batches of them. In fp32 whatever the run's precision is: so a run judges itself as launch/probe.py judges it,
    or an export of it, which does not say how it was trained.

    Args:
        broken: as of `CentralBatches`.

    Raises:
        ValueError: the encoder takes no squares.
        DataFailed: nothing can be decoded any more.
    """
    pixels, normalise = side_of(encoder), normalise_of(encoder, device)
    encoder = encoder.to(device).eval()
    batches = CentralBatches(images.images, pixels, normalise, device, threads, batch, rank, size, broken)
    total = -(-len(images) // batch) // size
    vectors = [view(encoder, torch.zeros(1, 3, pixels, pixels, device=device))[:0].cpu()]  # a rank may have no batch
    rows = [np.zeros(0, np.int64)]
    for shown, some in tqdm(batches, "features", total, unit=" batches", disable=None if rank == 0 else True):
        vectors.append(view(encoder, shown)[: len(some)].cpu())
        rows.append(some)
    labels = images.labels[torch.from_numpy(np.concatenate(rows))]
    return Vectors(torch.cat(vectors), labels, batches.left_out)
