"""What a training run costs: seconds by phase and peak memory, both with evaluation left out.

The one idea: a phase counts its own time only. Phases nest (an optimizer gathers statistics inside the user's
backward), and what an inner phase takes is taken from the outer one, so the phases add up to the training time. On a
GPU phases are bracketed by events on the stream and nothing waits for the device until the total is read; events that
the device has passed are read on the way, so their number stays bounded.
"""

from __future__ import annotations

import contextlib
import ctypes
import resource
import sys
import time
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import torch

PHASES = ("forward_backward", "statistics", "inverses", "update")
_MIB = 2.0**20
_OUTSTANDING = 256  # phases between two looks for those that the device has passed


class Stopwatch:
    """Seconds by phase; ``with stopwatch(name):`` runs one, and an optimizer may be given it as its ``phase``.

    ``seconds()`` waits for a GPU, so it belongs where the loop waits anyway.
    """

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._device = device
        self._totals = dict.fromkeys(PHASES, 0.0)
        self._open: list[list[float]] = []  # for each open phase, the seconds its inner phases took
        self._open_names: list[str] = []  # the same on a GPU, where seconds are known later
        self._events: deque[tuple[str, str | None, torch.cuda.Event, torch.cuda.Event]] = deque()
        self._spare: list[torch.cuda.Event] = []

    def __call__(self, name: str) -> AbstractContextManager[None]:
        return self._on_stream(name) if self._cuda else self._on_host(name)

    @contextmanager
    def _on_host(self, name: str) -> Iterator[None]:
        inner = [0.0]
        self._open.append(inner)
        start = time.perf_counter()
        try:
            yield
        finally:
            elapsed = time.perf_counter() - start
            self._open.pop()
            self._totals[name] = self._totals.get(name, 0.0) + elapsed - inner[0]
            if self._open:
                self._open[-1][0] += elapsed

    @contextmanager
    def _on_stream(self, name: str) -> Iterator[None]:
        start, end = self._event(), self._event()
        outer = self._open_names[-1] if self._open_names else None
        self._open_names.append(name)
        start.record()
        try:
            yield
        finally:
            end.record()
            self._open_names.pop()
            self._events.append((name, outer, start, end))
            if len(self._events) % _OUTSTANDING == 0:
                self._read_passed()

    def _event(self) -> torch.cuda.Event:
        return self._spare.pop() if self._spare else torch.cuda.Event(enable_timing=True)

    def seconds(self) -> dict[str, float]:
        """Seconds by phase so far; the training time is their sum."""
        if self._events:
            torch.cuda.synchronize(self._device)
            self._read_passed()
        return dict(self._totals)

    def go_on_from(self, seconds: Mapping[str, float]) -> None:
        """Count on from what another stopwatch had counted."""
        self._totals.update(seconds)

    def _read_passed(self) -> None:
        """Count the phases, in the order of their ends, that the device has gone through; waits for none."""
        while self._events and self._events[0][-1].query():
            name, outer, start, end = self._events.popleft()
            elapsed = start.elapsed_time(end) / 1000.0
            self._totals[name] = self._totals.get(name, 0.0) + elapsed
            if outer is not None:
                self._totals[outer] = self._totals.get(outer, 0.0) - elapsed
            self._spare += (start, end)


class PeakMemory:
    """Peak memory of training in MiB, over the stretches between ``resume`` and ``pause``.

    On a GPU what torch has allocated on it: data, network, gradients, optimizer, activations. On a CPU the growth of
    the process's resident memory over what it was at the first ``resume``, when data, network and libraries are in
    place: gradients, optimizer, activations. The kernel's high-water mark is put back at every ``resume``; where it
    cannot be (elsewhere than on Linux), the mark of the whole process is the best there is.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._baseline: int | None = None
        self._peak = 0

    def resume(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
            return
        with contextlib.suppress(OSError):  # not Linux, or not allowed
            Path("/proc/self/clear_refs").write_text("5")
        if self._baseline is None:
            with contextlib.suppress(OSError, AttributeError):  # not glibc
                ctypes.CDLL(None).malloc_trim(0)  # memory that is free already would hide growth
            self._baseline = _status("VmRSS") or _high_water_mark()

    def pause(self) -> None:
        """Note the peak since ``resume``; nothing where that was never called."""
        if self._device.type == "cuda":
            self._peak = max(self._peak, torch.cuda.max_memory_allocated(self._device))
        elif self._baseline is not None:
            self._peak = max(self._peak, _high_water_mark() - self._baseline)

    @property
    def mib(self) -> float:
        return self._peak / _MIB

    def go_on_from(self, mib: float) -> None:
        """The peak is at least what it was in an earlier process."""
        self._peak = max(self._peak, round(mib * _MIB))


def _high_water_mark() -> int:
    """The most bytes of this process that were resident in memory at a time."""
    from_kernel = _status("VmHWM")
    if from_kernel:
        return from_kernel
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _status(field: str) -> int:
    try:
        with open("/proc/self/status", encoding="ascii") as file:
            for line in file:
                if line.startswith(field):
                    return int(line.split()[1]) * 1024
    except OSError:
        pass
    return 0
