"""Measuring without disturbing: marks between phases, medians over repeats, two sides in turn."""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

import torch

T = TypeVar("T")


class Marks:
    """Points in time of a device: events of a GPU's stream, which the host does not wait for, or the host's clock.

    Between two marks of a GPU lies what its stream did or idled, so that phases add up to the step.
    """

    def __init__(self, device: torch.device) -> None:
        self.on_gpu = device.type == "cuda"
        self.events: list[torch.cuda.Event] = []
        self.times: list[float] = []

    def mark(self) -> None:
        """Records a point in time."""
        if self.on_gpu:
            self.events.append(torch.cuda.Event(enable_timing=True))
            self.events[-1].record()
        else:
            self.times.append(time.perf_counter())

    def intervals(self) -> list[float]:
        """Seconds from each mark to the next; waits for the GPU."""
        if self.on_gpu:
            torch.cuda.synchronize()
            return [a.elapsed_time(b) / 1e3 for a, b in zip(self.events, self.events[1:], strict=False)]
        return [b - a for a, b in zip(self.times, self.times[1:], strict=False)]


def in_turn(sides: Mapping[str, Callable[[], T]], warmup: int, repeats: int) -> dict[str, list[T]]:
    """Calls every side `warmup` times and then `repeats` times, whose results are kept.

    In turn, and every other round in the opposite order: what slows the machine down for a while slows all sides.
    """
    kept: dict[str, list[T]] = {name: [] for name in sides}
    for number in range(warmup + repeats):
        for name in list(sides) if number % 2 == 0 else reversed(list(sides)):
            result = sides[name]()
            if number >= warmup:
                kept[name].append(result)
    return kept


def medians(rows: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """The median of each quantity by itself."""
    return {name: statistics.median(row[name] for row in rows) for name in rows[0]}


def spread(values: Sequence[float]) -> str:
    """Smallest and largest, in parentheses: how noisy the machine was."""
    return f"({min(values):.3g} to {max(values):.3g})"
