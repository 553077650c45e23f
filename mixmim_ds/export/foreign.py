"""Checkpoints of other programs, read without running anything that they hold."""

import re
import zipfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

# What the authors' code and mmengine pickle beside the weights (options, logs, paths), under the names of old and new
# versions of numpy and Python.
BESIDE_WEIGHTS = (
    "argparse.Namespace",
    "mmengine.config.config.ConfigDict",
    "mmengine.logging.history_buffer.HistoryBuffer",
    "numpy.core.multiarray._reconstruct",
    "numpy.core.multiarray.scalar",
    "numpy._core.multiarray._reconstruct",
    "numpy._core.multiarray.scalar",
    "numpy.dtype",
    "numpy.ndarray",
    "pathlib.PosixPath",
    "pathlib._local.PosixPath",
)


class Placeholder:
    """Stands where a file holds an object that is not needed: takes whatever it is made of and keeps nothing.

    So no code but this runs for the names in BESIDE_WEIGHTS, and none of their packages has to be installed.
    """

    def __new__(cls, *args: object) -> "Placeholder":
        return super().__new__(cls)

    def __setstate__(self, state: object) -> None:
        pass


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The model's tensors in a file, by their names there, on the CPU.

    Reads safetensors and what torch.save wrote: a state dict, or a dict that holds one as `model` (the authors) or
    `state_dict` (OpenMMLab). Files of PyTorch's zip format are mapped, so tensors take memory when they are used.

    Raises:
        ValueError: there is no such file, it is damaged, it wants code to be run, or it holds no state dict.
    """
    if not path.is_file():
        raise ValueError(f"{path} is no file; give the path of a checkpoint.")
    try:
        content = _read(path)
    except Exception as error:  # there is no telling what damaged bytes make an unpickler raise
        code = re.search(r"GLOBAL (\S+)", str(error))
        if code:
            raise ValueError(
                f"{path} is refused because it wants {code[1]} to be called, which weights do not need; "
                "save the model's state_dict alone with the program that wrote it."
            ) from error
        # Around the reason PyTorch puts advice, such as to load the file without safeguards.
        reason = re.split(r"\. |\n", str(error).rpartition("WeightsUnpickler error: ")[2])[0] or type(error).__name__
        raise ValueError(f"{path} cannot be read as a checkpoint ({reason}); fetch or write it again.") from error
    return _state_dict(path, content)


def _read(path: Path) -> Any:
    if path.suffix == ".safetensors":
        return load_file(path)
    # PyTorch's older format, in which OpenMMLab publishes, cannot be mapped.
    mapped = zipfile.is_zipfile(path)
    with torch.serialization.safe_globals([(Placeholder, name) for name in BESIDE_WEIGHTS]):
        return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)


def _state_dict(path: Path, content: Any) -> dict[str, Tensor]:
    if isinstance(content, dict):
        content = content.get("model", content.get("state_dict", content))
    if isinstance(content, dict) and all(isinstance(n, str) and isinstance(t, Tensor) for n, t in content.items()):
        return dict(content)
    raise ValueError(f"{path} holds no state dict, neither as such nor as `model` or `state_dict`; give another file.")
