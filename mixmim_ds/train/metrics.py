"""What a run tells while it goes: a line in the console, metrics.jsonl, TensorBoard."""

import logging
import math
import re
import resource
import time
from pathlib import Path
from typing import Any

import torch

from mixmim_ds.device import on_gpu
from mixmim_ds.evaluate.pictures import Picture
from mixmim_ds.json_lines import JsonLines, Row
from mixmim_ds.train.board import Board
from mixmim_ds.train.distributed import World, on_first_rank

log = logging.getLogger("mixmim_ds")

# Dense bf16 and fp16 peaks of the data sheets, FLOP/s.
PEAK_FLOPS = {
    "H100 80GB HBM3": 989e12, "H100 PCIe": 756e12, "H200": 989e12, "A100": 312e12, "B200": 2250e12, "L40S": 362e12,
}  # fmt: skip


def peak_flops(precision: str) -> float | None:
    """The most that this GPU can do per second in the precision; None rather than that of one with a similar name."""
    if precision == "fp32" or not on_gpu():
        return None
    name = torch.cuda.get_device_name().removeprefix("NVIDIA ")
    return PEAK_FLOPS.get("A100" if re.match("A100[ -]", name) else name)  # which say their memory and form, too


def memory_gib() -> float:
    """The most memory held so far: of the GPU by PyTorch, or of the process where there is no GPU."""
    if on_gpu():
        return torch.cuda.max_memory_reserved() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


class Metrics:
    """Measures and reports; between two reports it never waits for the device.

    Reported per log step: `loss` (of that step, over the whole global batch; null if not finite), `lr` and `grad_norm`
    (of that update, before clipping); over the time since the last report `images_per_s` (all processes),
    `images_per_s_per_gpu`, `step_time_s`, `data_wait` (share of the time that the loop waited for data), `mfu` (3 x
    forward FLOPs x images/s/GPU over the GPU's peak: the method's operations, recomputed ones not counted) and
    `save_time_s`, which is in none of the others; since the start `memory_gib` (the most, of this process's GPU); and
    `bad_images`, the broken ones that any rank has met since step 0.

    Evaluations have a file of their own, see `scores`.

    While the disk is full or read-only the run goes on: rows are kept and written later, TensorBoard lacks them.

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
        self.rows, self.evaluations = JsonLines(run_dir / "metrics.jsonl"), JsonLines(run_dir / "evaluations.jsonl")
        self.save_time_s = 0.0
        self.evaluated = on_first_rank(world, lambda: self._earlier(start))
        if world.first:
            self.board = Board(run_dir / "tensorboard", start)
        self._restart(start, 0.0)

    def _earlier(self, start: int) -> list[Row]:
        """The evaluations of earlier starts; what these reported of steps that come again is dropped."""
        self.rows.load(lambda row: row["step"] <= start)
        return self.evaluations.load(lambda row: row["step"] <= start)

    def options(self, options: dict[str, Any]) -> None:
        """Tells TensorBoard what the run is, nested options by name."""
        if self.world.first:
            self.board.options(options)

    def _restart(self, step: int, waited: float) -> None:
        """Measures time from here on."""
        self.since, self.began, self.waited = step, time.perf_counter(), waited

    def pause(self, seconds: float) -> None:
        """Takes time out of what is measured."""
        self.began += seconds

    def saved(self, seconds: float) -> None:
        """Takes the time that saving took out of what is measured, to report it by itself; and TensorBoard gets what a
        resumed run will not tell again."""
        self.pause(seconds)
        self.save_time_s += seconds
        if self.world.first:
            self.board.flush()

    def report(
        self, step: int, epoch: float, loss: float, lr: float, grad_norm: Any, waited: float, bad_images: int
    ) -> None:
        """Writes one row.

        Args:
            loss: mean over the ranks.
            grad_norm: of the engine; None where it has none.
            waited: seconds waited for data so far.
        """
        steps, elapsed = step - self.since, time.perf_counter() - self.began
        images = steps * self.global_batch / elapsed
        mfu = self.peak and 3 * self.flops_per_image * images / self.world.size / self.peak
        row = {
            "step": step,
            "epoch": round(epoch, 4),
            "loss": _finite(loss),
            "lr": lr,
            "grad_norm": None if grad_norm is None else _finite(float(grad_norm)),
            "images_per_s": round(images, 2),
            "images_per_s_per_gpu": round(images / self.world.size, 2),
            "step_time_s": round(elapsed / steps, 5),
            "data_wait": round((waited - self.waited) / elapsed, 4),
            "mfu": mfu and round(mfu, 4),
            "memory_gib": round(memory_gib(), 3),
            "save_time_s": round(self.save_time_s, 3),
            "bad_images": bad_images,
        }
        if self.world.first:
            self._write(row)
        self.save_time_s = 0.0
        self._restart(step, waited)

    def _write(self, row: dict[str, Any]) -> None:
        log.info(self._line(row))
        self.rows.add(row)
        scalars = {name: value for name, value in row.items() if name != "step" and value is not None}
        self.board.scalars(scalars, row["step"])

    def _line(self, row: dict[str, Any]) -> str:
        left = int((self.last - row["step"]) * row["step_time_s"])
        parts = [
            f"step {row['step']:,}/{self.last:,}",
            f"epoch {row['epoch']:.2f}",
            "loss not finite" if row["loss"] is None else f"loss {row['loss']:.4f}",
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

    def scores(self, step: int, epoch: float, scores: dict[str, float], seconds: float) -> None:
        """Writes what a checkpoint was judged to be worth, and takes the time of it out of what is measured.

        A row of evaluations.jsonl is step, epoch, the scores, and eval_time_s.
        """
        self.pause(seconds)
        if not self.world.first:
            return
        row = {"step": step, "epoch": round(epoch, 4)} | scores | {"eval_time_s": round(seconds, 3)}
        self.evaluated.append(row)
        self.evaluations.add(row)
        log.info("step %s | %s", f"{step:,}", " | ".join(f"{name} {value:.4g}" for name, value in scores.items()))
        self.board.scalars({f"evaluation/{name}": value for name, value in scores.items()}, step)

    def picture(self, step: int, picture: Picture) -> None:
        """A picture into TensorBoard; call it on the first rank only."""
        self.board.picture(step, picture)

    def close(self) -> None:
        """Writes out what is buffered."""
        if self.world.first:
            self.board.close(finished=self.since == self.last)


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
