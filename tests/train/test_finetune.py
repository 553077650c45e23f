"""Fine-tuning as users run it: resumed, on other processes and stages, judged, exported, and its mistakes."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from launching import Shared, rows, tasks
from PIL import Image
from safetensors.torch import load_file
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as vision

from mixmim_ds.compose import load_finetune_config
from mixmim_ds.data.labelled import open_labelled
from mixmim_ds.data.labelled_loader import LabelledLoader
from mixmim_ds.data.loader import Share
from mixmim_ds.export.weights import read_weights
from mixmim_ds.models import Classifier
from mixmim_ds.train.finetune import load_init
from mixmim_ds.train.optim import Schedule, layer_scale
from mixmim_ds.zero_files import AVERAGE, read_saved

SCRIPT = "launch/finetune.py"
STEPS = 14  # of 7 an epoch
PLAIN = ["augment.rand_augment=null", "augment.mixup=0", "augment.cutmix=0", "augment.erase=0", "model.drop_path=0"]


@pytest.fixture(scope="module")
def options(labelled: Path) -> list[str]:
    """A run with all that fine-tuning knows; its learning rate is at full height from the first step on."""
    return [
        "model=tiny", "model.img_size=64", f"data.root={labelled}", f"data.index_dir={labelled.parent / 'index'}",
        "precision=fp32", "train.global_batch=32", "train.micro_batch=16", "train.epochs=2", "train.log_every=1",
        "optim.warmup_epochs=0", "optim.base_lr=8e-3", "optim.ema_decay=0.5", "init=random",
    ]  # fmt: skip


@pytest.fixture(scope="module")
def straight(options: list[str], shared: Shared) -> Path:
    """The folder of a run that nothing disturbed."""
    return shared("tuned", lambda folder: tasks(*options, f"run_dir={folder}", script=SCRIPT))


def told(run_dir: Path) -> tuple[list[tuple[Any, ...]], list[dict[str, Any]]]:
    """What a run computed, without what it took: its steps, and its evaluations."""
    judged = [json.loads(line) for line in (run_dir / "evaluations.jsonl").read_text().splitlines()]
    steps = [(row["step"], row["loss"], row["lr"], row["grad_norm"]) for row in rows(run_dir)]
    return steps, [{name: value for name, value in row.items() if name != "eval_time_s"} for row in judged]


@pytest.mark.slow
def test_a_run_stopped_in_mid_epoch_goes_on_to_the_last_digit(
    straight: Path, options: list[str], tmp_path: Path
) -> None:
    """With random augmentation, mixup, cutmix, erasing, drop path and an average of the weights."""
    tasks(*options, f"run_dir={tmp_path}", "train.max_steps=4", script=SCRIPT)
    assert [row["step"] for row in told(tmp_path)[1]] == [4]
    tasks(*options, f"run_dir={tmp_path}", script=SCRIPT)
    steps, judged = told(tmp_path)
    assert steps == told(straight)[0] and len(steps) == STEPS
    assert [row for row in judged if row["step"] != 4] == told(straight)[1]


@pytest.fixture(scope="module")
def larger(straight: Path, options: list[str]) -> list[str]:
    """A run on larger images than those of `init`: its tables are interpolated, which a new model's are not."""
    given = [option for option in options if not option.startswith(("init=", "model.img_size="))]
    return [*given, f"init={straight / 'timm'}", "model.img_size=96", "optim.ema_decay=null", *PLAIN]


@pytest.mark.slow
def test_a_run_goes_on_and_is_judged_with_the_tables_that_init_gave_it(larger: list[str], tmp_path: Path) -> None:
    for name, ends in (("whole", [3]), ("broken", [2, 3])):
        for steps in ends:
            tasks(*larger, f"run_dir={tmp_path / name}", f"train.max_steps={steps}", processes=1, script=SCRIPT)
    assert told(tmp_path / "broken")[0] == told(tmp_path / "whole")[0]
    judged = told(tmp_path / "whole")[1][-1]
    asked = [*larger[:4], f"init={tmp_path / 'whole'}", "train.micro_batch=16", "eval_only=true"]
    printed = tasks(*asked, processes=1, script=SCRIPT)
    found = json.loads(printed.splitlines()[-1])
    assert {name: found[name] for name in ("top1", "loss")} == {name: judged[name] for name in ("top1", "loss")}


@pytest.mark.slow
def test_a_run_whose_only_checkpoint_is_damaged_begins_with_init_again(larger: list[str], tmp_path: Path) -> None:
    words = [*larger, f"run_dir={tmp_path}", "train.max_steps=1"]
    tasks(*words, processes=1, script=SCRIPT)
    (first,), _ = told(tmp_path)
    file = next((tmp_path / "checkpoints").glob("step_*/*optim_states.pt"))
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    assert "is set aside" in tasks(*words, processes=1, script=SCRIPT)
    assert told(tmp_path)[0] == [first]


@pytest.mark.slow
def test_a_run_that_starts_anew_from_its_weights_leaves_init_alone(larger: list[str], tmp_path: Path) -> None:
    words = [*larger, f"run_dir={tmp_path}", "train.max_steps=2"]
    tasks(*words, processes=1, script=SCRIPT)
    tasks(*words, "optim.base_lr=1e-30", "optim.min_lr=0", "resume=weights", processes=1, script=SCRIPT)
    earlier, anew = (
        read_saved(folder / "checkpoints" / "step_00000002").masters for folder in (tmp_path / "earlier_1", tmp_path)
    )
    assert all(torch.equal(anew[name].contiguous(), master.contiguous()) for name, master in earlier.items())


@pytest.mark.slow
def test_half_precision_begins_with_the_exact_weights(straight: Path, larger: list[str], tmp_path: Path) -> None:
    words = ["precision=bf16", "model.img_size=64", "optim.base_lr=1e-30", "train.max_steps=1"]
    tasks(*larger, *words, f"run_dir={tmp_path}", processes=1, script=SCRIPT)
    masters = read_saved(tmp_path / "checkpoints" / "step_00000001").masters
    for name, tensor in load_file(straight / "timm" / "model.safetensors").items():
        if "pos_embed" not in name:  # a buffer
            assert torch.equal(masters[f"encoder.{name}"].contiguous(), tensor), name


@pytest.mark.slow
def test_a_stop_after_the_last_step_leaves_its_judging_to_the_next_start(
    straight: Path, options: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ASKED", str(STEPS))
    tasks(*options, f"run_dir={tmp_path}", script="tests/asked.py", code=85)
    assert len(told(tmp_path)[1]) == len(told(straight)[1]) - 1 and not (tmp_path / "timm").exists()
    tasks(*options, f"run_dir={tmp_path}", script=SCRIPT)
    assert told(tmp_path) == told(straight) and (tmp_path / "timm" / "config.json").exists()


def test_a_run_goes_on_with_its_own_init_alone(straight: Path, options: list[str]) -> None:
    printed = tasks(*options, f"init={straight}", f"run_dir={straight}", processes=1, code=2, script=SCRIPT)
    assert f"run_dir={straight} holds a run with init=random, not {straight}" in printed.splitlines()[-1]


def test_a_run_whose_best_is_gone_is_exported_as_it_is(straight: Path, tmp_path: Path) -> None:
    """Damage, say, has set it aside."""
    folder = shutil.copytree(straight, tmp_path / "run")
    (folder / "checkpoints" / "best").write_text("step_00000001")
    assert f"step_{STEPS:08d}" in read_weights(folder).checkpoint.path.name


@pytest.mark.slow
def test_one_process_under_zero2_computes_the_same(straight: Path, options: list[str], tmp_path: Path) -> None:
    tasks(*options, f"run_dir={tmp_path}", "ds=zero2", "augment.workers=2", processes=1, script=SCRIPT)
    for (_, *numbers), (_, *expected) in zip(told(tmp_path)[0], told(straight)[0], strict=True):
        assert numbers == pytest.approx(expected, rel=1e-4)  # sums in another order, over all steps
    assert [row["images"] for row in told(tmp_path)[1]] == [73, 73]


def layers_of_tiny() -> dict[str, int]:
    """The authors' layer ids, written down for depths 1, 1, 4, 1: eight layers, of which the last learns at decay^1."""
    return {
        "patch_embed": 0, "layers.0.blocks.0": 1, "layers.1.downsample": 2, "layers.1.blocks.0": 2,
        "layers.2.downsample": 3, "layers.2.blocks.0": 3, "layers.2.blocks.1": 4, "layers.2.blocks.2": 5,
        "layers.2.blocks.3": 6, "layers.3.downsample": 7, "layers.3.blocks.0": 7, "norm": 7, "head": 7,
    }  # fmt: skip


def plainly_trained(options: list[str], steps: int) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """The weights after some steps of a plain loop with torch's AdamW, and their average with decay 0.5."""
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
        average = {name: (average.get(name, value) + value) / 2 for name, value in now.items()}
    return now, average


@pytest.mark.slow
@pytest.mark.parametrize("ds", ["zero1", "zero2", "zero3"])
def test_each_layer_moves_as_under_plain_adamw(ds: str, options: list[str], tmp_path: Path) -> None:
    options = [*options, *PLAIN]
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


@pytest.mark.slow
def test_every_image_is_counted_once_by_any_number_of_processes(straight: Path, options: list[str]) -> None:
    found = []
    for processes in (1, 2, 3):
        printed = tasks(*options, f"init={straight}", "eval_only=true", processes=processes, script=SCRIPT)
        found.append(json.loads(printed.splitlines()[-1]))
    assert found[0] == found[1] == found[2]
    best = max(told(straight)[1], key=lambda row: row["top1"])
    assert {name: found[0][name] for name in ("top1", "top5", "images")} == {
        name: best[name] for name in ("top1", "top5", "images")
    }
    assert best["top1"] > 2 / 13, "twice chance"


def test_a_broken_image_to_judge_by_is_left_out_and_named_by_the_first_rank(
    straight: Path, labelled: Path, options: list[str], tmp_path: Path
) -> None:
    shutil.copytree(labelled, tmp_path / "data")
    data = [f"data.root={tmp_path / 'data'}", f"data.index_dir={tmp_path / 'index'}"]
    _, val = open_labelled(load_finetune_config([*options, "run_dir=UNUSED", *data]).data)
    name = val.images.name(20)  # of the second batch of 16, which is the second rank's
    path = tmp_path / "data" / "val" / name
    path.write_bytes(path.read_bytes()[:300])
    printed = tasks(*options, *data, f"init={straight}", "eval_only=true", script=SCRIPT)
    assert printed.count(f"{name} is left out of the evaluation, for it cannot be decoded (") == 1
    assert json.loads(printed.splitlines()[-1])["images"] == 72


def test_the_export_tells_what_the_run_reported(straight: Path, labelled: Path) -> None:
    """By timm and PIL alone."""
    model = timm.create_model(f"local-dir:{straight / 'timm'}", pretrained=True).eval()
    classes = json.loads((straight / "timm" / "config.json").read_text())["label_names"]
    data = timm.data.resolve_data_config(model.pretrained_cfg)
    right, paths = 0, sorted((labelled / "val").glob("*/*"))
    for path in paths:
        image = Image.open(path).convert("RGB")
        side = round(min(image.size) * data["crop_pct"])
        top, left = (image.height - side) // 2, (image.width - side) // 2
        pixels = vision.resized_crop(image, top, left, side, side, [64, 64], InterpolationMode.BICUBIC)
        with torch.no_grad():
            logits = model(vision.normalize(vision.to_tensor(pixels), data["mean"], data["std"])[None])
        right += classes[int(logits.argmax())] == path.parent.name
    best = max(row["top1"] for row in told(straight)[1])
    assert abs(right / len(paths) - best) < 1.5 / 73, "DALI's antialiased cubic is a level off PIL's here and there"


def test_a_run_killed_before_it_was_judged_is_judged_at_the_next_start(
    straight: Path, options: list[str], tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    shutil.copytree(straight, run_dir)
    lines = (run_dir / "evaluations.jsonl").read_text().splitlines()
    (run_dir / "evaluations.jsonl").write_text(lines[0] + "\n")
    (run_dir / "checkpoints" / "best").unlink()
    printed = tasks(*options, f"run_dir={run_dir}", script=SCRIPT)
    assert "nothing is left to do" in printed and told(run_dir) == told(straight)
    assert (run_dir / "checkpoints" / "best").read_text() == (straight / "checkpoints" / "best").read_text()


def test_the_best_checkpoint_stays(straight: Path) -> None:
    judged = told(straight)[1]
    best = max(judged, key=lambda row: row["top1"])
    assert (straight / "checkpoints" / "best").read_text() == f"step_{best['step']:08d}"
    assert (straight / "checkpoints" / f"step_{best['step']:08d}" / "COMPLETE.json").exists()


def test_tables_are_interpolated_to_the_image_size(straight: Path, options: list[str]) -> None:
    config = load_finetune_config([*options, "run_dir=UNUSED", f"init={straight / 'timm'}", "model.img_size=96"])
    model = Classifier("mixmim_tiny", 96, 13).eval()
    assert not load_init(model, config, list("ABCDEFGHIJKLM")), "other classes"
    expected = timm.create_model(f"local-dir:{straight / 'timm'}", pretrained=True).eval()
    expected.set_input_size(96)
    images = torch.randn(2, 3, 96, 96, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(model.encoder.forward_features(images), expected.forward_features(images))
    assert model.encoder.head.fc.weight.abs().max() < 1e-4, "its classifier is new"
    for source in (straight, straight / "timm"):  # a run and its export
        classes = json.loads((straight / "timm" / "config.json").read_text())["label_names"]
        assert load_init(model, replace(config, init=str(source)), classes)
        torch.testing.assert_close(model.encoder.head.fc.weight, expected.head.fc.weight, rtol=0, atol=0)


def one_class(root: Path) -> None:
    for part in ("train", "val"):
        shutil.move(min((root / part).iterdir()), root / "kept")
        shutil.rmtree(root / part)
        (root / part).mkdir()
        shutil.move(root / "kept", root / part / "kept")


def other_class(root: Path) -> None:
    next((root / "val").iterdir()).rename(root / "val" / "zebra")


def bare_image(root: Path) -> None:
    (root / "train" / "bare.png").symlink_to(next((root / "train").glob("*/*.png")))


MISTAKES: dict[str, tuple[Callable[[Path], None] | str, str]] = {
    "val has another class": (other_class, "have the class zebra, which those to learn from lack"),
    "one class": (one_class, "holds one class to learn from, kept; give at least two"),
    "no label": (bare_image, "train have no class, the first is bare.png"),
    "init of another size": ("init=RUN model=base model.img_size=224", "holds mixmim_tiny, not mixmim_base"),
    "init is nothing": ("init=nowhere", "init: nowhere is no folder"),
    "init has no classifier": ("init=random:tiny eval_only=true run_dir=", "init=random:tiny tells 0 classes"),
    "no init": ("init=", "init is not set; add init=DIR, an exported folder or a run"),
    "odd micro-batch": ("train.micro_batch=15 train.global_batch=30", "augment.cutmix mix images in pairs"),
    "words that timm does not know": ("augment.rand_augment=auto", "augment.rand_augment=auto is not what timm"),
    "no labels in random pixels": ("data=synthetic", "data=synthetic has no labels"),
    "an option of pretraining": ("model.mask_ratio=0.5", "model.mask_ratio is no option"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_sentence(
    mistake: str, labelled: Path, options: list[str], straight: Path, tmp_path: Path
) -> None:
    change, sentence = MISTAKES[mistake]
    words = [*options, "train.max_steps=1", f"run_dir={tmp_path / 'run'}"]
    if isinstance(change, str):
        words += change.replace("RUN", str(straight)).split()
    else:
        shutil.copytree(labelled, tmp_path / "data", symlinks=True)
        change(tmp_path / "data")
        words += [f"data.root={tmp_path / 'data'}", f"data.index_dir={tmp_path / 'index'}"]
    printed = tasks(*words, processes=1, code=2, script=SCRIPT)
    errors = [line for line in printed.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and sentence in errors[0] and "Traceback" not in printed, printed


def test_a_classifier_of_other_classes_judges_nothing(
    labelled: Path, options: list[str], straight: Path, tmp_path: Path
) -> None:
    shutil.copytree(labelled, tmp_path / "data", symlinks=True)
    for part in ("train", "val"):
        min((tmp_path / "data" / part).iterdir()).rename(tmp_path / "data" / part / "zebra")
    data = [f"data.root={tmp_path / 'data'}", f"data.index_dir={tmp_path / 'index'}"]
    printed = tasks(*options, *data, f"init={straight}", "eval_only=true", processes=1, code=2, script=SCRIPT)
    assert "tells 13 classes, which are not the 13 of data.root=" in printed.splitlines()[-1]


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
