"""What an encoder takes from state dicts and files, however timm hands them to it."""

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from timm.models._hub import save_for_hf
from torch import nn
from torch.ao.quantization import quantize_dynamic

from mixmim_ds.models import MixMIMTransformer


def tiny(classes: int) -> MixMIMTransformer:
    return timm.create_model("mixmim_tiny", img_size=64, num_classes=classes).eval()


@pytest.mark.filterwarnings("ignore:torch.ao.quantization is deprecated", "ignore:torch.quantize_per_tensor")
def test_the_weights_of_a_quantised_encoder_load() -> None:
    """torch tells by the version in a state dict's metadata how the numbers are packed."""
    source, target = (quantize_dynamic(tiny(3), {nn.Linear}, torch.qint8) for _ in range(2))
    images = torch.randn(2, 3, 64, 64)
    expected = source(images)
    assert not torch.equal(target(images), expected)
    target.load_state_dict(source.state_dict())
    assert torch.equal(target(images), expected)


@pytest.fixture
def files(tmp_path: Path) -> dict[str, str]:
    """Folders as an export is, and the file in them: of pretraining, and of three classes."""
    found = {}
    for kind, classes in (("bare", 0), ("three", 3)):
        save_for_hf(tiny(classes), tmp_path / kind, safe_serialization=True)
        found |= {kind: f"local-dir:{tmp_path / kind}", f"{kind} file": str(tmp_path / kind / "model.safetensors")}
    return found


@pytest.mark.parametrize(
    ("way", "options", "told"),
    [
        ("folder", {"num_classes": 5}, {"bare": True, "three": False}),
        ("folder", {}, {"bare": False, "three": False}),
        ("folder", {"num_classes": 0}, {"bare": False, "three": False}),
        ("folder", {"features_only": True}, {"bare": False, "three": False}),
        ("checkpoint_path", {"num_classes": 3}, {"bare": True, "three": False}),
        ("checkpoint_path", {"num_classes": 0}, {"bare": False}),
        ("overlay", {"num_classes": 5}, {"bare": True, "three": False}),
        ("overlay", {"num_classes": 1000}, {"bare": True}),
        ("overlay", {"num_classes": 0}, {"bare": False, "three": False}),
        ("overlay", {"features_only": True}, {"bare": False, "three": False}),
        ("state dict", {"num_classes": 3}, {"bare": True, "three": False}),
    ],
)
def test_a_classifier_that_keeps_its_weights_is_told_of_once(
    way: str, options: dict[str, Any], told: dict[str, bool], files: dict[str, str], caplog: pytest.LogCaptureFixture
) -> None:
    """And no other: neither one that the file has, nor one that timm leaves out for it is of other classes."""
    for kind, expected in told.items():
        caplog.clear()
        path = files[f"{kind} file"]
        if way == "folder":
            timm.create_model(files[kind], pretrained=True, **options)
        elif way == "checkpoint_path":
            timm.create_model("mixmim_tiny", img_size=64, checkpoint_path=path, **options)
        elif way == "overlay":
            overlay = {"file": path}
            timm.create_model("mixmim_tiny", img_size=64, pretrained=True, pretrained_cfg_overlay=overlay, **options)
        else:
            tiny(options["num_classes"]).load_state_dict(timm.models.load_state_dict(path))
        assert caplog.text.count("The checkpoint has no head") == expected, kind


@pytest.mark.parametrize(("classes", "kept"), [(3, True), (5, False)])
def test_the_head_of_an_overlay_file_is_kept_if_it_fits(classes: int, kept: bool, files: dict[str, str]) -> None:
    """The config of the name, which says 1000 classes, has no say in it."""
    path = files["three file"]
    overlay, options = {"file": path}, {"img_size": 64, "num_classes": classes}
    model = timm.create_model("mixmim_tiny", pretrained=True, pretrained_cfg_overlay=overlay, **options)
    head = timm.models.load_state_dict(path)["head.fc.weight"]
    assert torch.equal(model.get_classifier().weight, head) == kept
    assert len(model.get_classifier().weight) == classes
