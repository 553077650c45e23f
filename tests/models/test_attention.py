"""Every way to attend against tests/reference.py in float64: result and all gradients, the bias table's included."""

import functools

import pytest
import reference
import torch
from torch import Tensor

from mixmim_ds.benchmark.attention import sides
from mixmim_ds.models import groups
from mixmim_ds.models.attention import WindowAttention

BACKENDS = ("masked pairs", "sequences")
# Window and grid of all registered encoders: at 224 a window of 14 cuts cells, at 384 one of 12 holds whole ones.
SHAPES = [(7, 7), (14, 14), (14, 28), (14, 56), (12, 12), (16, 48), (24, 24)]
CELLS = {7: 7, 14: 7, 28: 7, 56: 7, 12: 12, 24: 12, 48: 12}
HEADS, DIM, BATCH = 2, 64, 1


def some_mask(cells: int, masked: int) -> Tensor:
    shuffled = torch.randperm(cells * cells, generator=torch.Generator().manual_seed(2))
    return (shuffled < masked).reshape(cells, cells)


def layer(window: int, dtype: torch.dtype) -> WindowAttention:
    """A layer whose biases matter: at first they are too small for a wrong one to show."""
    torch.manual_seed(0)
    module = WindowAttention(DIM, HEADS, (window, window))
    with torch.no_grad():
        module.relative_position_bias_table.normal_()
        module.qkv.bias.normal_()
    return module.bfloat16().to(dtype)


def gradients(module: WindowAttention, x: Tensor, out: Tensor, upstream: Tensor) -> dict[str, Tensor]:
    names, parameters = zip(*module.named_parameters(), strict=True)
    found = torch.autograd.grad(out, [x, *parameters], upstream.to(out.dtype))
    return dict(zip(("out", "x", *names), (out.detach(), *found), strict=True))


def exact(module: WindowAttention, x: Tensor, mask: Tensor, upstream: Tensor) -> dict[str, Tensor]:
    """By the reference, one window and image at a time."""
    window, grid = module.window[0], x.shape[1]
    params = {f"attn.{name}": value for name, value in module.named_parameters()}
    bias = params["attn.relative_position_bias_table"][reference.relative_position_index(window)].permute(2, 0, 1)
    source = reference.on_grid(mask, grid, grid)
    out = torch.zeros_like(x)
    for top in range(0, grid, window):
        for left in range(0, grid, window):
            place = (slice(top, top + window), slice(left, left + window))
            group = source[place].flatten()
            own = bias.masked_fill(group[:, None] != group[None, :], float("-inf"))
            attended = [reference.attention(params, "attn", image[place].reshape(-1, DIM), HEADS, own) for image in x]
            index = torch.zeros(grid, grid, dtype=torch.bool)
            index[place] = True
            out = out.masked_scatter(index[None, :, :, None], torch.stack(attended))
    return gradients(module, x, out, upstream)


def attend(module: WindowAttention, x: Tensor, mask: Tensor, backend: str) -> Tensor:
    grid = (x.shape[1], x.shape[2])
    if backend == "sequences":
        return module(x, groups.Groups(groups.sort_tokens(mask, grid, module.window), None))
    return module(x, groups.Groups(None, groups.pair_mask(mask, grid, module.window)))


@functools.cache
def case(window: int, grid: int, masked: int) -> tuple[Tensor, Tensor, Tensor, dict[str, Tensor]]:
    """Mask, input, upstream gradient, and what comes of them. All numbers are of bfloat16, so one serves any dtype."""
    mask, generator = some_mask(CELLS[grid], masked), torch.Generator().manual_seed(3)
    x, upstream = (torch.randn(BATCH, grid, grid, DIM, generator=generator).bfloat16().double() for _ in range(2))
    x.requires_grad_()
    return mask, x, upstream, exact(layer(window, torch.float64), x, mask, upstream)


def computed(window: int, grid: int, masked: int, dtype: torch.dtype, backend: str) -> dict[str, Tensor]:
    mask, x, upstream, _ = case(window, grid, masked)
    module, x = layer(window, dtype), x.detach().to(dtype).requires_grad_()
    out = attend(module, x, mask, backend)
    assert out.dtype == dtype
    return gradients(module, x, out, upstream)


def assert_near(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    for name, value in expected.items():
        error = (found[name].double() - value).norm() / value.norm().clamp(min=1e-30)
        assert error < tolerance, f"{name}: {error:.2e}"


# Relative errors in norm. bf16 rounds operands and results to 8 bits (2^-9 = 2e-3), several in a row.
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 1.5e-2)])
@pytest.mark.parametrize("masked", [0, 1, 24, 49])
@pytest.mark.parametrize(("window", "grid"), SHAPES)
def test_result_and_gradients_equal_the_reference(
    window: int, grid: int, masked: int, dtype: torch.dtype, tolerance: float, backend: str
) -> None:
    assert_near(computed(window, grid, masked, dtype, backend), case(window, grid, masked)[3], tolerance)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("window", [(2, 4), (4, 2), (1, 4), (4, 4)])
def test_windows_need_not_be_square(window: tuple[int, int], backend: str) -> None:
    """One way against the other: the reference knows squares alone."""
    torch.manual_seed(0)
    module = WindowAttention(DIM, HEADS, window).double()
    torch.nn.init.normal_(module.relative_position_bias_table)
    x = torch.randn(2, 4, 8, DIM, dtype=torch.float64)
    mask = torch.tensor([[True, False], [False, False]])
    one, other = (attend(module, x, mask, name) for name in BACKENDS)
    torch.testing.assert_close(one, other, rtol=0, atol=1e-12)


def test_the_table_gets_a_gradient_rounded_once() -> None:
    """Given the gradients of all logits, which fp32 rounds, adding them up loses nothing more: the error is that of
    terms that are random and independent, not of a sum of thousands."""
    found = computed(14, 56, 24, torch.float32, "sequences")["relative_position_bias_table"]
    exact_gradient = case(14, 56, 24)[3]["relative_position_bias_table"]
    error = (found.double() - exact_gradient).abs()
    eps = torch.finfo(torch.float32).eps
    assert error.max() < 4 * eps * exact_gradient.abs().max()


def test_nothing_of_the_size_of_the_weights_is_kept_for_backward() -> None:
    module, mask, x = layer(14, torch.float32), some_mask(7, 24), torch.randn(BATCH, 56, 56, DIM, requires_grad=True)
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        attend(module, x, mask, "sequences")
    sequence = 4 * BATCH * 56 * 56 * DIM  # bytes of x
    weights = sum(p.untyped_storage().nbytes() for p in module.parameters()) + 8 * 196 * 196 + 2 * 8 * 56 * 56
    assert sum(kept.values()) <= 5 * sequence + weights + 1000, "x, q, k, v and the result; and where sequences start"


def test_attention_weights_are_dropped_where_asked_for() -> None:
    mask = some_mask(7, 24)
    assert groups.group_tokens(mask, (14, 14), (14, 14)).sequences is not None
    assert groups.group_tokens(mask, (14, 14), (14, 14), dropout=True).same_image is not None


def test_sequences_hold_every_token_once_and_one_image_each() -> None:
    mask = some_mask(7, 24)
    order, places, starts = groups.sort_tokens(mask, (28, 28), (14, 14))
    assert torch.equal(order.sort().values, torch.arange(28 * 28)) and (starts[0], starts[-1]) == (0, 28 * 28)
    source = reference.on_grid(mask, 28, 28).flatten()
    lengths = starts.diff().tolist()
    for number, (tokens, inside) in enumerate(zip(order.split(lengths), places.split(lengths), strict=True)):
        assert (source[tokens] == bool(number % 2)).all()
        rows, columns = tokens // 28, tokens % 28
        assert torch.equal(inside, rows % 14 * 14 + columns % 14)
        assert (rows // 14 * 2 + columns // 14 == number // 2).all()


def test_the_plain_way_of_the_benchmark_computes_the_same() -> None:
    module, mask, x = layer(14, torch.float64), some_mask(7, 24), torch.randn(2, 28, 28, DIM, dtype=torch.float64)
    ways = sides(module, (28, 28), mask)
    for name in BACKENDS:
        torch.testing.assert_close(ways[name](x), ways["plain"](x), rtol=0, atol=1e-12)


def test_another_mask_is_no_reason_to_compile_again() -> None:
    module, x = layer(14, torch.float32), torch.randn(1, 28, 28, DIM, requires_grad=True)
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
    torch._dynamo.reset()
    with torch._dynamo.config.patch(error_on_recompile=True):
        for masked in (24, 1, 49):
            sequences = groups.sort_tokens(some_mask(7, masked), (28, 28), (14, 14))
            out = compiled(x, groups.Groups(sequences, None))
            out.sum().backward()
            torch.testing.assert_close(out, module(x, groups.Groups(sequences, None)))
