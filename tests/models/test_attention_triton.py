"""The Triton kernels against the operator in float64: in Triton's interpreter, and on a GPU where there is one."""

import os
import subprocess
import sys

import pytest
import torch
from timm.layers.pos_embed_rel import gen_relative_position_index

from mixmim_ds.models.grouped import grouped_attention, grouped_attention_backward
from mixmim_ds.models.groups import sort_tokens

# Window, grid, cells of the mask, masked cells, heads, channels of a head, images. The interpreter takes milliseconds
# for every operation on a tile, so the windows of real encoders come alone, with one head and image.
SMALL = [(4, 8, 2, 0, 2, 16, 2), (4, 8, 2, 1, 2, 16, 2), (4, 8, 2, 4, 2, 16, 2)]
REAL = [(7, 7, 7, 24, 2, 32, 2), (7, 7, 7, 49, 1, 32, 1), (14, 14, 7, 24, 1, 32, 1), (14, 14, 7, 1, 1, 32, 1)]
LARGE = [(12, 12, 12, 72, 1, 32, 1), (16, 16, 2, 1, 1, 32, 1), (24, 24, 12, 72, 1, 32, 1)]
# Relative errors in norm: fp32 has 24 bits, fp16 11, bf16 8, and weights are rounded to them between two products.
TOLERANCE = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 1e-2}
ON_A_GPU = [(14, 56, 7, 24, 4, 32, 8), (14, 28, 7, 24, 8, 32, 8), (14, 14, 7, 24, 16, 32, 8), (7, 7, 7, 24, 32, 32, 8)]


def errors(shape: tuple[int, ...], dtype: torch.dtype, device: str) -> dict[str, float]:
    """Relative errors of the kernels' result and gradients."""
    from mixmim_ds.models.attention_triton import attention, attention_backward

    window, grid, cells, masked, heads, dim, images = shape
    torch.manual_seed(0)
    mask = (torch.randperm(cells * cells) < masked).reshape(cells, cells)
    sequences = sort_tokens(mask, (grid, grid), (window, window))
    index, table = gen_relative_position_index((window, window)), torch.randn((2 * window - 1) ** 2, heads)
    qkv = torch.randn(images, grid * grid, 3 * heads * dim).to(dtype)
    grad = torch.randn(images, grid * grid, heads * dim).to(dtype)
    exact = (qkv.double(), table.double(), index, window, *sequences)
    result = grouped_attention(*exact)
    expected = (result[0], *grouped_attention_backward(grad.double(), *result, *exact))
    qkv, grad, table, index = (tensor.to(device) for tensor in (qkv, grad, table, index))
    given = (qkv, table, index, window, *(tensor.to(device) for tensor in sequences))
    result = attention(*given)
    found = (result[0], *attention_backward(grad, *result, *given))
    of_qkv = zip(found[1].chunk(3, -1), expected[1].chunk(3, -1), strict=True)
    pairs = [(found[0], expected[0]), *of_qkv, (found[2], expected[2])]
    norms = [((a.cpu().double() - b).norm() / b.norm()).item() for a, b in pairs]
    return dict(zip(("out", "q", "k", "v", "table"), norms, strict=True))


def check(shapes: list[tuple[int, ...]], dtype: torch.dtype, device: str) -> None:
    for shape in shapes:
        found = errors(shape, dtype, device)
        print(shape, dtype, {name: f"{error:.1e}" for name, error in found.items()})
        assert max(found.values()) < TOLERANCE[dtype], (shape, found)


@pytest.mark.slow
@pytest.mark.parametrize("case", ["SMALL", "REAL", "LARGE", "HALF"])
def test_in_the_interpreter(case: str) -> None:
    """In a process of its own: Triton reads the variable when a kernel is defined."""
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    subprocess.run([sys.executable, __file__, case], check=True, env=environment, timeout=280)


@pytest.mark.gpu
@pytest.mark.skipif(
    not torch.cuda.is_available(),
    reason="no GPU: would compare the compiled kernels with float64, in every precision, for base's stages and 384",
)
@pytest.mark.parametrize("shape", ON_A_GPU + SMALL + REAL + LARGE)
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_on_a_gpu(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    check([shape], dtype, "cuda")


@pytest.mark.parametrize(
    ("heads", "dtype", "sentence"), [(2, torch.float32, "not of 24"), (3, torch.float64, "float64")]
)
def test_what_the_kernels_cannot_do_is_one_sentence(heads: int, dtype: torch.dtype, sentence: str) -> None:
    from mixmim_ds.models.attention_triton import attention

    qkv, table = torch.randn(1, 16, 144, dtype=dtype), torch.randn(49, heads)
    with pytest.raises(ValueError, match=sentence):
        attention(
            qkv, table, gen_relative_position_index((4, 4)), 4, *sort_tokens(torch.ones(1, 1) > 0, (4, 4), (4, 4))
        )


if __name__ == "__main__":
    # The interpreter multiplies the bits of bf16 as if they were integers; fp16 stands for both.
    if sys.argv[1] == "HALF":
        check(SMALL[1:2] + REAL[2:], torch.float16, "cpu")
    else:
        check(globals()[sys.argv[1]], torch.float32, "cpu")
