"""Checkpoints of other programs: what is read, and what is refused without being run."""

import argparse
import os
import pathlib
import re
import sys
import types
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from safetensors.torch import save_file

from mixmim_ds.export.foreign import read_tensors

STATE = {"a.weight": torch.randn(300, 100), "b.bias": torch.randn(100)}


def assert_reads_state(path: Path) -> None:
    tensors = read_tensors(path)
    assert tensors.keys() == STATE.keys()
    assert all(torch.equal(value, STATE[name]) for name, value in tensors.items())


def assert_refused(path: Path, sentence: str) -> None:
    with pytest.raises(ValueError, match=re.escape(str(path)) + f".*{sentence}") as refusal:
        read_tensors(path)
    assert "\n" not in str(refusal.value)
    assert "only" not in str(refusal.value), "no advice of PyTorch's about weights_only"


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("content", [STATE, {"model": STATE, "epoch": 3}, {"state_dict": STATE, "meta": {}}])
def test_state_dicts_are_found(content: dict[str, Any], zipped: bool, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "a.pth", _use_new_zipfile_serialization=zipped)
    assert_reads_state(tmp_path / "a.pth")


def test_what_is_not_used_takes_no_memory(tmp_path: Path) -> None:
    def own_kib() -> int:
        return int(re.search(r"RssAnon:\s+(\d+) kB", Path("/proc/self/status").read_text())[1])

    torch.save({"model": {**STATE, "large": torch.zeros(50_000_000)}}, tmp_path / "a.pth")
    before = own_kib()
    tensors = read_tensors(tmp_path / "a.pth")
    assert own_kib() - before < 50_000 and tensors["large"].nbytes == 200_000_000
    assert torch.equal(tensors["b.bias"], STATE["b.bias"])


@pytest.fixture
def mmengine(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Classes that pickle as mmengine's do, which is not installed; gone again when the test is over."""

    class HistoryBuffer:
        def __init__(self, values: list[float]) -> None:
            self.max_length = 1000000
            self._log_history, self._count_history = numpy.array(values), numpy.ones(len(values), numpy.int64)

    class ConfigDict(dict):
        def __reduce_ex__(self, protocol: Any) -> tuple:
            return (type(self), (dict(self),), None, None, None)

    monkeypatch.setitem(sys.modules, "mmengine", types.ModuleType("mmengine"))
    modules = {"mmengine.logging.history_buffer": HistoryBuffer, "mmengine.config.config": ConfigDict}
    for name, kind in modules.items():
        kind.__module__, kind.__qualname__ = name, kind.__name__
        module = types.ModuleType(name)
        setattr(module, kind.__name__, kind)
        monkeypatch.setitem(sys.modules, name, module)
    return types.SimpleNamespace(HistoryBuffer=HistoryBuffer, ConfigDict=ConfigDict)


@pytest.mark.parametrize("numpy_name", [b"numpy._core.multiarray", b"numpy.core.multiarray"])
def test_what_others_pickle_beside_the_weights_is_passed_over(
    numpy_name: bytes, mmengine: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = {
        "state_dict": STATE,
        "args": argparse.Namespace(lr=1e-3, output_dir=pathlib.PosixPath("/tmp"), world=argparse.Namespace(size=16)),
        "meta": {"cfg": mmengine.ConfigDict(model=mmengine.ConfigDict(type="MixMIM")), "best": numpy.float64(0.5)},
        "message_hub": {"log_scalars": {"train/loss": mmengine.HistoryBuffer([1.0, 0.5])}, "runtime_info": {"iter": 3}},
        "optimizer": {"state": {0: {"step": torch.tensor(3.0)}}, "param_groups": [{"lr": 0.1, "params": [0]}]},
    }
    path = tmp_path / "a.pth"
    torch.save(content, path, _use_new_zipfile_serialization=False)  # as OpenMMLab publishes
    data = path.read_bytes()
    assert all(word in data for word in (b"numpy._core.multiarray", b"HistoryBuffer", b"ConfigDict", b"Namespace"))
    path.write_bytes(data.replace(b"numpy._core.multiarray", numpy_name))  # as numpy 2 or 1 writes it
    for name in ("mmengine", "mmengine.logging.history_buffer", "mmengine.config.config"):
        monkeypatch.delitem(sys.modules, name)
    assert_reads_state(path)


class Call:
    """Pickles as a call that writes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return os.system, (f"touch {self.path}",)


@pytest.mark.parametrize("zipped", [True, False])
def test_code_in_a_file_is_refused_and_not_run(zipped: bool, tmp_path: Path) -> None:
    content = {"model": STATE, "args": Call(tmp_path / "ran")}
    torch.save(content, tmp_path / "a.pth", _use_new_zipfile_serialization=zipped)
    assert_refused(tmp_path / "a.pth", r"wants \w+\.system to be called")
    assert not (tmp_path / "ran").exists()
    torch.load(tmp_path / "a.pth", weights_only=False)
    assert (tmp_path / "ran").exists(), "the file would have run code"


def test_an_object_that_is_not_on_the_list_is_named(tmp_path: Path) -> None:
    torch.save({"model": STATE, "scaler": types.SimpleNamespace()}, tmp_path / "a.pth")
    assert_refused(tmp_path / "a.pth", "wants types.SimpleNamespace to be called")


@pytest.mark.parametrize("kind", ["zip", "legacy", "safetensors"])
def test_damaged_files_are_refused(kind: str, tmp_path: Path) -> None:
    path = tmp_path / ("a.safetensors" if kind == "safetensors" else "a.pth")
    if kind == "safetensors":
        save_file(STATE, path)
    else:
        torch.save({"model": STATE}, path, _use_new_zipfile_serialization=kind == "zip")
    assert_reads_state(path)
    data = path.read_bytes()
    for length in (0, 5, len(data) // 2, len(data) - 100):
        path.write_bytes(data[:length])
        assert_refused(path, r"cannot be read as a checkpoint \(.+\); fetch")
    path.write_text("<html>404</html>")
    assert_refused(path, r"cannot be read as a checkpoint \(.+\); fetch")


@pytest.mark.parametrize("content", [[1], {"model": 3}, {"epoch": 7}, {3: torch.zeros(1)}, {"model": {"a": None}}])
def test_files_without_a_state_dict_are_refused(content: Any, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "a.pth")
    assert_refused(tmp_path / "a.pth", "holds no state dict")


def test_what_is_no_file_is_refused(tmp_path: Path) -> None:
    assert_refused(tmp_path / "a.pth", "is no file")
    assert_refused(tmp_path, "is no file")
