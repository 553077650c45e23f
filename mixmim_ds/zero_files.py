"""What DeepSpeed's checkpoint files hold, read tensor by tensor: the fp32 masters in pieces, one file per process.

DeepSpeed's own `zero_to_fp32` joins everything in memory under ZeRO-1 and 2, and refuses the files of ZeRO-1 in bf16
with fp32 accumulation, which is what we train with. The layout, as stage_1_and_2.py, bf16_optimizer.py and stage3.py
write it: under ZeRO-1 and 2 the tensors of a parameter group follow each other in one vector, which is cut into equal
parts for the processes; under ZeRO-3 every tensor is cut into equal parts, and a process holds its parts in a row.
"""

import re
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


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


def read_masters(folder: Path) -> dict[str, Scattered]:
    """The fp32 parameters and the buffers in a checkpoint folder of any ZeRO stage, by name.

    The files are unpickled: read only those of our own runs.

    Raises:
        ValueError: files are missing, damaged or not DeepSpeed's.
    """
    try:
        state = _load(min(folder.glob("*model_states.pt"), key=_rank))
        files = sorted(folder.glob("*optim_states.pt"), key=_rank)
        ranks = [_load(file)["optimizer_state_dict"] for file in files]
        cut = _cut_by_tensor if "fp32_flat_groups" in ranks[0] else _cut_by_group
        masters = cut(ranks, state["param_shapes"])
        buffers = {name: state["module"][name] for name in state["buffer_names"]}
    except (OSError, ValueError, RuntimeError, KeyError, IndexError, EOFError) as error:
        raise ValueError(f"{folder} cannot be read as a checkpoint of DeepSpeed's: {error}.") from error
    return masters | {name: Scattered([buffer.flatten()], buffer.shape) for name, buffer in buffers.items()}


def _load(path: Path) -> dict[str, Any]:
    return torch.load(path, map_location="cpu", mmap=True, weights_only=False)


def _rank(path: Path) -> int:
    """The process that wrote a file: `[bf16_]zero_pp_rank_N_mp_rank_00_...`, or `mp_rank_00_...` for all."""
    number = re.search(r"pp_rank_(\d+)", path.name)
    return int(number[1]) if number else 0


def _cut_by_group(ranks: list[dict[str, Any]], groups: list[dict[str, torch.Size]]) -> dict[str, Scattered]:
    """ZeRO-1 and 2: each group's vector goes on from process to process."""
    found: dict[str, Scattered] = {}
    for number, shapes in enumerate(groups):
        vector = [rank["single_partition_of_fp32_groups"][number] for rank in ranks]
        # ZeRO-2 starts each tensor at a multiple of 16 bytes.
        paddings = ranks[0].get("param_alignment_paddings")
        gaps = paddings[number] if paddings else [0] * len(shapes)
        start = 0
        for (name, shape), gap in zip(shapes.items(), gaps, strict=True):
            found[name] = Scattered(_cut(vector, start, shape.numel()), shape)
            start += shape.numel() + gap
    return found


def _cut_by_tensor(ranks: list[dict[str, Any]], groups: list[dict[str, torch.Size]]) -> dict[str, Scattered]:
    """ZeRO-3: every process holds the same part of every tensor."""
    found: dict[str, Scattered] = {}
    start = 0
    for name, shape in ((name, shape) for shapes in groups for name, shape in shapes.items()):
        part = -(-shape.numel() // len(ranks))
        pieces = [piece for rank in ranks for piece in _cut(rank["fp32_flat_groups"], start, part)]
        found[name] = Scattered(pieces, shape)
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
