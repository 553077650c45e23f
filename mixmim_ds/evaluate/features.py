"""What an encoder makes of labelled images: one vector an image, mean over the tokens of a stage.

B images of a batch    N images of a set    D channels
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import timm
import torch
from timm.data import resolve_data_config
from torch import Tensor
from tqdm import tqdm

from mixmim_ds.config import DataConfig
from mixmim_ds.data.dali import DecodeError, Fed, build_pipeline, run_pipeline
from mixmim_ds.data.loader import Normalise
from mixmim_ds.data.shards import Images, open_images
from mixmim_ds.export.weights import read_weights
from mixmim_ds.models import MixMIMTransformer
from mixmim_ds.train.distributed import share_of_cores

CROP = 224 / 256  # share of the shorter side that evaluation at 224 looks at; larger images are taken whole
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
class Labelled:
    """A set of images as vectors."""

    vectors: Tensor  # float32 [N, D]
    labels: Tensor  # int64 [N], positions in the classes of the training set


def load_encoder(source: str, seed: int) -> MixMIMTransformer:
    """The encoder of an exported folder, of a run or one of its checkpoints, or an untrained one ("random:tiny").

    Raises:
        ValueError: there is none.
    """
    if source.startswith(RANDOM):
        name = f"mixmim_{source.removeprefix(RANDOM)}"
        if not timm.is_model(name):
            raise ValueError(f"{source} names no size; give random:tiny, random:base, random:large or random:huge.")
        torch.manual_seed(seed)
        return timm.create_model(name, num_classes=0)
    if Path(source, "config.json").is_file():
        return timm.create_model(f"local-dir:{source}", pretrained=True, num_classes=0)
    weights = read_weights(Path(source))
    encoder = timm.create_model(weights.config.model.encoder, img_size=weights.config.model.img_size, num_classes=0)
    encoder.load_state_dict({name: pieces.contiguous() for name, pieces in weights.encoder.items()})
    encoder.pretrained_cfg |= {"mean": tuple(weights.config.data.mean), "std": tuple(weights.config.data.std)}
    return encoder


def open_labelled(root: Path, index_dir: Path) -> tuple[Images, Images]:
    """The indices of `root`/train and `root`/val.

    Raises:
        ValueError: one is missing or has no classes, or the classes of val are not among those of train.
    """
    found = []
    for part in ("train", "val"):
        index = open_images(DataConfig(root=str(root / part), index_dir=str(index_dir)), progress=True)
        assert index is not None
        if (np.asarray(index.labels) < 0).any() or len(index.classes) < 2:
            raise ValueError(f"--data: {root / part} must hold a folder for each of at least two classes.")
        found.append(index)
    strange = sorted(set(found[1].classes) - set(found[0].classes))
    if strange:
        raise ValueError(f"--data: {root / 'val'} has the class {strange[0]}, which {root / 'train'} lacks.")
    return found[0], found[1]


def central_windows(sizes: np.ndarray, share: float) -> np.ndarray:
    """Squares in the middle of images: sizes int [B, 2] -> top, left, height and width, int32 [B, 4]."""
    side = np.maximum(np.round(sizes.min(1) * share).astype(np.int32), 1)
    corner = (sizes - side[:, None]) // 2
    return np.column_stack([corner, side, side]).astype(np.int32)


@torch.inference_mode()
def extract(encoder: MixMIMTransformer, view: View, index: Images, device: torch.device, batch: int) -> Tensor:
    """The vectors of all images, each once, in the order of the index: float32 [N, D].

    Raises:
        ValueError: an image cannot be decoded.
    """
    size = encoder.patch_embed.img_size[0]
    share = CROP if size <= 224 else 1.0
    ids = np.arange(-(-len(index) // batch) * batch) % len(index)  # the last batch is filled up with the first images

    def feed(iteration: int) -> Fed:
        rows = ids[iteration * batch : (iteration + 1) * batch] if iteration * batch < len(ids) else ids[:batch]
        windows = central_windows(index.sizes[rows], share)
        corner, sides = np.ascontiguousarray(windows[:, :2]), np.ascontiguousarray(windows[:, 2:])
        return index.give(rows), corner, sides, np.zeros(batch, np.int32)

    options = resolve_data_config(encoder.pretrained_cfg)
    normalise = Normalise(DataConfig(root="-", mean=list(options["mean"]), std=list(options["std"])), device)
    encoder = encoder.to(device).eval()
    pipeline = build_pipeline(feed, index.gives, batch, size, device, share_of_cores(), prefetch=2)
    vectors = []
    try:
        for _ in tqdm(range(len(ids) // batch), "features", unit=" batches", disable=None):
            vectors.append(view(encoder, normalise(run_pipeline(pipeline, device))).cpu())
    except DecodeError as error:
        raise ValueError(
            "--data holds images that cannot be decoded: python launch/index.py DIR --verify lists them; take them out."
        ) from error
    return torch.cat(vectors)[: len(index)]


def labels_of(index: Images, classes: list[str]) -> Tensor:
    """The labels of all images as positions in `classes`, int64 [N]."""
    position = torch.tensor([classes.index(name) for name in index.classes])
    return position[torch.from_numpy(np.array(index.labels, np.int64))]
