"""What a run tells while it goes: a line in the console, metrics.jsonl, TensorBoard."""

import json
import logging
import math
import resource
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from mixmim_ds.checkpoints import write_whole
from mixmim_ds.train.distributed import World, mean_over_ranks

log = logging.getLogger("mixmim_ds")

# Dense bf16 and fp16 peaks of the data sheets, FLOP/s. A GPU that is not here gets no MFU rather than a wrong one.
PEAK_FLOPS = {
    "H100 80GB HBM3": 989e12, "H100 PCIe": 756e12, "H200": 989e12, "A100": 312e12, "B200": 2250e12, "L40S": 362e12,
}  # fmt: skip


def peak_flops(precision: str) -> float | None:
    """The most that this GPU can do per second in the precision, if known."""
    if precision == "fp32" or not torch.cuda.is_available():
        return None
    name = torch.cuda.get_device_name()
    return next((peak for known, peak in PEAK_FLOPS.items() if known in name), None)


def memory_gib() -> float:
    """The most memory held so far: of the GPU by PyTorch, or of the process where there is no GPU."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_reserved() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


class Metrics:
    """Measures and reports; between two reports it never waits for the device.

    Reported per log step: `loss` (of that step, over the whole global batch), `lr` and `grad_norm` (of that update,
    before clipping); and over the time since the last report `images_per_s` (all processes), `step_time_s`,
    `data_wait` (share of the time that the loop waited for data) and `mfu` (3 x forward FLOPs x images/s/GPU over the
    GPU's peak: the method's operations, recomputed ones not counted). A time spent saving is not counted. `bad_images`
    are the broken ones that any rank has met since step 0.

    Args:
        run_dir: rows and events of steps after `start` are dropped: a killed run left them and they come again.
        start: steps done so far.
        last: the step after which the run ends.
        flops_per_image: of a forward pass.
    """

    def __init__(
        self, run_dir: Path, world: World, start: int, last: int, global_batch: int,
        flops_per_image: int, precision: str,
    ) -> None:  # fmt: skip
        self.world, self.last, self.global_batch = world, last, global_batch
        self.flops_per_image, self.peak = flops_per_image, peak_flops(precision)
        self.path = run_dir / "metrics.jsonl"
        if world.first:
            _drop_after(self.path, start)
            self.board = SummaryWriter(str(run_dir / "tensorboard"), purge_step=start + 1)
        self.restart(start, 0.0)

    def restart(self, step: int, waited: float) -> None:
        """Measures time from here on."""
        self.since, self.began, self.waited = step, time.perf_counter(), waited

    def report(
        self, step: int, epoch: float, loss: Tensor, lr: float, grad_norm: Any, waited: float, bad_images: int
    ) -> None:
        """Writes one row; the only moment at which the host waits for the device.

        Args:
            loss: scalar on the device, this rank's mean over its micro-batches of the step.
            grad_norm: of the engine; None where it has none.
            waited: seconds waited for data so far.

        Raises:
            FloatingPointError: as `check`.
        """
        value = self.check(step, loss, grad_norm)
        steps, elapsed = step - self.since, time.perf_counter() - self.began
        images = steps * self.global_batch / elapsed
        mfu = self.peak and 3 * self.flops_per_image * images / self.world.size / self.peak
        row = {
            "step": step,
            "epoch": round(epoch, 4),
            "loss": value,
            "lr": lr,
            "grad_norm": None if grad_norm is None else float(grad_norm),
            "images_per_s": round(images, 2),
            "images_per_s_per_gpu": round(images / self.world.size, 2),
            "step_time_s": round(elapsed / steps, 5),
            "data_wait": round((waited - self.waited) / elapsed, 4),
            "mfu": mfu and round(mfu, 4),
            "memory_gib": round(memory_gib(), 3),
            "bad_images": bad_images,
        }
        if self.world.first:
            self._write(row)
        self.restart(step, waited)

    def check(self, step: int, loss: Tensor, grad_norm: Any) -> float:
        """The mean loss over the ranks, once it and the gradients are known to be finite; waits for the device.

        Raises:
            FloatingPointError: the loss of any rank or the gradient is not finite.
        """
        value = mean_over_ranks(self.world, loss.item())
        norm = 0.0 if grad_norm is None else float(grad_norm)
        if not (math.isfinite(value) and math.isfinite(norm)):
            raise FloatingPointError(
                f"step {step} has loss {value} and gradient norm {norm}; the last checkpoint is from before it."
            )
        return value

    def _write(self, row: dict[str, Any]) -> None:
        with self.path.open("a") as file:
            file.write(json.dumps(row) + "\n")
        for name, value in row.items():
            if name != "step" and value is not None:
                self.board.add_scalar(name, value, row["step"])
        log.info(self._line(row))

    def _line(self, row: dict[str, Any]) -> str:
        left = int((self.last - row["step"]) * row["step_time_s"])
        parts = [
            f"step {row['step']:,}/{self.last:,}",
            f"epoch {row['epoch']:.2f}",
            f"loss {row['loss']:.4f}",
            "" if row["grad_norm"] is None else f"gnorm {row['grad_norm']:.3f}",
            f"lr {row['lr']:.3g}",
            f"{row['images_per_s']:,.0f} img/s ({row['images_per_s_per_gpu']:,.0f}/process)",
            f"mfu {row['mfu']:.0%}" if row["mfu"] else "",
            f"data {row['data_wait']:.1%}",
            f"mem {row['memory_gib']:.1f} GiB",
            f"bad {row['bad_images']:,}" if row["bad_images"] else "",
            f"eta {left // 3600}h{left // 60 % 60:02d}m{left % 60:02d}s",
        ]
        return " | ".join(part for part in parts if part)

    def picture(self, step: int, pixels: Tensor, caption: str) -> None:
        """uint8 [3, H, W] into TensorBoard; call it on the first rank only."""
        self.board.add_image("reconstructions", pixels, step)
        self.board.add_text("reconstructions/columns", caption, step)

    def close(self) -> None:
        """Writes out what is buffered."""
        if self.world.first:
            self.board.close()


def _drop_after(path: Path, step: int) -> None:
    if path.exists():
        rows = [line for line in path.read_text().splitlines() if line.endswith("}")]
        kept = [line for line in rows if json.loads(line)["step"] <= step]
        write_whole(path, "".join(line + "\n" for line in kept))
