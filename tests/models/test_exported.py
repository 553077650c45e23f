"""Encoders that left eager PyTorch take another number of images than they were traced or exported with."""

import io
import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

import mixmim_ds  # noqa: F401  registers the encoders

IMAGES = torch.randn(5, 3, 64, 64, generator=torch.Generator().manual_seed(0))
pytestmark = pytest.mark.filterwarnings(
    "ignore:`torch.jit",
    "ignore::torch.jit.TracerWarning",
    "ignore:You are using the legacy TorchScript:DeprecationWarning",
    "ignore:The feature will be removed:DeprecationWarning",
)


def encoder() -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model("mixmim_tiny", img_size=64, num_classes=3).eval()


def exported(model: nn.Module, images: Tensor) -> nn.Module:
    batch = {0: torch.export.Dim("batch")}
    return torch.export.export(model, (images,), dynamic_shapes=(batch,)).module()


def scripted(model: nn.Module, images: Tensor) -> nn.Module:
    return torch.jit.script(model)


@pytest.mark.parametrize("leave", [torch.jit.trace, scripted, exported])
def test_other_numbers_of_images_give_what_eager_gives(leave: Callable[..., nn.Module]) -> None:
    model = encoder()
    with torch.no_grad():
        left = leave(model, IMAGES[:2])
        for count in (1, 2, 5):
            torch.testing.assert_close(left(IMAGES[:count]), model(IMAGES[:count]))


def onnx_bytes(images: Tensor) -> bytes:
    """What the exporter writes that goes by torch.jit.trace, told that the number of images may change."""
    file, batch = io.BytesIO(), {0: "batch"}
    torch.onnx.export(
        encoder(), (images,), file, dynamo=False, input_names=["x"], output_names=["y"],
        dynamic_axes={"x": batch, "y": batch},
    )  # fmt: skip
    return file.getvalue()


def test_an_onnx_file_knows_nothing_of_the_number_of_images(monkeypatch: pytest.MonkeyPatch) -> None:
    """It did, where an operator made the number a constant, and then ran with no other."""
    # The exporter writes the file without the onnx package and then asks that for functions of the user's: none here.
    parsed: Any = SimpleNamespace(graph=SimpleNamespace(node=[]))
    monkeypatch.setitem(sys.modules, "onnx", SimpleNamespace(load_model_from_string=lambda _: parsed))
    assert onnx_bytes(IMAGES[:2]) == onnx_bytes(IMAGES)
