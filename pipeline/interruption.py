"""When a run has to end before its time: Ctrl-C, SIGTERM, a closed terminal, or the death of the `dvc` that started it.

The one idea: nothing stops in the middle of a step. A signal is noted, the loop asks between two steps, a checkpoint
is written and the process ends; a second Ctrl-C ends it at once. A `dvc` that is killed tells nobody, so its trainer
looks every second whether it is still there.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from types import FrameType
from typing import Any, Self

import psutil

_LOOK_EVERY = 1.0  # seconds
_SHELLS = {"sh", "bash", "dash", "zsh", "ksh", "fish"}
_GONE = {"pid": 0, "created": 0.0}  # describes no process


def _starter() -> psutil.Process | None:
    """What started this process as a stage: its parent, or what is behind the shell that is its parent.

    DVC, and the worker that trains a tuning's trial, start a stage in their own session. A parent of another one has
    only adopted it, and so has the machine's first process, unless it is DVC.
    """
    try:
        parent = psutil.Process().parent()
        while parent is not None and parent.name() in _SHELLS:
            parent = parent.parent()
        if parent is None or any(Path(word).name == "dvc" for word in parent.cmdline()[:3]):
            return parent
        return parent if parent.pid != 1 and os.getsid(parent.pid) == os.getsid(0) else None
    except (psutil.Error, OSError):  # it ended at this moment
        return None


IS_STAGE = "DVC_STAGE" in os.environ
STARTER = _starter() if IS_STAGE else None  # looked up when the process starts: later an orphan has another parent


class Interruption:
    """`with Interruption() as interruption:` notes what arrives; `interruption()` is the reason to end, or ""."""

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None
        self._looked_at = time.monotonic()
        self._before: dict[signal.Signals, Any] = {}
        self._reason = ""

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():  # the only one that may
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
                if signal.getsignal(number) is not signal.SIG_IGN:  # as under nohup
                    self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: Any) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.signal = signal.Signals(number)
        self._reason = self.signal.name
        signal.signal(signal.SIGINT, signal.default_int_handler)

    def __call__(self) -> str:
        now = time.monotonic()
        if not self._reason and now - self._looked_at > _LOOK_EVERY:
            self._looked_at = now
            if IS_STAGE and not (STARTER is not None and _alive(STARTER)):
                self._reason = "the dvc that started it is gone"
        return self._reason

    @property
    def status(self) -> int:
        """What the process ends with, as a shell would put it."""
        return 1 if self.signal is None else 128 + self.signal


def _alive(process: psutil.Process) -> bool:
    """Whether it is this very process that runs, and not another that has its number now."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False


# ---------------------------------------------------------------- processes, told to others


def described_process() -> dict[str, Any]:
    """This process in numbers that another can look up, and the `dvc` that started it."""
    starter = _GONE if IS_STAGE else None
    if STARTER is not None:
        starter = _described(STARTER)
    return {**_described(psutil.Process()), "starter": starter}


def _described(process: psutil.Process) -> dict[str, Any]:
    return {"pid": process.pid, "created": process.create_time()}


def is_running(described: Mapping[str, Any]) -> bool:
    """Whether a described process of this machine is still there."""
    try:
        process = psutil.Process(described["pid"])
        return abs(process.create_time() - described["created"]) < 1.0 and _alive(process)
    except psutil.Error:
        return False


def is_orphan(described: Mapping[str, Any]) -> bool:
    """Whether the `dvc` that started a described process is gone, so that it is about to end."""
    return described["starter"] is not None and not is_running(described["starter"])
