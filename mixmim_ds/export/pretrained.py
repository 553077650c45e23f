"""Exports read back: the encoder, and a whole MixMIM of one that kept its decoder, too, or of a run."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
from omegaconf import OmegaConf
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file

from mixmim_ds.config import ModelConfig
from mixmim_ds.export.layouts import ENCODER
from mixmim_ds.export.to_timm import DECODER_FILE, MODEL_NOTE, WEIGHTS_FILE
from mixmim_ds.export.weights import read_weights
from mixmim_ds.models import MixMIM, MixMIMTransformer, build_model


@dataclass(frozen=True)
class Pretrained:
    """A model with what it was trained for."""

    model: MixMIM  # fp32, on the CPU, in evaluation mode
    options: ModelConfig
    mean: list[float]  # of the pixels that it takes, a channel each
    std: list[float]


def load_pretrained(source: Path) -> Pretrained:
    """The model of a run's newest complete checkpoint, of a checkpoint, or of an exported folder.

    Raises:
        ValueError: there is none, or the export was made without its decoder, or its files are not of one model.
    """
    if (source / "config.json").is_file():
        return _of_export(source)
    weights = read_weights(source)
    if not weights.decoder:
        raise ValueError(f"{source} was fine-tuned and holds no decoder; give the run that it was pretrained in.")
    options: Any = OmegaConf.to_container(weights.config.model)
    state = {name: pieces.contiguous() for name, pieces in weights.tensors.items()}
    return _put_together(options, state, weights.config.data)


def _put_together(options: dict[str, Any], state: dict[str, Any], normalisation: Any) -> Pretrained:
    config = ModelConfig(**options)
    model = build_model(config)
    model.load_state_dict(state)
    return Pretrained(model.eval(), config, list(normalisation["mean"]), list(normalisation["std"]))


def load_exported(folder: Path, head: bool = True) -> MixMIMTransformer:
    """The encoder of an exported folder, by timm.

    Args:
        head: with the classifier that it has, if it has one.

    Raises:
        ValueError: the folder holds another model, or a file of it is missing, damaged or of another one.
    """
    classes = {} if head else {"num_classes": 0}
    remedy = "give a folder that launch/convert.py wrote, or write it anew."
    try:
        name = json.loads((folder / "config.json").read_text())["architecture"]
        ours = name in timm.list_models("mixmim_*")
        encoder = timm.create_model(f"local-dir:{folder}", pretrained=True, **classes) if ours else None
    except Exception as error:  # there is no telling what damaged files make timm raise
        reason = str(error).partition("\n")[0].rstrip(".:")
        raise ValueError(f"{folder} is no whole export ({type(error).__name__}: {reason}); {remedy}") from error
    if encoder is None:
        raise ValueError(f"{folder} holds {name}, which is no MixMIM encoder; {remedy}")
    return encoder


def _of_export(folder: Path) -> Pretrained:
    """The model of an exported folder."""
    path, remedy = folder / DECODER_FILE, "give the run, or export it by launch/convert.py RUN OUT_DIR --with-decoder."
    if not path.is_file():
        raise ValueError(f"{folder} holds no decoder, which reconstructions take; {remedy}")
    try:
        with safe_open(path, framework="pt") as file:
            notes = file.metadata() or {}
        encoder, decoder = load_file(folder / WEIGHTS_FILE), load_file(path)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{folder} cannot be read ({error}); {remedy}") from error
    if MODEL_NOTE not in notes:
        raise ValueError(f"{path} does not say what model it is of; {remedy}")
    state = {ENCODER + name: tensor for name, tensor in encoder.items()} | decoder
    try:
        normalisation = json.loads((folder / "config.json").read_text())["pretrained_cfg"]
        return _put_together(json.loads(notes[MODEL_NOTE]), state, normalisation)
    except (KeyError, TypeError, ValueError, RuntimeError) as error:  # a file of another export, or written by hand
        reason = type(error).__name__
        raise ValueError(f"{folder} holds files that are not of one model ({reason}); {remedy}") from error
