# SPDX-License-Identifier: Apache-2.0
"""Time and memory of functions that are compared."""

import ctypes
import gc
import random
import statistics
import time
from dataclasses import dataclass, field
from typing import Callable, Dict, List, Optional

import torch

__all__ = ["Meter", "Result"]


@dataclass
class Result:
    """What was measured of one thing: a value and a spread for each that was compared."""

    what: str
    unit: str
    values: Dict[str, float]
    spreads: Dict[str, float] = field(default_factory=dict)
    # What the ratio to Detectron2 is expected to be, from the operations that are added.
    expected: Optional[float] = None


class Meter:
    """Measures functions on one device."""

    def __init__(self, device: str, seconds: float):
        """
        Args:
            device: "cpu" or "cuda".
            seconds: how long to measure each thing.
        """
        self.device = device
        self.seconds = seconds

    def _time(self, step: Callable[[], None]) -> float:
        if self.device == "cuda":
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            step()
            end.record()
            end.synchronize()
            return start.elapsed_time(end) / 1000
        start = time.perf_counter()
        step()
        return time.perf_counter() - start

    def times(self, what: str, steps: Dict[str, Callable], expected=None) -> Result:
        """Measure the time of ``steps`` in turn, in ms."""
        once = 0.0
        for step in steps.values():
            self._time(step)  # warm-up
            once += self._time(step)
        samples: Dict[str, List[float]] = {name: [] for name in steps}
        for _ in range(min(max(int(self.seconds / once), 5), 2000)):
            # In another order each time: what runs after a large step finds the caches cold.
            for name in random.sample(list(steps), len(steps)):
                samples[name].append(self._time(steps[name]) * 1000)
        quartiles = {name: statistics.quantiles(x, n=4) for name, x in samples.items()}
        return Result(
            what,
            "ms",
            {name: q[1] for name, q in quartiles.items()},
            {name: q[2] - q[0] for name, q in quartiles.items()},
            expected,
        )

    def memory(self, what: str, steps: Dict[str, Callable]) -> Result:
        """Measure the peak memory that ``steps`` add, in MB."""
        values = {}
        for name, step in steps.items():
            step()  # what stays allocated, such as gradients, is there from now on
            values[name] = self._peak(step) / 1e6
        return Result(what, "MB", values)

    def _peak(self, step: Callable[[], None]) -> float:
        gc.collect()
        if self.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            step()
            return torch.cuda.max_memory_allocated() - before
        # Give back to the system what was freed before, then reset its record of the peak.
        ctypes.CDLL(None).malloc_trim(0)
        with open("/proc/self/clear_refs", "w", encoding="ascii") as f:
            f.write("5")
        before = _process_memory("VmRSS")
        step()
        return max(_process_memory("VmHWM") - before, 0)


def _process_memory(name: str) -> float:
    """A line of Linux' account of this process, in bytes."""
    with open("/proc/self/status", encoding="ascii") as f:
        return next(int(line.split()[1]) * 1024 for line in f if line.startswith(name))
