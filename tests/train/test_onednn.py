"""Linear layers of runs in fp32 on the CPU."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from launching import tasks
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from mixmim_ds.compose import load_config
from mixmim_ds.models import build_model
from mixmim_ds.models.recompute import recompute
from mixmim_ds.train.onednn import use_onednn

pytestmark = pytest.mark.skipif(
    not torch.backends.mkldnn.is_available(), reason="PyTorch without oneDNN: would compare its layers with float64"
)


def layers() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(96, 384), nn.GELU(), nn.Linear(384, 96, bias=False), nn.Linear(96, 8))


def results(model: nn.Module, x: Tensor) -> list[Tensor]:
    """Output and gradients, that of the input first."""
    x = x.clone().requires_grad_()
    y = model(x)
    y.square().sum().backward()
    return [y, x.grad, *(parameter.grad for parameter in model.parameters())]


@pytest.mark.parametrize("shape", [(96,), (7, 96), (2, 5, 3, 96)])
def test_they_compute_what_linear_layers_do(shape: tuple[int, ...]) -> None:
    model, x = layers(), torch.randn(shape)
    exact = results(copy.deepcopy(model).double(), x.double())
    use_onednn(model)
    # of sums of up to 384 products
    for found, right in zip(results(model, x), exact, strict=True):
        assert found.dtype == torch.float32
        torch.testing.assert_close(found, right.float(), rtol=1e-5, atol=1e-5 * right.abs().max().item())


def test_frozen_weights_get_no_gradient() -> None:
    model = layers()
    use_onednn(model)
    model.requires_grad_(False)
    x = torch.randn(4, 96, requires_grad=True)
    model(x).sum().backward()
    assert x.grad.shape == x.shape and all(parameter.grad is None for parameter in model.parameters())


class Products(TorchDispatchMode):
    """Counts them."""

    count = 0

    def __torch_dispatch__(self, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += operator is torch.ops.mkldnn._linear_pointwise.default
        return operator(*args, **(kwargs or {}))


@pytest.mark.parametrize(("selective", "count"), [(True, 3 * 3), (False, 4 * 3)])
def test_selective_checkpointing_keeps_their_products(selective: bool, count: int) -> None:
    model, x = layers(), torch.randn(4, 96, requires_grad=True)
    use_onednn(model)
    with Products() as products:
        recompute(model, selective, x).sum().backward()
    assert products.count == count


def test_runs_in_fp32_use_them(small_run: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ONEDNN_VERBOSE", "1")  # oneDNN tells of each call
    options = [*small_run, "precision=fp32", "train.max_steps=1", f"run_dir={tmp_path / 'run'}"]
    called = tasks(*options, processes=1).count("exec,cpu,inner_product")
    layers = sum(type(module) is nn.Linear for module in build_model(load_config(options).model).modules())
    assert called == layers * 3 * 4, "forward, gradients of input and weight, of four micro-batches"
