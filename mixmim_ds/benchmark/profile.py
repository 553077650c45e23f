"""Where the time of a step goes, as torch.profiler sees it: operators, and what is sent between processes."""

from collections.abc import Callable
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import profile

from mixmim_ds.train.profiling import activities

TOP = 12  # operators in a table


def profiled(step: Callable[[], object], device: torch.device) -> list[Any]:
    """The profiler's averages by operator over one call; `step` is warm."""
    with profile(activities=activities()) as record:
        step()
        if device.type == "cuda":
            torch.cuda.synchronize()
    return list(record.key_averages())


def own_seconds(entry: Any, device: torch.device) -> float:
    """Of an operator without those that it calls: of its kernels on a GPU, else of the host."""
    return (entry.self_device_time_total if device.type == "cuda" else entry.self_cpu_time_total) / 1e6


def table(title: str, entries: list[Any], device: torch.device) -> list[str]:
    """Lines of Markdown: the operators that take most of their own time."""
    # Kernels of a GPU have entries of their own beside those of the operators that launch them.
    operators = [entry for entry in entries if entry.device_type == DeviceType.CPU]
    ranked = sorted(operators, key=lambda entry: own_seconds(entry, device), reverse=True)
    total = sum(own_seconds(entry, device) for entry in operators)
    lines = ["", f"| {title}: operator | calls | seconds | share |", "|---|---|---|---|"]
    for entry in ranked[:TOP]:
        seconds = own_seconds(entry, device)
        lines.append(f"| `{entry.key}` | {entry.count} | {seconds:.3f} | {seconds / total:.1%} |")
    return [*lines, f"| all | | {total:.3f} | |"]


def communication_s(entries: list[Any], device: torch.device) -> float:
    """Seconds in collectives: NCCL's kernels on a GPU, gloo's work on a CPU. They may run beside the computing, and
    waiting for a slower process is in them."""
    if device.type == "cuda":
        return sum(entry.self_device_time_total for entry in entries if entry.key.startswith("ncclDevKernel")) / 1e6
    return sum(entry.cpu_time_total for entry in entries if entry.key.startswith("gloo:")) / 1e6
