"""Writing an export: tensor by tensor, and read back."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

import torch
from safetensors import safe_open
from torch import Tensor
from tqdm import tqdm

DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.int64: "I64"}


class Pieces(Protocol):
    """A tensor that may yet have to be put together."""

    @property
    def shape(self) -> torch.Size:
        """Known without putting it together, as is the type."""

    @property
    def dtype(self) -> torch.dtype:
        """Of the elements."""

    def contiguous(self) -> Tensor:
        """The whole tensor."""


def write_safetensors(
    path: Path, tensors: Mapping[str, Pieces], dtype: torch.dtype, notes: Mapping[str, str] | None = None
) -> None:
    """Writes a safetensors file with one tensor in memory at a time, then reads every one back and compares.

    The library's own writer wants all of them at once, in memory twice (format: the safetensors README).

    Args:
        dtype: of the floating-point tensors in the file, float32 or bfloat16.
        notes: words that the file is to hold beside the tensors, by name.

    Raises:
        OSError: the disk is full, or gave back something else than was written.
    """
    dtypes = {name: dtype if tensor.dtype.is_floating_point else tensor.dtype for name, tensor in tensors.items()}
    with path.open("wb") as file:
        file.write(_header(tensors, dtypes, notes or {}))
        for name, tensor in tqdm(tensors.items(), desc=path.name, unit=" tensors", disable=None):
            tensor.contiguous().to(dtypes[name]).flatten().view(torch.uint8).numpy().tofile(file)
    for name, tensor in tensors.items():
        with safe_open(path, framework="pt") as written:  # anew each time, or what was read stays in memory
            same = torch.equal(written.get_tensor(name), tensor.contiguous().to(dtypes[name]))
        if not same:
            raise OSError(f"{path.name} gives back another {name} than was written, the disk is at fault")


def _header(tensors: Mapping[str, Pieces], dtypes: Mapping[str, torch.dtype], notes: Mapping[str, str]) -> bytes:
    """Where every tensor lies, behind its own length; padded, as the format asks, to a multiple of 8 bytes."""
    entries: dict[str, object] = {"__metadata__": {"format": "pt", **notes}}
    end = 0
    for name, tensor in tensors.items():
        start, end = end, end + tensor.shape.numel() * dtypes[name].itemsize
        entries[name] = {"dtype": DTYPES[dtypes[name]], "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(entries).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text
