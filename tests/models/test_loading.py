"""What an encoder takes from state dicts and files, however timm hands them to it."""

import pytest
import timm
import torch
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
