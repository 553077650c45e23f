"""Linear layers in fp32 on the CPU by oneDNN."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


def use_onednn(model: nn.Module) -> None:
    """Makes the linear layers of a model in fp32 compute by oneDNN, which they do from here on.

    PyTorch gives matrix products in fp32 to MKL, which takes half the speed out of CPUs that are not Intel's
    (pytorch/builder issue 504), and those in bf16 to oneDNN, which knows them all; it has no switch.
    """
    for module in model.modules():
        if type(module) is nn.Linear:
            module.__class__ = OneDNNLinear


class OneDNNLinear(nn.Linear):
    """`nn.Linear` with other kernels; fp32 on the CPU."""

    def forward(self, input: Tensor) -> Tensor:
        """[..., in] -> [..., out]."""
        return _Linear.apply(input, self.weight, self.bias)


class _Linear(torch.autograd.Function):
    """x [..., in], weight [out, in] and bias [out] or None -> [..., out]; and the gradients of the three."""

    @staticmethod
    def forward(context: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        context.save_for_backward(x, weight)
        return _product(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(context: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Of the output [..., out]: the gradients of x, weight and bias, None where none is wanted."""
        x, weight = context.saved_tensors
        rows = gradient.reshape(-1, weight.shape[0])
        of_x, of_weight, of_bias = context.needs_input_grad
        return (
            _product(gradient, weight.t()) if of_x else None,
            _product(rows.t(), x.reshape(-1, weight.shape[1]).t()) if of_weight else None,
            rows.sum(0) if of_bias else None,
        )


def _product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """What PyTorch's compiler makes of linear layers on the CPU."""
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
