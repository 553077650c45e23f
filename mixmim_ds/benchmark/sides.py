"""Who can train: the project's engine, and an ordinary loop of PyTorch."""

from collections.abc import Iterator
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_

from mixmim_ds.benchmark.timing import Marks
from mixmim_ds.config import PretrainConfig
from mixmim_ds.data.loader import MicroBatch
from mixmim_ds.device import DTYPES
from mixmim_ds.models import MixMIM
from mixmim_ds.train.distributed import World
from mixmim_ds.train.engine import build_engine
from mixmim_ds.train.optim import adamw

PHASES = ("data", "forward", "backward", "optimizer")


class Side(Protocol):
    """One who trains, a phase at a time."""

    def forward(self, batch: MicroBatch) -> Tensor:
        """The loss."""

    def backward(self, loss: Tensor) -> None:
        """Its gradients."""

    def update(self) -> None:
        """The optimizer's step, if the accumulation is complete."""


class Ours:
    """The engine as the run has it."""

    def __init__(self, config: PretrainConfig, model: MixMIM, world: World) -> None:
        self.engine = build_engine(config, model, world)

    def forward(self, batch: MicroBatch) -> Tensor:
        """See `Side`."""
        return self.engine(batch.images, batch.mask)[0]

    def backward(self, loss: Tensor) -> None:
        """See `Side`."""
        self.engine.backward(loss)

    def update(self) -> None:
        """See `Side`."""
        self.engine.step()


class Loop:
    """A model with fp32 weights under torch.autocast, as the authors train, with the same fused AdamW; without
    accumulation, in one process; fp16 with PyTorch's loss scaler."""

    def __init__(self, config: PretrainConfig, model: nn.Module, device: torch.device) -> None:
        self.device, self.clip = device, config.optim.clip_grad
        self.model = model.to(device)
        self.dtype = DTYPES[config.precision]
        self.scaler = torch.amp.GradScaler(device.type, enabled=self.dtype is torch.float16)
        self.optimizer = adamw(self.model, config.optim)

    def forward(self, batch: MicroBatch) -> Tensor:
        """See `Side`."""
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype is not torch.float32):
            return self.model(batch.images, batch.mask)[0]

    def backward(self, loss: Tensor) -> None:
        """See `Side`."""
        self.scaler.scale(loss).backward()

    def update(self) -> None:
        """See `Side`."""
        if self.clip:
            self.scaler.unscale_(self.optimizer)
            clip_grad_norm_(self.model.parameters(), self.clip)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()


def train_step(side: Side, batches: Iterator[MicroBatch], turns: int, marks: Marks) -> None:
    """One step of `turns` micro-batches, with a mark before each of PHASES; one more is due after the last step."""
    for _ in range(turns):
        marks.mark()
        batch = next(batches)
        marks.mark()
        loss = side.forward(batch)
        marks.mark()
        side.backward(loss)
        marks.mark()
        side.update()


def time_steps(
    side: Side, batches: Iterator[MicroBatch], turns: int, steps: int, device: torch.device
) -> dict[str, float]:
    """Seconds of a step, the mean of so many, in all and by phase; on a GPU also the GiB that a step takes beyond what
    is held between steps."""
    on_gpu, marks = device.type == "cuda", Marks(device)
    if on_gpu:
        # The host must not have run ahead: what it launches for one side would hide behind the other's computing.
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        held = torch.cuda.memory_allocated()
    for _ in range(steps):
        train_step(side, batches, turns, marks)
    marks.mark()
    times = marks.intervals()
    seconds = {f"{phase}_s": sum(times[number :: len(PHASES)]) / steps for number, phase in enumerate(PHASES)}
    row = {"step_s": sum(times) / steps} | seconds
    return row | ({"step_memory_gib": (torch.cuda.max_memory_allocated() - held) / 2**30} if on_gpu else {})
