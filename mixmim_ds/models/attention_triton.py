# mypy: disallow-untyped-defs=False
# (what Triton compiles takes pointers and tiles, which Python's types do not know)
"""`grouped_attention` for CUDA: Triton kernels that read tokens where the grid has them and gather the bias themselves.

No window is cut, no bias or mask of N x N is written. A head's column of the table (a few kB) is gathered from the
cache; the gradient of a tile of biases is added up over all images in registers, in fp32, and written once.
Not measured on a GPU, so `enable` has to be called for it; Triton's interpreter runs it on the CPU
(TRITON_INTERPRET=1).

Shapes: B images, T tokens of the grid, K heads of D channels, C = K * D, N tokens of a window, S sequences. A program
serves a tile of BLOCK tokens of one sequence and head; the grid has as many tiles as the longest sequence can need,
so the host never asks how long one is.
"""

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from mixmim_ds.models.grouped import grouped_attention, grouped_attention_backward
from mixmim_ds.models.groups import GROUPED_ON

BLOCK = 64


def enable() -> None:
    """From now on attention under a mask runs by these kernels on CUDA."""
    GROUPED_ON.add("cuda")


@triton.jit
def _bounds(starts, sequence):
    """Where a sequence begins in `order`, and how many tokens it has."""
    first = tl.load(starts + sequence)
    return first, tl.load(starts + sequence + 1) - first


@triton.jit
def _span(order, places, first, size, tile, BLOCK: tl.constexpr):
    """Of a tile's tokens: which exist, where they are in the grid, and in the window."""
    at = tile * BLOCK + tl.arange(0, BLOCK)
    inside = at < size
    return inside, tl.load(order + first + at, inside, 0), tl.load(places + first + at, inside, 0)


@triton.jit
def _rows(base, image, tokens, inside, T, width, column, D: tl.constexpr):
    """[BLOCK, D] of an array [B, T, width] from a column on; zeros for tokens that do not exist."""
    at = (image.to(tl.int64) * T + tokens)[:, None] * width + column + tl.arange(0, D)[None, :]
    return tl.load(base + at, inside[:, None], 0.0)


@triton.jit
def _keys(qkv, order, places, first, size, tile, image, head, T, C, D: tl.constexpr, BLOCK: tl.constexpr):
    """Of a tile's tokens: which exist, where they are in the grid and in the window, their keys and values."""
    theirs, keys, there = _span(order, places, first, size, tile, BLOCK)
    k = _rows(qkv, image, keys, theirs, T, 3 * C, C + head * D, D)
    v = _rows(qkv, image, keys, theirs, T, 3 * C, 2 * C + head * D, D)
    return theirs, keys, there, k, v


@triton.jit
def _logits(q, k, table, head, here, there, exists, K, ROWS: tl.constexpr, COLUMNS: tl.constexpr, scale):
    """Scaled products and biases of a tile, [BLOCK, BLOCK] fp32; -inf where a key does not exist."""
    down = (here // COLUMNS)[:, None] - (there // COLUMNS)[None, :] + ROWS - 1
    right = (here % COLUMNS)[:, None] - (there % COLUMNS)[None, :] + COLUMNS - 1
    bias = tl.load(table + (down * (2 * COLUMNS - 1) + right) * K + head).to(tl.float32)
    products = tl.dot(q, tl.trans(k), input_precision="ieee")
    return tl.where(exists[None, :], products * scale + bias, float("-inf"))


@triton.jit
def _forward(
    qkv, table, order, places, starts, out, T, K, scale,
    D: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    sequence, head, tile, image = tl.program_id(0) // K, tl.program_id(0) % K, tl.program_id(1), tl.program_id(2)
    first, size = _bounds(starts, sequence)
    if tile * BLOCK < size:
        C = K * D
        mine, tokens, here = _span(order, places, first, size, tile, BLOCK)
        q = _rows(qkv, image, tokens, mine, T, 3 * C, head * D, D)
        top = tl.full([BLOCK], float("-inf"), tl.float32)
        total = tl.zeros([BLOCK], tl.float32)
        sums = tl.zeros([BLOCK, D], tl.float32)
        for other in range(0, tl.cdiv(size, BLOCK)):
            theirs, keys, there, k, v = _keys(qkv, order, places, first, size, other, image, head, T, C, D, BLOCK)
            logits = _logits(q, k, table, head, here, there, theirs, K, ROWS, COLUMNS, scale)
            higher = tl.maximum(top, tl.max(logits, 1))
            weights = tl.exp(logits - higher[:, None])
            shrink = tl.exp(top - higher)
            total = total * shrink + tl.sum(weights, 1)
            sums = sums * shrink[:, None] + tl.dot(weights.to(v.dtype), v, input_precision="ieee")
            top = higher
        at = (image.to(tl.int64) * T + tokens)[:, None] * C + head * D + tl.arange(0, D)[None, :]
        tl.store(out + at, (sums / total[:, None]).to(out.dtype.element_ty), mine[:, None])


@triton.jit
def _backward_q(
    grad, qkv, table, order, places, starts, grad_qkv, norms, means, T, K, scale,
    D: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Also finds, for the other kernels, each query's log-sum-exp and the mean of its weights' gradients."""
    sequence, head, tile, image = tl.program_id(0) // K, tl.program_id(0) % K, tl.program_id(1), tl.program_id(2)
    first, size = _bounds(starts, sequence)
    if tile * BLOCK < size:
        C = K * D
        mine, tokens, here = _span(order, places, first, size, tile, BLOCK)
        q = _rows(qkv, image, tokens, mine, T, 3 * C, head * D, D)
        g = _rows(grad, image, tokens, mine, T, C, head * D, D)
        top = tl.full([BLOCK], float("-inf"), tl.float32)
        total = tl.zeros([BLOCK], tl.float32)
        mean = tl.zeros([BLOCK], tl.float32)
        for other in range(0, tl.cdiv(size, BLOCK)):
            theirs, keys, there, k, v = _keys(qkv, order, places, first, size, other, image, head, T, C, D, BLOCK)
            logits = _logits(q, k, table, head, here, there, theirs, K, ROWS, COLUMNS, scale)
            higher = tl.maximum(top, tl.max(logits, 1))
            weights = tl.exp(logits - higher[:, None])
            shrink = tl.exp(top - higher)
            total = total * shrink + tl.sum(weights, 1)
            mean = mean * shrink + tl.sum(weights * tl.dot(g, tl.trans(v), input_precision="ieee"), 1)
            top = higher
        norm, mean = top + tl.log(total), mean / total
        at_norm = (image.to(tl.int64) * K + head) * T + tokens
        tl.store(norms + at_norm, norm, mine)
        tl.store(means + at_norm, mean, mine)
        sums = tl.zeros([BLOCK, D], tl.float32)
        for other in range(0, tl.cdiv(size, BLOCK)):
            theirs, keys, there, k, v = _keys(qkv, order, places, first, size, other, image, head, T, C, D, BLOCK)
            logits = _logits(q, k, table, head, here, there, theirs, K, ROWS, COLUMNS, scale)
            grad_weights = tl.dot(g, tl.trans(v), input_precision="ieee")
            grad_logits = tl.exp(logits - norm[:, None]) * (grad_weights - mean[:, None])
            sums += tl.dot(grad_logits.to(k.dtype), k, input_precision="ieee")
        at = (image.to(tl.int64) * T + tokens)[:, None] * (3 * C) + head * D + tl.arange(0, D)[None, :]
        tl.store(grad_qkv + at, (sums * scale).to(grad_qkv.dtype.element_ty), mine[:, None])


@triton.jit
def _backward_kv(
    grad, qkv, table, order, places, starts, grad_qkv, norms, means, T, K, scale,
    D: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    sequence, head, tile, image = tl.program_id(0) // K, tl.program_id(0) % K, tl.program_id(1), tl.program_id(2)
    first, size = _bounds(starts, sequence)
    if tile * BLOCK < size:
        C = K * D
        theirs, keys, there, k, v = _keys(qkv, order, places, first, size, tile, image, head, T, C, D, BLOCK)
        of_k = tl.zeros([BLOCK, D], tl.float32)
        of_v = tl.zeros([BLOCK, D], tl.float32)
        for other in range(0, tl.cdiv(size, BLOCK)):
            mine, tokens, here = _span(order, places, first, size, other, BLOCK)
            q = _rows(qkv, image, tokens, mine, T, 3 * C, head * D, D)
            g = _rows(grad, image, tokens, mine, T, C, head * D, D)
            weights, grad_logits = _gradient_tile(
                q, k, v, g, table, norms, means, image, head, tokens, mine, here, there, theirs, T, K, ROWS, COLUMNS,
                scale,
            )  # fmt: skip
            of_v += tl.dot(tl.trans(weights).to(g.dtype), g, input_precision="ieee")
            of_k += tl.dot(tl.trans(grad_logits).to(q.dtype), q, input_precision="ieee")
        at = (image.to(tl.int64) * T + keys)[:, None] * (3 * C) + head * D + tl.arange(0, D)[None, :]
        tl.store(grad_qkv + at + C, (of_k * scale).to(grad_qkv.dtype.element_ty), theirs[:, None])
        tl.store(grad_qkv + at + 2 * C, of_v.to(grad_qkv.dtype.element_ty), theirs[:, None])


@triton.jit
def _gradient_tile(
    q, k, v, g, table, norms, means, image, head, tokens, mine, here, there, theirs, T, K,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, scale,
):  # fmt: skip
    """Weights of a tile and gradients of its logits, zero for queries and keys that do not exist."""
    logits = _logits(q, k, table, head, here, there, theirs, K, ROWS, COLUMNS, scale)
    at = (image.to(tl.int64) * K + head) * T + tokens
    norm, mean = tl.load(norms + at, mine, float("inf")), tl.load(means + at, mine, 0.0)
    weights = tl.exp(logits - norm[:, None])
    return weights, weights * (tl.dot(g, tl.trans(v), input_precision="ieee") - mean[:, None])


@triton.jit
def _backward_bias(
    grad, qkv, table, order, places, starts, grad_bias, norms, means, B, T, K, scale,
    D: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A tile's gradient over all images; a window's two sequences have no pair in common, so each is written once."""
    sequence, head, tile, other = tl.program_id(0) // K, tl.program_id(0) % K, tl.program_id(1), tl.program_id(2)
    first, size = _bounds(starts, sequence)
    if (tile * BLOCK < size) & (other * BLOCK < size):
        C, N = K * D, ROWS * COLUMNS
        mine, tokens, here = _span(order, places, first, size, tile, BLOCK)
        theirs, keys, there = _span(order, places, first, size, other, BLOCK)
        sums = tl.zeros([BLOCK, BLOCK], tl.float32)
        for image in range(0, B):
            number = tl.zeros([], tl.int64) + image
            q = _rows(qkv, number, tokens, mine, T, 3 * C, head * D, D)
            g = _rows(grad, number, tokens, mine, T, C, head * D, D)
            k = _rows(qkv, number, keys, theirs, T, 3 * C, C + head * D, D)
            v = _rows(qkv, number, keys, theirs, T, 3 * C, 2 * C + head * D, D)
            _, grad_logits = _gradient_tile(
                q, k, v, g, table, norms, means, number, head, tokens, mine, here, there, theirs, T, K, ROWS, COLUMNS,
                scale,
            )  # fmt: skip
            sums += grad_logits
        at = (((sequence // 2) * K + head) * N + here)[:, None] * N + there[None, :]
        tl.store(grad_bias + at, sums, mine[:, None] & theirs[None, :])


def _setting(qkv: Tensor, table: Tensor, index: Tensor, columns: int) -> dict[str, int | float]:
    heads, tokens = table.shape[1], len(index)
    dim = qkv.shape[2] // (3 * heads)
    constants = {"D": dim, "ROWS": tokens // columns, "COLUMNS": columns, "BLOCK": BLOCK}
    return {"T": qkv.shape[1], "K": heads, "scale": dim**-0.5, **constants}


@grouped_attention.register_kernel("cuda")
def attention(
    qkv: Tensor, table: Tensor, index: Tensor, columns: int, order: Tensor, places: Tensor, sizes: Tensor
) -> Tensor:
    """See `grouped.grouped_attention`; D is a power of two of at least 16."""
    qkv, starts = qkv.contiguous(), F.pad(sizes.cumsum(0), (1, 0))
    out = qkv.new_empty(*qkv.shape[:2], qkv.shape[2] // 3)
    grid = (len(sizes) * table.shape[1], triton.cdiv(len(index), BLOCK), len(qkv))
    _forward[grid](qkv, table, order, places, starts, out, **_setting(qkv, table, index, columns))
    return out


@grouped_attention_backward.register_kernel("cuda")
def attention_backward(
    grad: Tensor, qkv: Tensor, table: Tensor, index: Tensor, columns: int, order: Tensor, places: Tensor, sizes: Tensor
) -> tuple[Tensor, Tensor]:
    """See `grouped.grouped_attention_backward`."""
    (batch, tokens, _), (rows, heads), window = qkv.shape, table.shape, len(index)
    grad, qkv, starts = grad.contiguous(), qkv.contiguous(), F.pad(sizes.cumsum(0), (1, 0))
    grad_qkv = torch.empty_like(qkv)
    norms, means = torch.empty(2, batch, heads, tokens, dtype=torch.float32, device=qkv.device)
    grad_bias = torch.zeros(tokens // window, heads, window, window, dtype=torch.float32, device=qkv.device)
    given, setting = (grad, qkv, table, order, places, starts), _setting(qkv, table, index, columns)
    sequences, tiles = len(sizes) * heads, triton.cdiv(window, BLOCK)
    _backward_q[(sequences, tiles, batch)](*given, grad_qkv, norms, means, **setting)
    _backward_kv[(sequences, tiles, batch)](*given, grad_qkv, norms, means, **setting)
    _backward_bias[(sequences, tiles, tiles)](*given, grad_bias, norms, means, batch, **setting)
    of_pairs = grad_bias.sum(0, dtype=torch.float64).flatten(1).T
    # index_put_ adds in a fixed order on CUDA, which index_add_ does not.
    grad_table = of_pairs.new_zeros(rows, heads).index_put_((index.flatten(),), of_pairs, accumulate=True)
    return grad_qkv, grad_table.to(table.dtype)
