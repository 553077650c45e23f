"""What DeepSpeed's checkpoint files hold, read tensor by tensor: masters and Adam's moments, one file per process.

DeepSpeed's own readers join everything in memory, refuse the files of ZeRO-1 in bf16 with fp32 accumulation (which we
train with), want the same number of processes and the same stage, or run whatever code a file holds. The layout, as
stage_1_and_2.py, bf16_optimizer.py and stage3.py write it: under ZeRO-1 and 2 the tensors of a parameter group follow
each other in one vector, which is cut into equal parts for the processes; under ZeRO-3 every tensor is cut into equal
parts, and a process holds its parts in a row.
"""

import pickle
import re
from dataclasses import dataclass
from itertools import accumulate, repeat
from pathlib import Path
from typing import Any

import torch
from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
from deepspeed.runtime.zero.config import ZeroStageEnum
from deepspeed.utils.tensor_fragment import fragment_address
from torch import Tensor

MOMENTS = ("exp_avg", "exp_avg_sq")
AVERAGE = "average"  # of the weights, kept beside the moments by runs with optim.ema_decay
# What DeepSpeed's files hold beside tensors; a file that asks for anything else is not read.
HARMLESS = [DynamicLossScaler, LossScaler, ZeroStageEnum, fragment_address]
Shapes = list[dict[str, torch.Size]]  # of the parameters, by group


@dataclass(frozen=True)
class Scattered:
    """A tensor in pieces that lie in memory-mapped files."""

    pieces: list[Tensor]  # 1-D; the last may be padded
    shape: torch.Size

    @property
    def dtype(self) -> torch.dtype:
        """That of the pieces."""
        return self.pieces[0].dtype

    def contiguous(self) -> Tensor:
        """The whole tensor, read now."""
        return torch.cat(self.pieces)[: self.shape.numel()].view(self.shape)


@dataclass(frozen=True)
class Saved:
    """The state of a run, by the parameters' names."""

    masters: dict[str, Scattered]  # fp32 parameters
    moments: dict[str, dict[str, Scattered]]  # Adam's and perhaps AVERAGE, by key; none before the first update
    updates: int  # that Adam has counted
    buffers: dict[str, Scattered]
    loss_scaler: DynamicLossScaler | None  # of fp16: the scale, and how many steps ago it changed

    @property
    def weights(self) -> dict[str, Scattered]:
        """Masters and buffers, which are the model's state_dict."""
        return self.masters | self.buffers

    @property
    def averaged(self) -> dict[str, Scattered]:
        """As `weights`, with the average of the masters in their place if there is one."""
        return self.moments.get(AVERAGE, self.masters) | self.buffers


def read_saved(folder: Path) -> Saved:
    """The state in a checkpoint folder of any ZeRO stage and number of processes; a tensor is read when asked for.

    Raises:
        ValueError: files are missing, damaged or not DeepSpeed's.
    """
    try:
        state = _load(min(folder.glob("*model_states.pt"), key=_rank))
        ranks = [_load(file)["optimizer_state_dict"] for file in sorted(folder.glob("*optim_states.pt"), key=_rank)]
        by_tensor = "fp32_flat_groups" in ranks[0]
        vectors = [rank["fp32_flat_groups" if by_tensor else "single_partition_of_fp32_groups"] for rank in ranks]
        adam = [rank["optimizer_state_dict" if by_tensor else "base_optimizer_state"]["state"] for rank in ranks]
        cut = _cut_by_tensor if by_tensor else _cut_by_group
        first = adam[0].get(0, {})  # of the first vector; there is none before the first update
        shapes, gaps = state["param_shapes"], ranks[0].get("param_alignment_paddings")
        masters = cut(vectors, shapes, gaps)
        moments = {
            key: cut([[group[key] for _, group in sorted(groups.items())] for groups in adam], shapes, gaps)
            for key in (*MOMENTS, AVERAGE)
            if key in first
        }
        buffers = {name: state["module"][name] for name in state["buffer_names"]}
        scaler = ranks[0].get("loss_scaler")
    except (OSError, ValueError, RuntimeError, KeyError, IndexError, EOFError, pickle.UnpicklingError) as error:
        # Of PyTorch's paragraphs about a file that asks for code, which advise to run it, the one phrase that says so.
        reason = (str(error).partition("WeightsUnpickler error: ")[2] or str(error)).partition("\n")[0]
        reason = reason.partition(". Please use")[0].rstrip(".")
        raise ValueError(f"{folder} cannot be read as a checkpoint of DeepSpeed's: {reason}.") from error
    scattered = {name: Scattered([buffer.flatten()], buffer.shape) for name, buffer in buffers.items()}
    dynamic = scaler if isinstance(scaler, DynamicLossScaler) else None
    return Saved(masters, moments, int(first.get("step", 0)), scattered, dynamic)


def _load(path: Path) -> dict[str, Any]:
    with torch.serialization.safe_globals(HARMLESS):
        return torch.load(path, map_location="cpu", mmap=True, weights_only=True)


def _rank(path: Path) -> int:
    """The process that wrote a file: `[bf16_]zero_pp_rank_N_mp_rank_00_...`, or `mp_rank_00_...` for all."""
    number = re.search(r"pp_rank_(\d+)", path.name)
    return int(number[1]) if number else 0


def _cut_by_group(ranks: list[list[Tensor]], groups: Shapes, paddings: list[list[int]] | None) -> dict[str, Scattered]:
    """ZeRO-1 and 2: each group's vector goes on from process to process."""
    found: dict[str, Scattered] = {}
    for number, shapes in enumerate(groups):
        vector = [rank[number] for rank in ranks]
        start = 0
        # With `parameter_alignment` each tensor starts at a multiple of 16 bytes.
        for (name, shape), gap in zip(shapes.items(), paddings[number] if paddings else repeat(0), strict=False):
            found[name] = Scattered(_cut(vector, start, shape.numel()), shape)
            start += shape.numel() + gap
    return found


def _cut_by_tensor(ranks: list[list[Tensor]], groups: Shapes, paddings: None) -> dict[str, Scattered]:
    """ZeRO-3: every process holds the same part of every tensor."""
    found: dict[str, Scattered] = {}
    start = 0
    for name, shape in ((name, shape) for shapes in groups for name, shape in shapes.items()):
        part = -(-shape.numel() // len(ranks))
        found[name] = Scattered([piece for rank in ranks for piece in _cut(rank, start, part)], shape)
        start += part
    return found


def _cut(vectors: list[Tensor], start: int, length: int) -> list[Tensor]:
    """Elements start .. start + length of 1-D tensors in a row, as views. ValueError if the tensors end before."""
    pieces = []
    for begin, vector in zip(accumulate((v.numel() for v in vectors), initial=0), vectors, strict=False):
        piece = vector[max(start - begin, 0) : max(start + length - begin, 0)]
        if piece.numel():
            pieces.append(piece)
    if sum(piece.numel() for piece in pieces) != length:
        raise ValueError("its tensors are shorter than its shapes say")
    return pieces
