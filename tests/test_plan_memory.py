"""The planner's activations and peaks against what autograd and a GPU keep."""

import gc
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from mixmim_ds.compose import load_config
from mixmim_ds.device import DTYPES
from mixmim_ds.models import MixMIM, blocks, build_model
from mixmim_ds.models.groups import Groups, pair_mask, sort_tokens
from mixmim_ds.plan_memory import MODES, Ledger, activations, attention_of_cuda, count, model_on_meta, states

TINY = load_config(["run_dir=UNUSED", "model=tiny", "data=synthetic"]).model


def saved_by_autograd(model: MixMIM, images: Tensor) -> int:
    """Bytes of the storages that pass the hooks of saved tensors in a forward pass, weights and buffers aside, and of
    what the loop itself holds: images, prediction and loss."""
    weights = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss, prediction = model(images, torch.zeros(model.grid, dtype=torch.bool))
    return sum(kept.values()) + images.nbytes + prediction.nbytes + loss.nbytes


def planned_and_real(precision: str, mode: str) -> tuple[MixMIM, MixMIM]:
    planned, real = model_on_meta(TINY, precision), build_model(TINY)
    for parameter in real.parameters():
        parameter.data = parameter.data.to(DTYPES[precision])
    for model in (planned, real):
        model.set_grad_checkpointing(mode != "none", selective=mode == "selective")
    return planned, real


@pytest.fixture
def masked_pairs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Attention that works alike on the CPU and on the meta device, by PyTorch's operators alone."""
    monkeypatch.setattr(
        blocks, "group_tokens", lambda mask, grid, window, _: Groups(None, pair_mask(mask, grid, window))
    )


# In bf16 layer norms on the CPU keep their statistics in bf16, on the meta device and on CUDA in fp32.
@pytest.mark.parametrize(("precision", "tolerance"), [("fp32", 0.0), ("bf16", 1e-2)])
@pytest.mark.parametrize("mode", ["none", "full"])
def test_activations_are_what_autograd_saves(precision: str, tolerance: float, mode: str, masked_pairs: None) -> None:
    planned, real = planned_and_real(precision, mode)
    with sdpa_kernel(SDPBackend.MATH):
        saved = saved_by_autograd(real, torch.randn(6, 3, 128, 128))
    if mode == "full":  # the masks are in a tuple, which checkpointing keeps without asking the hooks
        saved += sum(s.grid[0] * s.grid[1] * s.window[0] * s.window[1] for s in real.encoder.layers)
    assert count(planned, 6)[0] == pytest.approx(saved, rel=tolerance, abs=0)


def test_selective_checkpointing_is_counted_though_hooks_do_not_see_it(masked_pairs: None) -> None:
    planned, real = planned_and_real("fp32", "selective")
    with sdpa_kernel(SDPBackend.MATH):
        assert count(planned, 2) == count(real, 2)


@pytest.mark.parametrize("mode", ["none", "full"])
def test_attention_on_cuda_keeps_a_number_for_every_query_and_head(mode: str) -> None:
    (planned, real), mask = planned_and_real("fp32", mode), torch.zeros(4, 4, dtype=torch.bool)
    with sdpa_kernel(SDPBackend.MATH):
        saved = saved_by_autograd(real, torch.randn(6, 3, 128, 128))
    if mode == "full":  # groups are in a tuple, which checkpointing keeps without asking the hooks
        saved += sum(t.nbytes for s in real.encoder.layers for t in sort_tokens(mask, s.grid, s.window))
    else:
        stages = real.encoder.layers
        saved += sum(4 * 6 * s.grid[0] * s.grid[1] * block.attn.num_heads for s in stages for block in s.blocks)
    assert count(planned, 6)[0] == saved


@pytest.mark.parametrize("mode", MODES)
def test_peaks_lie_on_a_line(mode: str) -> None:
    model = model_on_meta(TINY, "bf16")
    with attention_of_cuda():
        line = activations(model, mode)
        for batch in (32, 100, 256):
            assert line.of(batch) == pytest.approx(count(model, batch)[1], rel=1e-2)


def test_attention_of_cuda_does_not_keep_the_matrix_of_weights() -> None:
    model = model_on_meta(replace(TINY, img_size=224), "bf16")
    plain = count(model, 16)[0]
    with attention_of_cuda():
        fused, _ = count(model, 16)
    depth, heads, cells = len(model.decoder_blocks), model.decoder_blocks[0].attn.num_heads, 7 * 7
    # Softmax of the decoder's plain one, in bf16: each cell's weights over all of them, for two sequences an image.
    assert plain - fused > 0.9 * depth * heads * 2 * 16 * 2 * cells**2


def test_a_ledger_forgets_what_is_let_go() -> None:
    with Ledger([]) as ledger:
        first = torch.zeros(1000)
        view = first[:10]
        second = first + 1
        assert (ledger.now, ledger.peak) == (8000, 8000)
        del first, second
        assert ledger.now == 4000 and view.numel() == 10, "the view keeps the storage"
        del view
        assert (ledger.now, ledger.peak) == (0, 8000)


@pytest.mark.gpu
@pytest.mark.skipif(
    not torch.cuda.is_available(),
    reason="no GPU: would compare the peak planned for base in bf16 with torch.cuda.max_memory_allocated, in each mode",
)
@pytest.mark.parametrize("mode", MODES)
def test_peaks_of_a_gpu_are_as_planned(mode: str, tmp_path: Path) -> None:
    from mixmim_ds.train.distributed import connect, disconnect
    from mixmim_ds.train.engine import build_engine

    config = load_config([
        f"run_dir={tmp_path}", "model=base", "data=synthetic", "train.global_batch=128", "train.micro_batch=64",
        f"activation_checkpointing={mode}",
    ])  # fmt: skip
    planned = model_on_meta(config.model, config.precision)
    with attention_of_cuda():
        line = activations(planned, mode)
    world = connect(timeout_s=300)
    try:
        gc.collect()
        before = torch.cuda.memory_allocated()  # engines of other tests, which DeepSpeed never frees
        engine = build_engine(config, build_model(config.model), world)
        torch.cuda.reset_peak_memory_stats()
        for _ in range(4):  # two steps
            images = torch.randn(64, 3, 224, 224, device=world.device)
            loss, _ = engine(images, torch.zeros(engine.module.grid, dtype=torch.bool, device=world.device))
            engine.backward(loss)
            engine.step()
        peak = torch.cuda.max_memory_allocated() - before
    finally:
        disconnect()
    # Kernels' work space and rounding to 512 bytes come on top, what autograd saves in other types goes either way.
    expected = states([p.numel() for p in planned.parameters()], config, 1).total(line.of(64))
    assert peak == pytest.approx(expected, rel=0.1)
