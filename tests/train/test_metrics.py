"""What a run tells of its speed. No GPU is needed: its name and its peak are made up."""

from pathlib import Path

import pytest
import torch
from launching import rows
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from mixmim_ds.train import metrics
from mixmim_ds.train.distributed import World


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H200", 989e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA A100 80GB PCIe", 312e12),
        ("NVIDIA H200 NVL", None),
        ("NVIDIA GB200", None),
        ("Tesla V100-SXM2-32GB", None),
    ],
)
def test_a_gpu_has_its_own_peak_or_none(name: str, peak: float | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics, "on_gpu", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: name)
    assert metrics.peak_flops("bf16") == metrics.peak_flops("fp16") == peak
    assert metrics.peak_flops("fp32") is None, "its peak is another one"


def test_rates_are_of_all_processes_and_mfu_is_of_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """4 steps of 64 images in 4 of 7 s, the others having gone into saving and judging: 64 images a second, 32 on each
    of 2 GPUs, 3 x 1 GFLOP each, of a peak of 1 TFLOP/s."""
    (tmp_path / "evaluations.jsonl").write_text('{"step": 6}\n{"step": 7}\n')
    now = [100.0]
    monkeypatch.setattr(metrics.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(metrics, "peak_flops", lambda precision: 1e12)
    monkeypatch.setattr(metrics, "on_first_rank", lambda world, function: function())  # the other rank is not there
    told = metrics.Metrics(tmp_path, World(0, 2, torch.device("cpu"), None), 6, 20, 64, 10**9, "bf16")
    assert told.evaluated == [{"step": 6}], "the others come again"
    now[0] = 107.0
    told.saved(1.0)
    told.scores(8, 0.4, {"top1": 0.5}, 2.0)
    told.report(10, 0.5, loss=0.25, lr=1e-3, grad_norm=None, waited=0.4, bad_images=0)
    told.saved(1.0)
    board = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [event.step for event in board.Scalars("loss")] == [10], "what comes before a checkpoint is not told again"
    told.close()
    (row,) = rows(tmp_path)
    assert (row["images_per_s"], row["images_per_s_per_gpu"], row["step_time_s"]) == (64, 32, 1)
    assert (row["data_wait"], row["save_time_s"], row["mfu"]) == (0.1, 1, 0.096)
