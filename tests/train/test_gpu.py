"""What only a GPU can show; skipped elsewhere."""

import itertools
from pathlib import Path

import pytest
import torch

from mixmim_ds.config import load_config
from mixmim_ds.data.loader import Share, open_loader
from mixmim_ds.models import MixMIM
from mixmim_ds.train.distributed import connect, disconnect
from mixmim_ds.train.engine import build_engine, set_lr

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available(),
        reason="no GPU: would train in bf16 and fp16, compiled or not, without a host sync between log steps",
    ),
]


@pytest.mark.parametrize("ds", ["zero1", "zero2"])
@pytest.mark.parametrize("options", [["precision=bf16"], ["precision=fp16"], ["precision=bf16", "compile=true"]])
def test_steps_lower_the_loss_and_never_wait_for_the_gpu(ds: str, options: list[str], tmp_path: Path) -> None:
    overrides = ["model=tiny", "data=synthetic", "train.global_batch=32", "train.micro_batch=16", f"ds={ds}", *options]
    config = load_config([f"run_dir={tmp_path}", *overrides])
    world = connect(timeout_s=300)
    try:
        model = MixMIM("mixmim_tiny", 128, decoder_dim=128, decoder_depth=2, decoder_num_heads=4)
        engine = build_engine(config, model, world)
        batches = open_loader(config, None, Share(0, 1, 2), world.device, cores=4).batches(0)
        losses = []
        for step in range(30):
            if step == 5:  # compiled and warm
                torch.cuda.set_sync_debug_mode("error")
            set_lr(engine, 1e-3)
            for batch in itertools.islice(batches, 2):
                loss, _ = engine(batch.images, batch.mask)
                engine.backward(loss)
                engine.step()
            losses.append(loss.detach())
        torch.cuda.set_sync_debug_mode("default")
        first, last = losses[0].item(), losses[-1].item()
        assert last < 0.9 * first, "the same images every step: the model learns them"
    finally:
        torch.cuda.set_sync_debug_mode("default")
        disconnect()
