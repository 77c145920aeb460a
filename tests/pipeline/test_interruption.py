"""Claims about the death of what started a stage: it is noticed whenever it comes, and nothing else is taken for it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
STARTER = "import subprocess, sys; subprocess.run([sys.executable, *sys.argv[1:]])"
STAGE = """
import os, sys, time
first = os.getppid()
if sys.argv[1] == "before it looks":
    print("up", flush=True)
    while os.getppid() == first:
        time.sleep(0.01)
from pipeline.interruption import Interruption
interruption, deadline = Interruption(), time.monotonic() + 3
print("up", flush=True)
while not interruption() and time.monotonic() < deadline:
    time.sleep(0.05)
print(interruption() or "goes on", flush=True)
"""


@pytest.mark.parametrize(
    ("dies", "reason"),
    [
        ("before it looks", "the dvc that started it is gone"),
        ("later", "the dvc that started it is gone"),
        ("never", "goes on"),
    ],
)
def test_a_stage_ends_when_what_started_it_dies(dies: str, reason: str) -> None:
    environment = {**os.environ, "DVC_STAGE": "train@tiny-sgd", "PYTHONPATH": str(REPOSITORY)}
    starter = subprocess.Popen(
        [sys.executable, "-c", STARTER, "-c", STAGE, dies],
        env=environment, stdout=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip
    assert starter.stdout is not None and starter.stdout.readline() == "up\n"
    if dies != "never":
        os.kill(starter.pid, signal.SIGKILL)
    said = starter.communicate()[0].splitlines()
    assert said[-1] == reason
