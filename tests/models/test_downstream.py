"""The encoder as a detector's backbone, and under timm's own scripts."""

import subprocess
import sys
from pathlib import Path

import timm
import torch
from launching import ROOT
from torch import Tensor, nn
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.ops import FeaturePyramidNetwork

import mixmim_ds  # noqa: F401  registers the encoders

SIZE = (96, 192)


class Pyramid(nn.Module):
    """Maps at strides 4 to 32 with equal channels."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = timm.create_model("mixmim_tiny", features_only=True, img_size=SIZE)
        self.out_channels = 32
        self.fpn = FeaturePyramidNetwork(self.encoder.feature_info.channels(), self.out_channels)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        return self.fpn({str(stage): map for stage, map in enumerate(self.encoder(images))})


def test_a_detector_learns_through_its_pyramid() -> None:
    torch.manual_seed(0)
    anchors = AnchorGenerator(sizes=((16,), (32,), (48,), (64,)), aspect_ratios=((0.5, 1.0, 2.0),) * 4)
    detector = FasterRCNN(
        Pyramid(),
        num_classes=3,
        rpn_anchor_generator=anchors,
        min_size=SIZE[0],
        max_size=SIZE[1],
        fixed_size=SIZE[::-1],
    )
    corners = torch.rand(2, 4, 2) * torch.tensor([SIZE[1] / 2, SIZE[0] / 2])
    boxes = torch.cat([corners, corners + torch.rand(2, 4, 2) * 30 + 5], dim=2)
    targets = [{"boxes": b, "labels": torch.tensor([1, 2, 1, 2])} for b in boxes]
    loss = sum(detector(list(torch.rand(2, 3, *SIZE)), targets).values())
    loss.backward()
    assert loss.isfinite()
    named = dict(detector.backbone.encoder.named_parameters())
    assert not [name for name, p in named.items() if p.grad is None or not (p.grad.isfinite().all() and p.grad.any())]


def test_a_backbone_is_resized_through_the_model_it_wraps() -> None:
    torch.manual_seed(0)
    backbone = timm.create_model("mixmim_tiny", features_only=True, img_size=64).eval()
    backbone.model.set_input_size(SIZE)
    maps = backbone(torch.rand(1, 3, *SIZE))
    assert [tuple(m.shape[1:]) for m in maps] == [(32, 24, 48), (64, 12, 24), (128, 6, 12), (256, 3, 6)]
    fitted = timm.create_model("mixmim_tiny", features_only=True, img_size=SIZE).eval()
    fitted.load_state_dict(backbone.state_dict())
    images = torch.rand(1, 3, *SIZE)
    for found, expected in zip(backbone(images), fitted(images), strict=True):
        assert torch.equal(found, expected)


def test_timms_scripts_reach_the_models_by_name(tmp_path: Path) -> None:
    """By the one line of docs/weights.md, with a script that knows of timm alone in the place of timm's train.py."""
    script = tmp_path / "train.py"
    script.write_text(
        "import argparse, timm\n"
        "parser = argparse.ArgumentParser()\n"
        "parser.add_argument('--model')\n"
        "print(timm.create_model(parser.parse_args().model).num_features)\n"
    )
    line = next(line for line in (ROOT / "docs" / "weights.md").read_text().splitlines() if "runpy" in line)
    start = line.index('"') + 1
    code = line[start : line.index('"', start)]
    command = [sys.executable, "-c", code, str(script), "--model", "mixmim_tiny"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.stdout.splitlines()[-1] == "256", done.stderr
