"""The README of an export: what the weights are and how they came to be."""

import json
from pathlib import Path
from typing import Any

import torch
from timm.models._hub import generate_readme

from mixmim_ds.checkpoints import Checkpoint, sha256
from mixmim_ds.export.weights import Weights
from mixmim_ds.models import MixMIMTransformer

CITATION = """@article{liu2022mixmim,
  title={MixMAE: Mixed and Masked Autoencoder for Efficient Pretraining of Hierarchical Vision Transformers},
  author={Liu, Jihao and Huang, Xin and Zheng, Jinliang and Liu, Yu and Li, Hongsheng},
  journal={arXiv preprint arXiv:2205.13137},
  year={2022}
}"""


def card_of_run(weights: Weights, name: str, dtype: torch.dtype) -> str:
    """Markdown with the front matter of timm's model cards: recipe, data, steps, loss and versions."""
    config, checkpoint = weights.config, weights.checkpoint
    lr = config.optim.base_lr * config.train.global_batch / 256
    details = {
        "Normalisation": f"mean {list(config.data.mean)}, std {list(config.data.std)}",
        "Pretraining": f"MixMIM (arXiv 2205.13137), mask ratio {config.model.mask_ratio}, "
        f"{'normalised pixels' if config.model.norm_pix_loss else 'pixels'}, {config.train.epochs} epochs planned, "
        f"batch {config.train.global_batch}, AdamW with peak lr {lr:g}, weight decay {config.optim.weight_decay}, "
        f"{config.optim.warmup_epochs} warm-up epochs, {config.precision}, seed {config.train.seed}",
        "Steps": f"{checkpoint.step:,}",
        "Loss": _loss(checkpoint),
        "Data": f"{config.data.kind}, fingerprint {config.data.fingerprint}",
        "Versions": ", ".join(f"{package} {number}" for package, number in _versions(checkpoint).items()),
    }
    return _card(weights.model.encoder, name, dtype, details)


def card_of_file(encoder: MixMIMTransformer, source: Path, name: str, dtype: torch.dtype) -> str:
    """As `card_of_run`, for weights whose history is not known."""
    return _card(encoder, name, dtype, {"Source": f"{source.name}, sha256 {sha256(source)}"})


def _card(encoder: MixMIMTransformer, name: str, dtype: torch.dtype, history: dict[str, str]) -> str:
    height, width = encoder.patch_embed.img_size
    millions = sum(parameter.numel() for parameter in encoder.parameters()) / 1e6
    classifier = f"{encoder.num_classes} classes" if encoder.num_classes else "no classifier"
    details = {
        "Model": f"{encoder.pretrained_cfg['architecture']}, {millions:.1f} M parameters, "
        f"{encoder.num_features} features, {classifier}",
        "Image size": f"{height} x {width}",
        "Weights": str(dtype).removeprefix("torch."),
    }
    usage = (
        "```python\nimport timm, mixmim_ds\n\n"
        f'model = timm.create_model("local-dir:{name}", pretrained=True)  # num_classes=N for a new classifier\n```\n'
    )
    tags = ["image-feature-extraction", "timm"]
    card = {"details": details | history, "usage": usage, "citation": CITATION, "tags": tags}
    return generate_readme(card, name, task_name="image-feature-extraction")


def _loss(checkpoint: Checkpoint) -> str:
    """The last one reported up to the checkpoint."""
    path = checkpoint.path.parent.parent / "metrics.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    rows = [row for row in rows if row["step"] <= checkpoint.step]
    return f"{rows[-1]['loss']:.4f} at step {rows[-1]['step']:,}" if rows else "not reported"


def _versions(checkpoint: Checkpoint) -> dict[str, Any]:
    """Those of the run's last start."""
    path = checkpoint.path.parent.parent / "environment.json"
    return json.loads(path.read_text())[-1]["versions"] if path.exists() else {}
