# mypy: disallow-untyped-defs=False
# (what Triton compiles takes pointers and tiles, which Python's types do not know)
"""`grouped_attention` for CUDA: Triton kernels that read tokens where the grid has them and gather the bias themselves.

No window is cut, no bias or mask of N x N is written. A program serves a tile of one sequence and head, takes the
biases of its pairs from the table once, and walks with them in registers over a share of the images. Gradients of the
biases are added up in registers on that way, in fp32, and the shares in fp64, all in a fixed order. Triton's
interpreter runs the kernels on the CPU (TRITON_INTERPRET=1).

Shapes: B images, T tokens of the grid, K heads of D channels, C = K * D, G windows of N tokens, S sequences, R rows of
the table, QUERIES x KEYS pairs of a tile. The grid of programs has room for the longest sequence there can be, so the
host never asks how long one is. Logits are in units of log 2, for `exp2` is what GPUs have.
"""

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

PROGRAMS = 512  # of a kernel, about: enough to fill a GPU several times
LOG2_E = tl.constexpr(1 / math.log(2))


@triton.jit
def _bounds(starts, sequence):
    """Where a sequence begins in `order`, and how many tokens it has."""
    first = tl.load(starts + sequence).to(tl.int32)
    return first, tl.load(starts + sequence + 1).to(tl.int32) - first


@triton.jit
def _span(order, places, first, size, tile, BLOCK: tl.constexpr):
    """Of a tile's tokens: which exist, where they are in the grid, and in the window."""
    at = tile * BLOCK + tl.arange(0, BLOCK)
    inside = at < size
    tokens, here = tl.load(order + first + at, inside, 0), tl.load(places + first + at, inside, 0)
    return inside, tokens.to(tl.int32), here.to(tl.int32)


@triton.jit
def _rows(base, tokens, inside, width, column, D: tl.constexpr):
    """[BLOCK, D] of an image's array [T, width] from a column on; zeros for tokens that do not exist."""
    return tl.load(base + tokens[:, None] * width + column + tl.arange(0, D)[None, :], inside[:, None], 0.0)


@triton.jit
def _biases(table, here, there, exists, K, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """[QUERIES, KEYS] fp32 of a head's column of the table; -inf where a key does not exist."""
    across: tl.constexpr = 2 * COLUMNS - 1
    of_query = (here // COLUMNS + ROWS - 1) * across + here % COLUMNS + COLUMNS - 1
    of_key = (there // COLUMNS) * across + there % COLUMNS
    biases = tl.load(table + (of_query[:, None] - of_key[None, :]) * K, exists[None, :], float("-inf"))
    return biases.to(tl.float32) * LOG2_E


@triton.jit(do_not_specialize=["B", "SHARE"])
def _forward(
    qkv, table, order, places, starts, out, norms, B, SHARE, T, K, scale,
    D: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """Most sequences are no longer than KEYS, and have their biases in registers for all images of a share."""
    sequence, head, tile, share = tl.program_id(0) // K, tl.program_id(0) % K, tl.program_id(1), tl.program_id(2)
    first, size = _bounds(starts, sequence)
    if tile * QUERIES < size:
        C = K * D
        mine, tokens, here = _span(order, places, first, size, tile, QUERIES)
        theirs, keys, there = _span(order, places, first, size, 0, KEYS)
        biases = _biases(table + head, here, there, theirs, K, ROWS, COLUMNS)
        for number in range(share * SHARE, tl.minimum(share * SHARE + SHARE, B)):
            image = tl.zeros([], tl.int64) + number
            ours = qkv + image * T * 3 * C + head * D
            q, k = _rows(ours, tokens, mine, 3 * C, 0, D), _rows(ours, keys, theirs, 3 * C, C, D)
            v = _rows(ours, keys, theirs, 3 * C, 2 * C, D)
            logits = tl.dot(q, tl.trans(k), input_precision="ieee") * scale + biases
            top = tl.max(logits, 1)
            weights = tl.exp2(logits - top[:, None])
            total = tl.sum(weights, 1)
            sums = tl.dot(weights.to(v.dtype), v, input_precision="ieee")
            for other in range(1, tl.cdiv(size, KEYS)):
                theirs_too, keys_too, there_too = _span(order, places, first, size, other, KEYS)
                k = _rows(ours, keys_too, theirs_too, 3 * C, C, D)
                v = _rows(ours, keys_too, theirs_too, 3 * C, 2 * C, D)
                logits = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
                logits += _biases(table + head, here, there_too, theirs_too, K, ROWS, COLUMNS)
                higher = tl.maximum(top, tl.max(logits, 1))
                weights, shrink = tl.exp2(logits - higher[:, None]), tl.exp2(top - higher)
                total = total * shrink + tl.sum(weights, 1)
                sums = sums * shrink[:, None] + tl.dot(weights.to(v.dtype), v, input_precision="ieee")
                top = higher
            at = tokens[:, None] * C + tl.arange(0, D)[None, :]
            attended = (sums / total[:, None]).to(out.dtype.element_ty)
            tl.store(out + image * T * C + head * D + at, attended, mine[:, None])
            tl.store(norms + (image * K + head) * T + tokens, top + tl.log2(total), mine)


@triton.jit
def _gradients(q, k, v, g, norm, mean, biases, scale):
    """Weights of a tile of pairs and the gradients of its logits, zero for queries and keys that do not exist."""
    logits = tl.dot(q, tl.trans(k), input_precision="ieee") * scale + biases
    weights = tl.exp2(logits - norm[:, None])
    return weights, weights * (tl.dot(g, tl.trans(v), input_precision="ieee") - mean[:, None])


@triton.jit(do_not_specialize=["B", "SHARE"])
def _backward(
    grad, qkv, table, order, places, starts, out, norms, means, grad_qkv, B, SHARE, T, K, scale,
    D: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """Gradients of q, k and v of one sequence and head, over a share of the images. Most sequences are one tile of
    pairs; where there are more, their contributions are added up where they are written.

    Also leaves the mean of each query's weights' gradients."""
    sequence, head, share = tl.program_id(0) // K, tl.program_id(0) % K, tl.program_id(1)
    first, size = _bounds(starts, sequence)
    C = K * D
    for tile in range(0, tl.cdiv(size, QUERIES)):
        mine, tokens, here = _span(order, places, first, size, tile, QUERIES)
        for other in range(0, tl.cdiv(size, KEYS)):
            theirs, keys, there = _span(order, places, first, size, other, KEYS)
            biases = _biases(table + head, here, there, theirs, K, ROWS, COLUMNS)
            for number in range(share * SHARE, tl.minimum(share * SHARE + SHARE, B)):
                image = tl.zeros([], tl.int64) + number
                ours, result = qkv + image * T * 3 * C + head * D, image * T * C + head * D
                q, k = _rows(ours, tokens, mine, 3 * C, 0, D), _rows(ours, keys, theirs, 3 * C, C, D)
                v, g = _rows(ours, keys, theirs, 3 * C, 2 * C, D), _rows(grad + result, tokens, mine, C, 0, D)
                own = (image * K + head) * T + tokens
                norm = tl.load(norms + own, mine, float("inf"))
                mean = tl.sum(g.to(tl.float32) * _rows(out + result, tokens, mine, C, 0, D).to(tl.float32), 1)
                tl.store(means + own, mean, mine)
                weights, of_logits = _gradients(q, k, v, g, norm, mean, biases, scale)
                of_v = tl.dot(tl.trans(weights.to(g.dtype)), g, input_precision="ieee")
                rounded = of_logits.to(q.dtype)
                of_k = tl.dot(tl.trans(rounded), q, input_precision="ieee") * D**-0.5
                of_q = tl.dot(rounded, k, input_precision="ieee") * D**-0.5
                written = grad_qkv + image * T * 3 * C + head * D
                _add_rows(written, of_q, tokens, mine, 3 * C, 0, other > 0, D)
                _add_rows(written, of_k, keys, theirs, 3 * C, C, tile > 0, D)
                _add_rows(written, of_v, keys, theirs, 3 * C, 2 * C, tile > 0, D)


@triton.jit
def _add_rows(base, values, tokens, inside, width, column, more, D: tl.constexpr):
    """Writes rows as `_rows` reads them, or, if there is something already, adds to them."""
    at = base + tokens[:, None] * width + column + tl.arange(0, D)[None, :]
    if more:
        values += tl.load(at, inside[:, None], 0.0).to(tl.float32)
    tl.store(at, values.to(base.dtype.element_ty), inside[:, None])


@triton.jit(do_not_specialize=["B", "SHARE"])
def _backward_bias(
    grad, qkv, table, order, places, starts, norms, means, pairs, B, SHARE, T, K, scale,
    D: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """Gradients of the biases of a tile of pairs, added up over a share of the images: pairs [shares, G, K, N, N]. A
    window's two sequences have no pair in common, so each is written once."""
    sequence, head, share = tl.program_id(0) // K, tl.program_id(0) % K, tl.program_id(2)
    N: tl.constexpr = ROWS * COLUMNS
    across: tl.constexpr = (N + KEYS - 1) // KEYS
    tile, other = tl.program_id(1) // across, tl.program_id(1) % across
    first, size = _bounds(starts, sequence)
    if (tile * QUERIES < size) & (other * KEYS < size):
        C = K * D
        mine, tokens, here = _span(order, places, first, size, tile, QUERIES)
        theirs, keys, there = _span(order, places, first, size, other, KEYS)
        biases = _biases(table + head, here, there, theirs, K, ROWS, COLUMNS)
        sums = tl.zeros([QUERIES, KEYS], tl.float32)
        for number in range(share * SHARE, tl.minimum(share * SHARE + SHARE, B)):
            image = tl.zeros([], tl.int64) + number
            ours, own = qkv + image * T * 3 * C + head * D, (image * K + head) * T + tokens
            q, k = _rows(ours, tokens, mine, 3 * C, 0, D), _rows(ours, keys, theirs, 3 * C, C, D)
            v = _rows(ours, keys, theirs, 3 * C, 2 * C, D)
            g = _rows(grad + image * T * C + head * D, tokens, mine, C, 0, D)
            norm, mean = tl.load(norms + own, mine, float("inf")), tl.load(means + own, mine, 0.0)
            sums += _gradients(q, k, v, g, norm, mean, biases, scale)[1]
        windows = tl.num_programs(0) // (2 * K)
        block = ((share * windows + sequence // 2) * K + head).to(tl.int64) * N * N
        tl.store(pairs + block + here[:, None] * N + there[None, :], sums, mine[:, None] & theirs[None, :])


@triton.jit
def _fold(pairs, folded, ROWS: tl.constexpr, COLUMNS: tl.constexpr, ACROSS: tl.constexpr, BLOCK: tl.constexpr):
    """Gradients of pairs [slices, K, N, N] fp32 to those of offsets [slices, K, R] fp64: a program for a slice, a head
    and an offset in rows."""
    N: tl.constexpr = ROWS * COLUMNS
    number = tl.program_id(2) * tl.num_programs(0) + tl.program_id(0)
    down, right = tl.program_id(1) - (ROWS - 1), tl.arange(0, ACROSS) - (COLUMNS - 1)
    pairs += number.to(tl.int64) * N * N
    sums = tl.zeros([BLOCK, ACROSS], tl.float64)
    for tile in range(0, (N + BLOCK - 1) // BLOCK):
        here = tile * BLOCK + tl.arange(0, BLOCK)
        row, column = (here // COLUMNS - down)[:, None], (here % COLUMNS)[:, None] - right[None, :]
        exists = (here < N)[:, None] & (row >= 0) & (row < ROWS) & (column >= 0) & (column < COLUMNS)
        sums += tl.load(pairs + here[:, None] * N + row * COLUMNS + column, exists, 0.0)
    at = (number * (2 * ROWS - 1) + tl.program_id(1)) * (2 * COLUMNS - 1) + tl.arange(0, ACROSS)
    tl.store(folded + at, tl.sum(sums, 0), tl.arange(0, ACROSS) < 2 * COLUMNS - 1)


class Tile(NamedTuple):
    """How a kernel is cut: pairs of a tile, and warps and pipeline stages of the program that serves it."""

    queries: int
    keys: int
    warps: int
    stages: int = 1


# Of the forward pass, the backward pass and the gradients of biases, by the bytes of a number: fp32 takes no matrix
# units and many registers. For windows of up to 64 tokens, and larger ones; the fastest of those tried on an H100.
SMALL = {2: (Tile(32, 32, 2), Tile(32, 32, 1), Tile(32, 32, 1)), 4: (Tile(32, 32, 4),) * 3}
LARGE = {2: (Tile(64, 128, 4), Tile(64, 128, 4), Tile(64, 64, 4, 2)), 4: (Tile(64, 64, 8),) * 3}


def _tiles(qkv: Tensor, window: int) -> tuple[Tile, ...]:
    return (SMALL if window <= 64 else LARGE)[qkv.itemsize]


def _setting(qkv: Tensor, table: Tensor, window: int, columns: int, tile: Tile, share: int) -> dict[str, int | float]:
    (batch, tokens, channels), heads = qkv.shape, table.shape[1]
    dim = channels // (3 * heads)
    constants = {"D": dim, "ROWS": window // columns, "COLUMNS": columns, "QUERIES": tile.queries, "KEYS": tile.keys}
    options = {"num_warps": tile.warps, "num_stages": tile.stages}
    numbers = {"B": batch, "SHARE": share, "T": tokens, "K": heads, "scale": dim**-0.5 * LOG2_E.value}
    return numbers | constants | options


def _share(batch: int, others: int) -> int:
    """Images that a program walks over: as many as leave PROGRAMS programs."""
    return max(1, batch * others // PROGRAMS)


def attention(
    qkv: Tensor, table: Tensor, index: Tensor, columns: int, order: Tensor, places: Tensor, starts: Tensor
) -> tuple[Tensor, Tensor]:
    """See `grouped.grouped_attention`.

    Raises:
        ValueError: D is no power of two of at least 16, or qkv is float64.
    """
    (batch, tokens, channels), heads, window = qkv.shape, table.shape[1], len(index)
    dim = channels // (3 * heads)
    if dim < 16 or dim & (dim - 1):
        raise ValueError(f"attention on CUDA takes heads of 16, 32, 64 ... channels, not of {dim}; change num_heads.")
    if qkv.dtype == torch.float64:
        raise ValueError("attention on CUDA takes no float64; take float32, or the CPU.")
    qkv, table, tile = qkv.contiguous(), table.contiguous(), _tiles(qkv, window)[0]
    out = qkv.new_empty(batch, tokens, channels // 3)
    norms = torch.empty(batch, heads, tokens, dtype=torch.float32, device=qkv.device)
    sequences, tiles = (len(starts) - 1) * heads, triton.cdiv(window, tile.queries)
    share = _share(batch, sequences)
    _forward[(sequences, tiles, triton.cdiv(batch, share))](
        qkv, table, order, places, starts, out, norms, **_setting(qkv, table, window, columns, tile, share)
    )
    return out, norms


def attention_backward(
    grad: Tensor, out: Tensor, norms: Tensor, qkv: Tensor, table: Tensor, index: Tensor, columns: int,
    order: Tensor, places: Tensor, starts: Tensor,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """See `grouped.grouped_attention_backward`."""
    grad, qkv, table, window = grad.contiguous(), qkv.contiguous(), table.contiguous(), len(index)
    (_, tile, of_biases), batch = _tiles(qkv, window), len(qkv)
    windows, sequences = (len(starts) - 1) // 2, (len(starts) - 1) * table.shape[1]
    share = _share(batch, sequences)
    shares = triton.cdiv(batch, share)
    grad_qkv, means = torch.empty_like(qkv), torch.empty_like(norms)
    given = (grad, qkv, table, order, places, starts)
    _backward[(sequences, shares)](
        *given, out, norms, means, grad_qkv, **_setting(qkv, table, window, columns, tile, share)
    )
    pairs = torch.zeros(shares * windows, table.shape[1], window, window, dtype=torch.float32, device=qkv.device)
    tiles = triton.cdiv(window, of_biases.queries) * triton.cdiv(window, of_biases.keys)
    _backward_bias[(sequences, tiles, shares)](
        *given, norms, means, pairs, **_setting(qkv, table, window, columns, of_biases, share)
    )
    return grad_qkv, _of_table(pairs, window // columns, columns).to(table.dtype)


def _of_table(pairs: Tensor, rows: int, columns: int) -> Tensor:
    """Gradients of pairs [slices, K, N, N] to that of the table, fp64 [R, K]."""
    slices, heads = pairs.shape[:2]
    folded = torch.empty(slices, heads, (2 * rows - 1) * (2 * columns - 1), dtype=torch.float64, device=pairs.device)
    across = triton.next_power_of_2(2 * columns - 1)
    _fold[(heads, 2 * rows - 1, slices)](pairs, folded, rows, columns, across, BLOCK=16)
    return folded.sum(0).T.contiguous()
