"""What fine-tuning's checkpoints are worth: counted, kept, exported."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from launching import tasks
from PIL import Image
from torch import nn
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as vision
from tuning import SCRIPT, STEPS, told

from mixmim_ds.compose import load_finetune_config
from mixmim_ds.data.labelled import open_labelled
from mixmim_ds.evaluate.accuracy import count, scores
from mixmim_ds.export.to_timm import Form, export_run
from mixmim_ds.export.weights import read_weights


def test_scores_are_of_images_not_of_batches() -> None:
    """The logits of six images rank class k in place k; the fourth row of each batch is padding."""
    ranked = -torch.arange(9.0).expand(4, -1)
    labels = torch.tensor([0, 3, 4, 5, 8, 0])
    batches = [(ranked, np.array([0, 1, 2])), (ranked, np.array([5, 4, 3]))]
    found = scores([count(nn.Identity(), [batch], labels) for batch in batches])
    loss = ranked[0].logsumexp(0).item() + sum(labels.tolist()) / 6
    assert found == {"top1": 2 / 6, "top5": 4 / 6, "loss": pytest.approx(loss), "images": 6}


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
    judge = [*options, *data, f"init={straight}", "eval_only=true"]
    printed = tasks(*judge, script=SCRIPT, code=1)
    assert printed.endswith("start the same command again.\n") and printed.count("error: ") == 1, printed
    assert "error: 1 of 73 images are broken, more than data.max_bad_share=0.001 allows, those of an eval" in printed
    printed = tasks(*judge, "data.max_bad_share=0.02", script=SCRIPT)
    assert printed.count(f"{name} is left out of the evaluation, for it cannot be decoded (") == 1
    assert json.loads(printed.splitlines()[-1])["images"] == 72


def test_the_best_checkpoint_stays(straight: Path) -> None:
    judged = told(straight)[1]
    best = max(judged, key=lambda row: row["top1"])
    assert (straight / "checkpoints" / "best").read_text() == f"step_{best['step']:08d}"
    assert (straight / "checkpoints" / f"step_{best['step']:08d}" / "COMPLETE.json").exists()


def test_the_best_is_exported_with_what_was_told_of_it(straight: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(straight, tmp_path / "run")
    (folder / "checkpoints" / "best").write_text(f"step_{STEPS // 2:08d}")
    assert export_run(folder, tmp_path / "timm", Form()).step == STEPS // 2
    steps, judged = told(straight)
    assert judged[0]["top1"] != judged[1]["top1"]
    card = (tmp_path / "timm" / "README.md").read_text()
    for words in (f"{judged[0]['top1']:.2%} of 73 images", f"{steps[STEPS // 2 - 1][1]:.4f} at step {STEPS // 2}\n"):
        assert words in card
    rows = folder / "evaluations.jsonl"
    rows.write_text(rows.read_text().replace(f'"step": {STEPS // 2},', f'"step": {STEPS // 2 - 1},'))
    export_run(folder, tmp_path / "unjudged", Form())
    assert "not measured" in (tmp_path / "unjudged" / "README.md").read_text()


def test_a_run_whose_best_is_gone_is_exported_as_it_is(straight: Path, tmp_path: Path) -> None:
    """Damage, say, has set it aside."""
    folder = shutil.copytree(straight, tmp_path / "run")
    (folder / "checkpoints" / "best").write_text("step_00000001")
    assert f"step_{STEPS:08d}" in read_weights(folder).checkpoint.path.name


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


def test_a_classifier_of_other_classes_judges_nothing(
    labelled: Path, options: list[str], straight: Path, tmp_path: Path
) -> None:
    shutil.copytree(labelled, tmp_path / "data", symlinks=True)
    for part in ("train", "val"):
        min((tmp_path / "data" / part).iterdir()).rename(tmp_path / "data" / part / "zebra")
    data = [f"data.root={tmp_path / 'data'}", f"data.index_dir={tmp_path / 'index'}"]
    printed = tasks(*options, *data, f"init={straight}", "eval_only=true", processes=1, code=2, script=SCRIPT)
    assert "tells 13 classes, which are not the 13 of data.root=" in printed.splitlines()[-1]
