"""What a GPU must hold: activations, counted by running the model without data, and the states that DeepSpeed keeps.

Activations are the storages that operators make and references keep alive while the real model runs forward and
backward on the meta device, where tensors have sizes and no content. Counting live storages gives what saved-tensor
hooks give, and besides what hooks never see: the tensors that selective checkpointing keeps, and what lives for a
moment only. Attention is that of CUDA (`attention_of_cuda`); other CUDA kernels may save slightly other tensors than
the meta device's, and torch.compile, which usually keeps less, is not modelled. Not counted, and left to the planner's
headroom: cuBLAS's work space, the allocator's rounding and fragments, and all memory that is not PyTorch's.

Model states follow DeepSpeed 0.19.8: bf16_optimizer.py (which serves ZeRO-1 in bf16 with fp32 accumulation),
stage_1_and_2.py and stage3.py. Padding, under a thousandth, is left out. All sizes are bytes.
"""

import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import Any

import torch
import torch.nn.functional as F
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mixmim_ds.config import ModelConfig, PretrainConfig
from mixmim_ds.device import DTYPES
from mixmim_ds.models import MixMIM, build_model
from mixmim_ds.train.engine import ds_settings

MODES = ("none", "selective", "full")
# Micro-batches whose count gives the line. Below the first one a layer's weight gradient may outweigh its activations
# for a moment, which the line misses by some MiB; from there on peaks are linear.
FIT = (16, 64)
# engine.py hands gradients over in pieces of this many elements; several groups that fit in one are copied together.
REDUCED_AT_ONCE = 500_000_000
_aten = torch.ops.aten


class Ledger(TorchDispatchMode):
    """Bytes of the storages made while it is entered and still alive: now, and the most there were at once."""

    def __init__(self, known: Iterable[Tensor]) -> None:
        super().__init__()
        self.known = {tensor.untyped_storage()._cdata for tensor in known}
        self.alive: dict[int, int] = {}
        self.now = self.peak = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self._add(tensor.untyped_storage())
        self.peak = max(self.peak, self.now)
        return result

    def _add(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key not in self.alive and key not in self.known:
            self.alive[key] = storage.nbytes()
            self.now += storage.nbytes()
            weakref.finalize(storage, self._drop, key)

    def _drop(self, key: int) -> None:
        self.now -= self.alive.pop(key)


def _cuda_attention(q: Tensor, k: Tensor, v: Tensor, dropout_p: float = 0.0, **options: Any) -> Tensor:
    if q.dtype != torch.float32:
        return _aten._scaled_dot_product_flash_attention(q, k, v, dropout_p)[0]
    return _aten._scaled_dot_product_efficient_attention(q, k, v, None, True, dropout_p)[0]


@contextmanager
def attention_of_cuda() -> Iterator[None]:
    """The decoder's attention by the kernels that PyTorch takes on CUDA, wherever the tensors are. On the meta device
    PyTorch itself would take the one that writes the whole matrix of weights. The encoder's is an operator of ours."""
    usual = F.scaled_dot_product_attention
    F.scaled_dot_product_attention = _cuda_attention  # type: ignore[assignment]
    try:
        yield
    finally:
        F.scaled_dot_product_attention = usual


def model_on_meta(options: ModelConfig, precision: str) -> MixMIM:
    """The run's model without content: its weights of the engine's type, its buffers fp32, as the engine leaves them.

    Raises:
        ValueError: as `build_model`.
    """
    with torch.device("meta"):
        model = build_model(options)
    for parameter in model.parameters():
        parameter.data = parameter.data.to(DTYPES[precision])
    return model


def count(model: MixMIM, batch: int) -> tuple[int, int]:
    """What a micro-batch occupies beside weights and buffers: after the forward pass, and at most at any moment of
    forward and backward pass. The images (fp32) are in it; each gradient is let go as soon as it is there."""
    weight = model.mask_token
    height, width = model.encoder.patch_embed.img_size
    hooks = [p.register_post_accumulate_grad_hook(_let_go) for p in model.parameters()]
    with Ledger([*model.parameters(), *model.buffers()]) as ledger:
        images = torch.zeros(batch, 3, height, width, device=weight.device)
        mask = torch.zeros(model.grid, dtype=torch.bool, device=weight.device)
        loss, prediction = model(images, mask)
        kept = ledger.now
        loss.backward()
    for hook in hooks:
        hook.remove()
    del images, prediction  # the loop of training, too, holds them until here
    return kept, ledger.peak


def _let_go(parameter: Tensor) -> None:
    parameter.grad = None


@dataclass(frozen=True)
class Activations:
    """The most that a micro-batch occupies at once, as a line over its images."""

    fixed: float
    per_image: float

    def of(self, images: int) -> int:
        """Bytes of a micro-batch."""
        return round(self.fixed + self.per_image * images)


def activations(model: MixMIM, mode: str) -> Activations:
    """Counted at two micro-batches, under `activation_checkpointing=mode`."""
    model.set_grad_checkpointing(mode != "none", selective=mode == "selective")
    small, large = (count(model, batch)[1] for batch in FIT)
    slope = (large - small) / (FIT[1] - FIT[0])
    return Activations(small - slope * FIT[0], slope)


@dataclass(frozen=True)
class Mechanics:
    """What the planner needs of a file of ds_configs/; what it leaves out has DeepSpeed's default."""

    stage: int
    zero: DeepSpeedZeroConfig
    communication_bytes: int  # of an element of the gradients, under way

    @property
    def offload(self) -> bool:
        """Whether optimizer state and accumulated gradients lie in the host's memory."""
        offload = self.zero.offload_optimizer
        return offload is not None and offload.device != "none"


def mechanics(config: PretrainConfig) -> Mechanics:
    """Of the file that `ds` names. ValueError as `ds_settings`."""
    settings = ds_settings(config)
    zero, communication = settings["zero_optimization"], settings.get("communication_data_type", config.precision)
    return Mechanics(zero["stage"], DeepSpeedZeroConfig(**zero), 4 if communication == "fp32" else 2)


@dataclass(frozen=True)
class States:
    """What a GPU holds beside a micro-batch's activations."""

    weights: int  # in the working precision, those that ZeRO-3 gathers included
    gradients: int  # of the backward pass, and their sum over micro-batches (fp32)
    masters: int  # fp32
    moments: int  # Adam's two, fp32
    buckets: int  # through which gradients are reduced
    step: int  # for a moment, when activations are gone: copies that reduction or update make

    def total(self, working: int) -> int:
        """The most at once, with a micro-batch's activations."""
        held = sum(getattr(self, field.name) for field in fields(self) if field.name != "step")
        return held + max(working, self.step)


def states(sizes: list[int], config: PretrainConfig, processes: int) -> States:
    """Model states on each GPU.

    Args:
        sizes: elements of every parameter.

    Raises:
        ValueError: `ds` names no usable file.
    """
    rules, total, width = mechanics(config), sum(sizes), DTYPES[config.precision].itemsize
    share = -(-total // processes)
    masters, moments, summed = 4 * share, 8 * share, 4 * share
    bucket = int(rules.zero.reduce_bucket_size)
    if rules.stage == 1 and config.precision == "bf16":
        # Sums of all gradients on every GPU: this optimizer splits masters and moments only. The bf16 gradients stay
        # from micro-batch to micro-batch, to be zeroed.
        copied = 4 * total if total <= REDUCED_AT_ONCE else 0
        return States(width * total, width * total + 4 * total, masters, moments, 0, copied)
    # A bucket is reduced as a copy of itself, in the type of communication.
    copies = (width + rules.communication_bytes * (width != rules.communication_bytes)) * min(bucket, total)
    if rules.stage == 1:
        gradients = 4 * total + (width * total if width == 2 else 0)
        return States(width * total, gradients, masters, moments, 4 * bucket + copies, summed)
    if rules.stage == 2:
        buffers = 2 if rules.zero.overlap_comm else 1
        return States(width * total, summed, masters, moments, buffers * width * bucket + copies, 0)
    # When the forward pass turns into the backward pass all weights lie gathered beside the shares. So it was seen on
    # two processes, under checkpointing too, and with a stage3_max_reuse_distance of a quarter of the model.
    weights = width * (share + total)
    buckets = rules.communication_bytes * (bucket + min(bucket, total) * (processes + 1) // processes)
    if rules.offload:
        return States(weights, 0, 0, 0, buckets, 0)
    return States(weights, summed, masters, moments, buckets, summed)
