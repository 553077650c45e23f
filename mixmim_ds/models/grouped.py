"""Attention inside sequences of tokens of one image, with a learned relative position bias, as one operator.

Nothing N x N outlives a sequence: the backward pass computes the weights again from q, k and the bias. What is written
here out of PyTorch's operators serves the CPU; CUDA has kernels of its own (`attention_triton`). It is an operator, so
torch.compile sees no shape that depends on a mask, and selective activation checkpointing can keep its result as it
keeps that of a matrix product.

Shapes: B images, T tokens of the grid, K heads of D channels, C = K * D, R rows of the bias table, N tokens of a
window, S sequences of n tokens each (`groups.Sequences`).
"""

from collections.abc import Iterator
from types import ModuleType
from typing import Any

import torch
from torch import Tensor


@torch.library.custom_op("mixmim_ds::grouped_attention", mutates_args=())
def grouped_attention(
    qkv: Tensor, table: Tensor, index: Tensor, columns: int, order: Tensor, places: Tensor, starts: Tensor
) -> tuple[Tensor, Tensor]:
    """Attention of every token to the tokens of its sequence, [B, T, C] of qkv's dtype; arithmetic at least fp32.

    Also returns what the device's backward pass needs: on CUDA the logarithms of the sums of the
    softmax, [B, K, T] fp32, on the CPU nothing.

    Args:
        qkv: [B, T, 3C], tokens as the grid has them; channels ordered (q, k, v), head, channel.
        table: [R, K], any float type: the bias of every offset.
        index: int64 [N, N], row of the table for a query's and a key's place in the window.
        columns: of a window.
        order, places, starts: of `groups.Sequences`.
    """
    heads = table.shape[1]
    out = qkv.new_empty(*qkv.shape[:2], qkv.shape[2] // 3)
    with torch.autocast(qkv.device.type, enabled=False):
        for tokens, rows in _sequences(index, order, places, starts):
            q, k, v = _heads(qkv.index_select(1, tokens), 3, heads)
            attended = torch.bmm(_weights(q, k, _biases(table, rows, q.dtype)), v)
            out.index_copy_(1, tokens, _tokens(attended[None], len(out)).to(out.dtype))
    return out, qkv.new_empty(0, dtype=torch.float32)


@torch.library.custom_op("mixmim_ds::grouped_attention_backward", mutates_args=())
def grouped_attention_backward(
    grad: Tensor, out: Tensor, norms: Tensor, qkv: Tensor, table: Tensor, index: Tensor, columns: int,
    order: Tensor, places: Tensor, starts: Tensor,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The gradients of qkv and table, in their dtypes, from that of the result [B, T, C] and what was returned."""
    heads, batch = table.shape[1], len(qkv)
    grad_qkv = torch.empty_like(qkv)
    # A row of the table collects thousands of terms: summed in float64 they lose nothing before the one rounding.
    grad_table = torch.zeros(heads, len(table), dtype=torch.float64, device=table.device)
    with torch.autocast(qkv.device.type, enabled=False):
        for tokens, rows in _sequences(index, order, places, starts):
            q, k, v = _heads(qkv.index_select(1, tokens), 3, heads)
            (grad_out,) = _heads(grad.index_select(1, tokens), 1, heads)
            weights = _weights(q, k, _biases(table, rows, q.dtype))
            grad_logits = torch._softmax_backward_data(torch.bmm(grad_out, v.mT), weights, -1, q.dtype)
            of_offsets = grad_logits.view(batch, heads, -1).sum(0).double()
            grad_table.scatter_add_(1, rows.expand(heads, -1), of_offsets)
            parts = q.new_empty(3, *q.shape)
            torch.bmm(grad_logits, k, out=parts[0])
            torch.bmm(grad_logits.mT, q, out=parts[1])
            torch.bmm(weights.mT, grad_out, out=parts[2])
            parts[:2] *= _scale(q)
            grad_qkv.index_copy_(1, tokens, _tokens(parts, batch).to(qkv.dtype))
    return grad_qkv, grad_table.T.to(table.dtype, memory_format=torch.contiguous_format)


def _sequences(index: Tensor, order: Tensor, places: Tensor, starts: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Of every sequence that has any: its tokens [n], and the table's rows for its pairs [n * n]."""
    lengths = starts.diff().tolist()
    for tokens, inside in zip(order.split(lengths), places.split(lengths), strict=True):
        if len(tokens):
            yield tokens, index.index_select(0, inside).index_select(1, inside).flatten()


def _heads(x: Tensor, parts: int, heads: int) -> Tensor:
    """[B, n, parts * C] -> [parts, B * K, n, D] of at least fp32."""
    batch, tokens, channels = x.shape
    x = x.view(batch, tokens, parts, heads, channels // (parts * heads)).permute(2, 0, 3, 1, 4)
    return x.reshape(parts, batch * heads, tokens, -1).to(torch.promote_types(x.dtype, torch.float32))


def _tokens(x: Tensor, batch: int) -> Tensor:
    """[parts, B * K, n, D] -> [B, n, parts * C]."""
    parts, _, tokens, dim = x.shape
    return x.view(parts, batch, -1, tokens, dim).permute(1, 3, 0, 2, 4).reshape(batch, tokens, -1)


def _biases(table: Tensor, rows: Tensor, dtype: torch.dtype) -> Tensor:
    """[K, n * n]."""
    return table.to(dtype).T.contiguous().index_select(1, rows)


def _weights(q: Tensor, k: Tensor, biases: Tensor) -> Tensor:
    """Softmax of scaled products and biases, [B * K, n, n]."""
    tokens = q.shape[1]
    logits = torch.bmm(q * _scale(q), k.mT)
    logits.view(-1, *biases.shape).add_(biases)
    return logits.view(-1, tokens, tokens).softmax(-1)


def _scale(q: Tensor) -> float:
    return q.shape[-1] ** -0.5


def _kernels() -> ModuleType:
    """Those of CUDA; not before they are needed, for Triton takes seconds to import, and is not everywhere.

    Raises:
        ImportError: Triton is missing, or this package, of which an export may hold the encoder alone.
    """
    try:
        import mixmim_ds.models.attention_triton as kernels
    except ImportError as error:
        raise ImportError(f"Masks on CUDA take mixmim_ds and triton ({error}): install both.") from error
    return kernels


@grouped_attention.register_kernel("cuda")
def _on_cuda(*given: Any) -> tuple[Tensor, Tensor]:
    result: tuple[Tensor, Tensor] = _kernels().attention(*given)
    return result


@grouped_attention_backward.register_kernel("cuda")
def _backward_on_cuda(*given: Any) -> tuple[Tensor, Tensor]:
    result: tuple[Tensor, Tensor] = _kernels().attention_backward(*given)
    return result


@grouped_attention.register_fake
def _shapes(qkv: Tensor, table: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    batch, tokens, channels = qkv.shape
    norms = (0,) if qkv.device.type == "cpu" else (batch, table.shape[1], tokens)
    return qkv.new_empty(batch, tokens, channels // 3), qkv.new_empty(norms, dtype=torch.float32)


@grouped_attention_backward.register_fake
def _shapes_backward(grad: Tensor, out: Tensor, norms: Tensor, qkv: Tensor, table: Tensor, *args: Any) -> Any:
    return torch.empty_like(qkv), torch.empty_like(table)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    qkv, table, index, ctx.columns, *sequences = inputs
    ctx.save_for_backward(*output, qkv, table, index, *sequences)
    ctx.mark_non_differentiable(output[1])


def _backward(ctx: Any, grad: Tensor, _: None) -> tuple[Tensor | None, ...]:
    out, norms, qkv, table, index, *sequences = ctx.saved_tensors
    found = grouped_attention_backward(grad.contiguous(), out, norms, qkv, table, index, ctx.columns, *sequences)
    return *found, None, None, None, None, None


grouped_attention.register_autograd(_backward, setup_context=_save)
