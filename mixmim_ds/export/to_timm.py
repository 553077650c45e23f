"""A run's encoder, or the authors', as a folder that `timm.create_model("local-dir:FOLDER")` loads."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from timm.models._hub import save_config_for_hf

from mixmim_ds.checkpoints import Checkpoint, sync, whole_folder
from mixmim_ds.config import ModelConfig
from mixmim_ds.export.architecture import architecture_source
from mixmim_ds.export.card import card_of_file, card_of_run
from mixmim_ds.export.files import Pieces, write_safetensors
from mixmim_ds.export.official import build_encoder, read_official
from mixmim_ds.export.weights import read_weights
from mixmim_ds.models import Classifier, MixMIMTransformer
from mixmim_ds.models.mixmim_sizes import crop_of

WEIGHTS_FILE, DECODER_FILE, ARCHITECTURE_FILE = "model.safetensors", "decoder.safetensors", "mixmim.py"
MODEL_NOTE = "model"  # in DECODER_FILE: the options of the model (ModelConfig), as JSON


@dataclass(frozen=True)
class Form:
    """What an export is to hold."""

    dtype: torch.dtype = torch.float32  # of the weights written, or bfloat16
    with_decoder: bool = False  # also decoder.safetensors, the tensors that only pretraining needs
    architecture_file: bool = False  # also mixmim.py, the encoder without this package, for those who have timm alone


@dataclass(frozen=True)
class Decoder:
    """What only pretraining needs."""

    tensors: Mapping[str, Pieces]  # by their names in MixMIM
    options: Any  # those of ModelConfig, by name


def export_run(source: Path, out: Path, form: Form) -> Checkpoint:
    """Writes the encoder of a run's newest complete checkpoint, or of the checkpoint folder given, to `out`; of
    fine-tuning that of the best, with its classifier.

    `out` gets model.safetensors (the optimizer's fp32 masters), config.json and README.md; the weights are read back
    and compared, and `out` appears only when all is well. It takes the memory of the fp32 weights, no GPU and no
    process group.

    Raises:
        ValueError: there is no complete checkpoint or it holds another model than its run says, or `out` exists or
            cannot be written.
    """
    weights = read_weights(source)
    data: dict[str, Any] = {"mean": tuple(weights.config.data.mean), "std": tuple(weights.config.data.std)}
    described: dict[str, Any] = {"data_config": data}
    if isinstance(weights.model, Classifier):
        data["crop_pct"] = crop_of(weights.config.model.img_size)
        described["model_config"] = {"label_names": list(weights.config.data.classes)}
    if form.with_decoder and not weights.decoder:
        raise ValueError(f"--with-decoder: {source} was fine-tuned and holds no decoder; leave the option out.")
    decoder = Decoder(weights.decoder, OmegaConf.to_container(weights.config.model)) if form.with_decoder else None
    card = card_of_run(weights, out.name, form.dtype, form.architecture_file)
    _write(out, form, weights.model.encoder, weights.encoder, decoder, card, described)
    return weights.checkpoint


def export_file(source: Path, out: Path, form: Form) -> None:
    """Writes the encoder in a checkpoint of the authors or of OpenMMLab, head included, to `out`, as `export_run` does.

    Raises:
        ValueError: the file cannot be read or is of no registered size, has no decoder although one is asked for, or
            `out` exists or cannot be written.
    """
    file = read_official(source)
    if form.with_decoder and not file.decoder:
        raise ValueError(f"--with-decoder: {source} holds no decoder; leave the option out.")
    encoder = build_encoder(file)
    decoder = Decoder(file.decoder, _options(encoder, file.decoder)) if form.with_decoder else None
    card = card_of_file(encoder, source, out.name, form.dtype, form.architecture_file)
    _write(out, form, encoder, encoder.state_dict(), decoder, card, {})


def _options(encoder: MixMIMTransformer, decoder: Mapping[str, Pieces]) -> dict[str, Any]:
    """Those of a model whose file does not name them: by its shapes, and for the rest, as 32 channels a head, the
    paper's."""
    dim = decoder["mask_token"].shape[-1]
    blocks = {name.split(".")[1] for name in decoder if name.startswith("decoder_blocks.")}
    name, (img_size, _) = encoder.pretrained_cfg["architecture"], encoder.patch_embed.img_size
    return asdict(ModelConfig(name, img_size, decoder_dim=dim, decoder_depth=len(blocks), decoder_num_heads=dim // 32))


def _write(
    out: Path,
    form: Form,
    encoder: MixMIMTransformer,
    tensors: Mapping[str, Pieces],
    decoder: Decoder | None,
    card: str,
    described: dict[str, Any],
) -> None:
    """`described`: for config.json, what the encoder's pretrained_cfg does not say (timm's save_config_for_hf)."""
    if out.exists():
        raise ValueError(f"{out} exists already; choose another folder to write to.")
    try:
        with whole_folder(out) as draft:
            write_safetensors(draft / WEIGHTS_FILE, tensors, form.dtype)
            if decoder:
                # Heads and targets, which shapes do not tell.
                notes = {MODEL_NOTE: json.dumps(decoder.options)}
                write_safetensors(draft / DECODER_FILE, decoder.tensors, form.dtype, notes)
            _write_config(draft / "config.json", encoder, described)
            (draft / "README.md").write_text(card)
            if form.architecture_file:
                (draft / ARCHITECTURE_FILE).write_text(architecture_source())
            for file in [*draft.iterdir(), draft]:
                sync(file)
    except OSError as error:
        raise ValueError(f"{out} cannot be written: {error.strerror or error}.") from error


def _write_config(path: Path, encoder: MixMIMTransformer, described: dict[str, Any]) -> None:
    """timm's config.json without the number of classes among the arguments of the model, as transformers hands these to
    timm beside a number of its own. timm takes it from pretrained_cfg."""
    save_config_for_hf(encoder, str(path), **described)
    config = json.loads(path.read_text())
    del config["model_args"]["num_classes"]
    path.write_text(json.dumps(config, indent=2))
