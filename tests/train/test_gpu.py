"""What only a GPU can show; skipped elsewhere."""

import gzip
import json
import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from launching import rows, run
from overscaled import OVERSCALED

from mixmim_ds.checkpoints import newest_complete
from mixmim_ds.compose import load_config
from mixmim_ds.data.loader import Share, open_loader
from mixmim_ds.models import MixMIM
from mixmim_ds.train.distributed import connect, disconnect
from mixmim_ds.train.engine import build_engine, set_lr
from mixmim_ds.zero_files import read_saved

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available(),
        reason="no GPU: would train in bf16 and fp16, compiled or not, without a host sync in passes, go on in fp16 "
        "with its loss scale, fine-tune with all augmentation, compiled or not, twice alike, and trace kernels "
        "and memory",
    ),
]


@contextmanager
def no_waiting(allowed: bool) -> Iterator[None]:
    """An error if the host waits for the GPU."""
    torch.cuda.set_sync_debug_mode("default" if allowed else "error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("ds", ["zero1", "zero2"])
@pytest.mark.parametrize("options", [["precision=bf16"], ["precision=fp16"], ["precision=bf16", "compile=true"]])
def test_steps_lower_the_loss_and_the_passes_never_wait(ds: str, options: list[str], tmp_path: Path) -> None:
    """DeepSpeed's update alone waits: it looks whether the gradients' norm is finite."""
    overrides = ["model=tiny", "data=synthetic", "train.global_batch=32", "train.micro_batch=16", f"ds={ds}", *options]
    config = load_config([f"run_dir={tmp_path}", *overrides])
    world = connect(timeout_s=300)
    try:
        model = MixMIM("mixmim_tiny", 128, decoder_dim=128, decoder_depth=2, decoder_num_heads=4)
        engine = build_engine(config, model, world)
        batches = open_loader(config, None, Share(0, 1, 2), world.device, cores=4).batches(0)
        losses = []
        for step in range(30):
            warm = step < 5  # compiling
            set_lr(engine, 1e-3)
            for _ in range(2):
                with no_waiting(allowed=warm):
                    batch = next(batches)
                    loss, _ = engine(batch.images, batch.mask)
                    engine.backward(loss)
                engine.step()
            losses.append(loss.detach())
        # noise, the same every step: on a CPU the model has learned 8 to 9 % of it by then
        assert losses[-1].item() < 0.95 * losses[0].item()
    finally:
        disconnect()


def test_fp16_goes_on_with_its_loss_scale(tmp_path: Path) -> None:
    """A new run's scale starts too high (tests/overscaled.py): some steps lower it, and they must not come again."""
    options = ["model=tiny", "data=synthetic", "precision=fp16", "train.global_batch=32", "train.micro_batch=32"]
    scalers = []
    for folder, ends in (("straight", [12]), ("broken", [6, 12])):
        for steps in ends:
            words = [*options, f"run_dir={tmp_path / folder}", f"train.max_steps={steps}"]
            run("python", *words, script="tests/overscaled.py")
        newest = newest_complete(tmp_path / folder)
        assert newest is not None
        scalers.append(read_saved(newest.path).loss_scaler)
    assert scalers[0] is not None and vars(scalers[0]) == vars(scalers[1])
    assert scalers[0].cur_scale < OVERSCALED


@pytest.mark.parametrize("compiled", ["compile=false", "compile=true"])
def test_fine_tuning_with_all_augmentation_gives_the_same_twice(compiled: str, labelled: Path, tmp_path: Path) -> None:
    """RandAugment in its processes beside a GPU that decodes, erasing and mixing on it; judged in half precision."""
    options = [
        "model=tiny", "model.img_size=64", f"data.root={labelled}", f"data.index_dir={tmp_path / 'index'}",
        "init=random", "train.global_batch=32", "train.micro_batch=32", "train.epochs=3", "train.log_every=1",
        "optim.warmup_epochs=0", "optim.base_lr=8e-3", "augment.workers=2", compiled,
    ]  # fmt: skip
    losses, scores = [], []
    for name in ("once", "again"):
        run("python", *options, f"run_dir={tmp_path / name}", script="launch/finetune.py")
        losses.append([row["loss"] for row in rows(tmp_path / name)])
        judged = (tmp_path / name / "evaluations.jsonl").read_text().splitlines()
        scores.append([json.loads(line)["top1"] for line in judged])
    # atomics sum gradients in any order: an image that came another way would show at once, in the first loss
    assert losses[0][0] == pytest.approx(losses[1][0], rel=1e-3) and losses[0] == pytest.approx(losses[1], rel=0.02)
    assert len(scores[0]) == 3 and scores[0][-1] == pytest.approx(scores[1][-1], abs=0.05) and scores[0][-1] > 2 / 13


def test_a_trace_has_kernels_and_a_snapshot_of_memory(tmp_path: Path) -> None:
    options = ["model=tiny", "data=synthetic", "train.global_batch=32", "train.micro_batch=16", "train.max_steps=4"]
    run("python", *options, f"run_dir={tmp_path}", "train.profile=[3,4]", processes=1)
    stem = tmp_path / "profile" / "steps_3-4.rank_0"
    with gzip.open(f"{stem}.trace.json.gz") as file:
        kernels = [event["name"] for event in json.load(file)["traceEvents"] if event.get("cat") == "kernel"]
    assert kernels.count("_forward") == 4 * 7, "of attention, for each pass and block"
    with open(f"{stem}.memory.pickle", "rb") as file:
        snapshot = pickle.load(file)
    assert snapshot["segments"] and any(event["action"] == "alloc" for event in snapshot["device_traces"][0])
