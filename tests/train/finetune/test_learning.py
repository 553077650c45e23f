"""What fine-tuning begins with, and how each layer moves."""

import json
import shutil
from dataclasses import replace
from itertools import chain, islice
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from launching import tasks
from safetensors.torch import load_file
from timm.models._hub import save_for_hf
from tuning import PLAIN, SCRIPT

from mixmim_ds.compose import load_finetune_config
from mixmim_ds.data.labelled import open_labelled
from mixmim_ds.data.labelled_loader import LabelledLoader
from mixmim_ds.data.loader import Share
from mixmim_ds.export.official import save_official
from mixmim_ds.export.to_timm import Form, export_file
from mixmim_ds.models import Classifier
from mixmim_ds.train.finetune import load_init
from mixmim_ds.train.optim import Schedule, layer_scale
from mixmim_ds.zero_files import AVERAGE, read_saved


@pytest.mark.slow
def test_half_precision_begins_with_the_exact_weights(straight: Path, larger: list[str], tmp_path: Path) -> None:
    words = ["precision=bf16", "model.img_size=64", "optim.base_lr=1e-30", "train.max_steps=1"]
    tasks(*larger, *words, f"run_dir={tmp_path}", processes=1, script=SCRIPT)
    masters = read_saved(tmp_path / "checkpoints" / "step_00000001").masters
    for name, tensor in load_file(straight / "timm" / "model.safetensors").items():
        if "pos_embed" not in name:  # a buffer
            assert torch.equal(masters[f"encoder.{name}"].contiguous(), tensor), name


def test_tables_are_interpolated_to_the_image_size(straight: Path, options: list[str]) -> None:
    config = load_finetune_config([*options, "run_dir=UNUSED", f"init={straight / 'timm'}", "model.img_size=96"])
    model = Classifier("mixmim_tiny", 96, 13).eval()
    assert load_init(model, config, list("ABCDEFGHIJKLM")).startswith("new, the encoder that of"), "other classes"
    expected = timm.create_model(f"local-dir:{straight / 'timm'}", pretrained=True).eval()
    expected.set_input_size(96)
    images = torch.randn(2, 3, 96, 96, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(model.encoder.forward_features(images), expected.forward_features(images))
    assert model.encoder.head.fc.weight.abs().max() < 1e-4, "its classifier is new"
    for source in (straight, straight / "timm"):  # a run and its export
        classes = json.loads((straight / "timm" / "config.json").read_text())["label_names"]
        assert load_init(model, replace(config, init=str(source)), classes) == f"that of init={source}"
        torch.testing.assert_close(model.encoder.head.fc.weight, expected.head.fc.weight, rtol=0, atol=0)


def test_a_classifier_that_does_not_name_its_classes_is_kept_if_it_has_as_many(
    options: list[str], tmp_path: Path
) -> None:
    torch.manual_seed(0)
    tuned = timm.create_model("mixmim_tiny", img_size=64, num_classes=13)
    save_official(tuned, tmp_path / "authors.pth")
    export_file(tmp_path / "authors.pth", tmp_path / "timm", Form())
    config = load_finetune_config([*options, "run_dir=UNUSED", f"init={tmp_path / 'timm'}"])
    fourteen = Classifier("mixmim_tiny", 64, 14)
    assert load_init(fourteen, config, list("ABCDEFGHIJKLMN")).startswith("new")
    model = Classifier("mixmim_tiny", 64, 13)
    assert "they are taken for those of data.root" in load_init(model, config, list("ABCDEFGHIJKLM"))
    assert torch.equal(model.encoder.head.fc.weight, tuned.head.fc.weight)


@pytest.mark.parametrize("pool", ["max", "catavgmax"])
def test_a_classifier_of_features_pooled_in_another_way_is_replaced(
    pool: str, options: list[str], tmp_path: Path
) -> None:
    save_for_hf(timm.create_model("mixmim_tiny", img_size=64, num_classes=2, global_pool=pool), tmp_path)
    config = load_finetune_config([*options, "run_dir=UNUSED", f"init={tmp_path}"])
    assert load_init(Classifier("mixmim_tiny", 64, 2), config, ["a", "b"]).startswith("new, the encoder that of")


def layers_of_tiny() -> dict[str, int]:
    """The authors' layer ids, written down for depths 1, 1, 4, 1: eight layers, of which the last learns at decay^1."""
    return {
        "patch_embed": 0, "layers.0.blocks.0": 1, "layers.1.downsample": 2, "layers.1.blocks.0": 2,
        "layers.2.downsample": 3, "layers.2.blocks.0": 3, "layers.2.blocks.1": 4, "layers.2.blocks.2": 5,
        "layers.2.blocks.3": 6, "layers.3.downsample": 7, "layers.3.blocks.0": 7, "norm": 7, "head": 7,
    }  # fmt: skip


def plainly_trained(options: list[str], steps: int) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """The weights after some steps of a plain loop with torch's AdamW, and their average with decay 0.75."""
    config = load_finetune_config([*options, "run_dir=UNUSED"])
    train, _ = open_labelled(config.data)
    torch.manual_seed(config.train.seed)
    model = Classifier("mixmim_tiny", 64, len(train.classes))
    groups = []
    for name, parameter in model.named_parameters():
        layer = next(i for prefix, i in layers_of_tiny().items() if name.startswith(f"encoder.{prefix}."))
        decayed = parameter.ndim > 1 and not name.endswith("bias")
        groups.append({"params": [parameter], "weight_decay": 0.05 * decayed, "scale": 0.7 ** (8 - layer)})
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.999))
    batches = LabelledLoader(config, train, Share(0, 1, 2), torch.device("cpu"), 1, None).batches(0)
    schedule = Schedule(config.optim, 32, 7, 2)
    average: dict[str, torch.Tensor] = {}
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = schedule.lr_at(step) * group["scale"]
        for _ in range(2):
            (model(*next(batches).inputs)[0] / 2).backward()
        optimizer.step()
        optimizer.zero_grad()
        now = {name: p.detach().clone() for name, p in model.named_parameters()}
        average = {name: 0.75 * average.get(name, value) + 0.25 * value for name, value in now.items()}
    return now, average


def test_what_is_random_follows_from_the_seed_the_step_and_the_place_alone(options: list[str]) -> None:
    """Three steps of two micro-batches of 16 images: what each is begun with, images by the pool and batches by us."""

    def seeds(ranks: int, seed: int) -> tuple[list[list[int]], list[int]]:
        config = load_finetune_config([*options, "run_dir=UNUSED", f"train.seed={seed}"])
        train, _ = open_labelled(config.data)
        of_images, of_batches, turns = [], [], 3 * 2 // ranks
        for rank in range(ranks):
            asked: list[list[int]] = []
            pool: Any = lambda pixels, given, asked=asked: asked.append(given.tolist()) or pixels  # noqa: E731
            loader = LabelledLoader(config, train, Share(rank, ranks, 2 // ranks), torch.device("cpu"), 1, pool)
            of_batches += [torch.initial_seed() for _ in islice(loader.batches(0), turns)]
            of_images += asked[:turns]
        return sorted(of_images), sorted(of_batches)

    (of_images, of_batches), others = seeds(1, 0), seeds(1, 1)
    assert seeds(2, 0) == (of_images, of_batches)
    images, other_images = (set(chain(*each)) for each in (of_images, others[0]))
    assert len(images) == 96 and not images & other_images
    assert len(set(of_batches)) == 6 and not set(of_batches) & set(others[1])


@pytest.mark.slow
@pytest.mark.parametrize("ds", ["zero1", "zero2", "zero3"])
def test_each_layer_moves_as_under_plain_adamw(ds: str, options: list[str], tmp_path: Path) -> None:
    options = [*options, *PLAIN, "optim.ema_decay=0.75", "train.seed=5"]
    tasks(*options, f"run_dir={tmp_path}", f"ds={ds}", "train.max_steps=2", script=SCRIPT)
    saved = read_saved(tmp_path / "checkpoints" / "step_00000002")
    weights, average = plainly_trained(options, 2)
    first, _ = plainly_trained(options, 1)
    for name, expected in weights.items():
        # Adam's first steps are of about lr whatever the gradient, so the rounding of a gradient near 0 shows
        scale = 1e-3 * layer_scale(name, [1, 1, 4, 1], 0.7)
        moved = (saved.masters[name].contiguous() - expected).abs().max() / scale
        assert moved < 0.02, f"{name} is {moved} steps away"
        assert (expected - first[name]).abs().max() > 0.1 * scale, f"{name} would not move"
        assert (saved.moments[AVERAGE][name].contiguous() - average[name]).abs().max() < 0.02 * scale


def test_layer_scales_of_base_are_the_authors() -> None:
    depths = [2, 2, 18, 2]
    expected = {
        "encoder.patch_embed.proj.weight": 25, "encoder.layers.0.blocks.0.mlp.fc1.weight": 24,
        "encoder.layers.0.blocks.1.norm1.bias": 23, "encoder.layers.1.downsample.reduction.weight": 22,
        "encoder.layers.1.blocks.0.attn.qkv.bias": 22, "encoder.layers.2.blocks.17.attn.proj.weight": 3,
        "encoder.layers.3.blocks.1.attn.relative_position_bias_table": 1, "encoder.norm.weight": 1,
        "encoder.head.fc.weight": 1,
    }  # fmt: skip
    for name, power in expected.items():
        assert layer_scale(name, depths, 0.7) == pytest.approx(0.7**power)


def test_a_broken_image_to_learn_from_is_replaced(labelled: Path, options: list[str], tmp_path: Path) -> None:
    shutil.copytree(labelled, tmp_path / "data", symlinks=True)
    config = load_finetune_config(
        [*options, *PLAIN, "run_dir=UNUSED", f"data.root={tmp_path / 'data'}", f"data.index_dir={tmp_path / 'index'}"]
    )
    train, _ = open_labelled(config.data)
    loader = LabelledLoader(config, train, Share(0, 1, 2), torch.device("cpu"), 1, None)
    victim = int(loader.plan.micro_batch_at(0, 1).ids[3])
    path = tmp_path / "data" / "train" / train.images.name(victim)
    path.unlink()
    path.write_bytes(b"no image")
    batches = loader.batches(0)
    next(batches)
    batch = next(batches)
    assert victim in loader.bad and victim not in batch.ids
    assert torch.equal(batch.targets.argmax(1), train.labels[batch.ids]), "the replacement has its own label"
