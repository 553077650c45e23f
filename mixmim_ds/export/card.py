"""The README of an export: what the weights are and how they came to be."""

import json
from pathlib import Path
from typing import Any

import torch
from timm.models._hub import generate_readme

from mixmim_ds.checkpoints import Checkpoint, sha256
from mixmim_ds.config import peak_lr
from mixmim_ds.export.weights import Weights
from mixmim_ds.json_lines import read_rows
from mixmim_ds.models import MixMIM, MixMIMTransformer

CITATION = """@article{liu2022mixmim,
  title={MixMAE: Mixed and Masked Autoencoder for Efficient Pretraining of Hierarchical Vision Transformers},
  author={Liu, Jihao and Huang, Xin and Zheng, Jinliang and Liu, Yu and Li, Hongsheng},
  journal={arXiv preprint arXiv:2205.13137},
  year={2022}
}"""


def how_to_load(folder: str, alone: bool) -> list[str]:
    """Python statements that load an export; `alone`: by the mixmim.py in it, where this package is missing."""
    found = ["import sys", f'sys.path.insert(0, "{folder}")', "import timm, mixmim"]
    loaded = f'model = timm.create_model("local-dir:{folder}", pretrained=True)'
    return [*(found if alone else ["import timm, mixmim_ds"]), loaded]


def card_of_run(weights: Weights, name: str, dtype: torch.dtype, alone: bool) -> str:
    """Markdown with the front matter of timm's model cards: recipe, data, steps, loss and versions.

    Args:
        name: of the folder.
        dtype: of the weights in it.
        alone: it holds mixmim.py.
    """
    config, checkpoint = weights.config, weights.checkpoint
    lr = peak_lr(config.optim.base_lr, config.train.global_batch)
    recipe = (
        f"{config.train.epochs} epochs planned, batch {config.train.global_batch}, AdamW with peak lr {lr:g}, weight "
        f"decay {config.optim.weight_decay}, {config.optim.warmup_epochs} warm-up epochs, {config.precision}, seed "
        f"{config.train.seed}"
    )
    details = {
        "Normalisation": f"mean {list(config.data.mean)}, std {list(config.data.std)}",
        **(
            _pretrained(config, recipe) if isinstance(weights.model, MixMIM) else _finetuned(config, recipe, checkpoint)
        ),
        "Steps": f"{checkpoint.step:,}",
        "Loss": _loss(checkpoint),
        "Data": f"{config.data.kind}, fingerprint {config.data.fingerprint}",
        "Versions": ", ".join(f"{package} {number}" for package, number in _versions(checkpoint).items()),
    }
    return _card(weights.model.encoder, name, dtype, alone, details)


def _pretrained(config: Any, recipe: str) -> dict[str, str]:
    pixels = "normalised pixels" if config.model.norm_pix_loss else "pixels"
    return {"Pretraining": f"MixMIM (arXiv 2205.13137), mask ratio {config.model.mask_ratio}, {pixels}, {recipe}"}


def _finetuned(config: Any, recipe: str, checkpoint: Checkpoint) -> dict[str, str]:
    optim, augment = config.optim, ", ".join(f"{name} {value}" for name, value in config.augment.items())
    average = f", average of the weights with decay {optim.ema_decay}" if optim.ema_decay else ""
    return {
        "Fine-tuning": f"from {config.init}, {recipe}, layer decay {optim.layer_decay}, drop path "
        f"{config.model.drop_path}, {augment}{average}",
        "Top-1": _top1(checkpoint),
    }


def card_of_file(encoder: MixMIMTransformer, source: Path, name: str, dtype: torch.dtype, alone: bool) -> str:
    """As `card_of_run`, for weights whose history is not known."""
    return _card(encoder, name, dtype, alone, {"Source": f"{source.name}, sha256 {sha256(source)}"})


def _card(encoder: MixMIMTransformer, name: str, dtype: torch.dtype, alone: bool, history: dict[str, str]) -> str:
    height, width = encoder.patch_embed.img_size
    millions = sum(parameter.numel() for parameter in encoder.parameters()) / 1e6
    classifier = f"{encoder.num_classes} classes" if encoder.num_classes else "no classifier"
    details = {
        "Model": f"{encoder.pretrained_cfg['architecture']}, {millions:.1f} M parameters, "
        f"{encoder.num_features} features, {classifier}",
        "Image size": f"{height} x {width}",
        "Weights": str(dtype).removeprefix("torch."),
    }
    told = "or with the mixmim.py beside this card, which needs nothing else" if alone else "which must be installed"
    about = (
        "mixmim_ds is a Python package that trains MixMIM with DeepSpeed and adds its encoders to timm. "
        f"These weights load in timm >= 1.0.31 with that package, {told}."
    )
    statements = "\n".join(how_to_load(name, alone))
    usage = f"```python\n{statements}  # num_classes=N for a new classifier\n```\n"
    task = "image-classification" if encoder.num_classes else "image-feature-extraction"
    card = {"description": about, "details": details | history, "usage": usage, "citation": CITATION}
    card["tags"] = [task, "timm"]
    card["license"] = "unknown"  # is for those to say who trained the weights, and whose images they saw
    return generate_readme(card, name, task_name=task)


def _loss(checkpoint: Checkpoint) -> str:
    """The last one reported up to the checkpoint."""
    rows = [row for row in _rows(checkpoint, "metrics.jsonl") if row["loss"] is not None]  # of a step left out
    return f"{rows[-1]['loss']:.4f} at step {rows[-1]['step']:,}" if rows else "not reported"


def _top1(checkpoint: Checkpoint) -> str:
    """Of the checkpoint itself."""
    rows = [row for row in _rows(checkpoint, "evaluations.jsonl") if row["step"] == checkpoint.step]
    return f"{rows[-1]['top1']:.2%} of {rows[-1]['images']:,} images" if rows else "not measured"


def _rows(checkpoint: Checkpoint, name: str) -> list[dict[str, Any]]:
    """Those of a file of the run, up to the checkpoint."""
    return [row for row in read_rows(checkpoint.path.parent.parent / name) if row["step"] <= checkpoint.step]


def _versions(checkpoint: Checkpoint) -> dict[str, Any]:
    """Those of the run's last start."""
    path = checkpoint.path.parent.parent / "environment.json"
    return json.loads(path.read_text())[-1]["versions"] if path.exists() else {}
