"""The weights in a checkpoint, gathered one by one from whatever ZeRO stage and number of processes wrote them."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf

from mixmim_ds.checkpoints import BEST, MARKER, Checkpoint, newest_complete, read_whole_checkpoint
from mixmim_ds.config import ModelConfig
from mixmim_ds.export.layouts import ENCODER, encoder_of
from mixmim_ds.models import Classifier, MixMIM, build_model
from mixmim_ds.zero_files import Scattered, read_saved


@dataclass(frozen=True)
class Weights:
    """What a checkpoint holds of the model: fp32 masters (with optim.ema_decay their average), parameters and fixed
    tables by their names in the model."""

    checkpoint: Checkpoint
    config: Any  # the run's options
    model: MixMIM | Classifier  # on the meta device: shapes without memory
    tensors: dict[str, Scattered]  # each is put together when asked for

    @property
    def encoder(self) -> dict[str, Scattered]:
        """The encoder's tensors, by their names there."""
        return encoder_of(self.tensors)

    @property
    def decoder(self) -> dict[str, Scattered]:
        """All others, which only pretraining needs."""
        return {name: t for name, t in self.tensors.items() if not name.startswith(ENCODER)}


def read_weights(source: Path) -> Weights:
    """The weights of a run's newest complete checkpoint (its best if it was judged), or of the checkpoint given.

    Needs neither a GPU nor a process group, and no memory before a tensor is asked for.

    Raises:
        ValueError: there is no complete checkpoint, or a file of it was altered, or it holds another model than its
            run's config.yaml says.
    """
    checkpoint = _find(source)
    run_dir = checkpoint.path.parent.parent
    config = _read_config(run_dir)
    with torch.device("meta"):
        model = _build(config)
    tensors = read_saved(checkpoint.path).averaged
    expected = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    found = {name: tuple(value.shape) for name, value in tensors.items()}
    wrong = sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name))
    if wrong:
        said = f"model.encoder={config.model.encoder} at {config.model.img_size} pixels"
        raise ValueError(
            f"{checkpoint.path} holds another model than {said}, which {run_dir / 'config.yaml'} names: "
            f"{len(wrong)} tensors differ, the first is {wrong[0]}."
        )
    return Weights(checkpoint, config, model, tensors)


def _build(config: Any) -> MixMIM | Classifier:
    """The model of a run, by the options in its config.yaml."""
    if "init" not in config:
        return build_model(config.model)
    return Classifier(config.model.encoder, config.model.img_size, len(config.data.classes))


def _find(source: Path) -> Checkpoint:
    """The best or newest complete checkpoint of a run folder, or the one that `source` itself is."""
    if not source.is_dir():
        raise ValueError(f"{source} is no folder; give a run, one of its checkpoints or, where it is taken, an export.")
    if not (source / "checkpoints").is_dir():
        if (source / "config.json").is_file():
            raise ValueError(f"{source} is an export already; give the run that it was made of.")
        if not (source / MARKER).is_file():
            raise ValueError(
                f"{source} is neither a run folder, which has checkpoints/, nor a complete checkpoint, which has "
                f"{MARKER}, nor an export, which has config.json."
            )
        return read_whole_checkpoint(source.resolve())
    best = source.resolve() / "checkpoints" / BEST
    if best.is_file() and (best.parent / best.read_text()).is_dir():  # it is not where damage set it aside
        return read_whole_checkpoint(best.parent / best.read_text())
    newest = newest_complete(source.resolve())
    if newest is None:
        raise ValueError(f"{source} holds no complete checkpoint; the run must reach train.save_every first.")
    return newest


def _read_config(run_dir: Path) -> Any:
    """The options of a run; of its model, too, those that are younger than the run, which have their defaults."""
    try:
        config: Any = OmegaConf.load(run_dir / "config.yaml")
    except OSError as error:
        raise ValueError(
            f"{run_dir / 'config.yaml'} cannot be read ({error.strerror}); a checkpoint is converted in its run folder."
        ) from error
    if "init" not in config:
        config.model = OmegaConf.merge(ModelConfig, config.model)
    return config
