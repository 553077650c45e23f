"""Activation checkpointing of one block: what is kept for the backward pass and what is computed again."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from mixmim_ds.models import grouped  # noqa: F401  it registers the operator that is named below

_aten = torch.ops.aten
# Matrix products and attention cost the time; norms, GELU, copies and additions cost the memory.
_KEPT = {
    _aten.mm.default,
    _aten.addmm.default,
    _aten.bmm.default,
    _aten._scaled_dot_product_flash_attention.default,
    _aten._scaled_dot_product_flash_attention_for_cpu.default,
    _aten._scaled_dot_product_efficient_attention.default,
    _aten._scaled_dot_product_cudnn_attention.default,
    _aten._scaled_dot_product_attention_math.default,
    torch.ops.mixmim_ds.grouped_attention.default,
}
if torch.backends.mkldnn.is_available():
    _KEPT.add(torch.ops.mkldnn._linear_pointwise.default)  # train/onednn.py


def _policy(context: Any, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if operator in _KEPT else CheckpointPolicy.PREFER_RECOMPUTE


def recompute(function: Callable[..., Tensor], selective: bool, *args: Any) -> Tensor:
    """Runs `function(*args)`, keeping its inputs only (full) or also its matrix products (selective).

    PyTorch's own non-reentrant checkpoint, not DeepSpeed's: it repeats drop path and autocast exactly, works under
    ZeRO and does not break torch.compile's graphs (torch.utils.checkpoint documentation).
    """
    if selective:
        context_fn = partial(create_selective_checkpoint_contexts, _policy)
        return checkpoint(function, *args, use_reentrant=False, context_fn=context_fn)
    return checkpoint(function, *args, use_reentrant=False)
