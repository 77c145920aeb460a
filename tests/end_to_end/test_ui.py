"""Claims about the MLflow UI: it serves the runs of the repository, by its own command and by ours."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import time
import urllib.request
from typing import Any

import pytest
from repository import BENCHMARKS, HANGS, Study

pytestmark = pytest.mark.slow


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def answer(base: str, path: str, question: dict[str, Any], server: subprocess.Popen[str]) -> dict[str, Any]:
    """What the server's interface answers, once it is up."""
    deadline = time.monotonic() + HANGS / 5
    data = json.dumps(question).encode()
    request = urllib.request.Request(base + path, data, {"Content-Type": "application/json"})
    while True:
        assert server.poll() is None and time.monotonic() < deadline
        try:
            with urllib.request.urlopen(request, timeout=10) as reply:
                return dict(json.loads(reply.read()))
        except OSError:
            time.sleep(0.5)


@pytest.mark.parametrize("command", ["mlflow ui --port", "python -m pipeline.tracking ui --port"])
def test_it_serves_an_experiment_a_benchmark_and_the_page(study: Study, command: str) -> None:
    port = free_port()
    base = f"http://127.0.0.1:{port}"
    server = subprocess.Popen(
        [*command.split(), str(port)], cwd=study.workspace.root, env=study.workspace.environment, text=True,
        stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True,
    )  # fmt: skip
    try:
        found = answer(base, "/api/2.0/mlflow/experiments/search", {"max_results": 100}, server)["experiments"]
        names = {experiment["name"]: experiment["experiment_id"] for experiment in found}
        assert set(BENCHMARKS) <= set(names)
        runs = answer(base, "/api/2.0/mlflow/runs/search", {"experiment_ids": [names["digits_cnn"]]}, server)["runs"]
        assert {"sgd seed 0", "kfac seed 1"} <= {run["info"]["run_name"] for run in runs}
        with urllib.request.urlopen(base, timeout=10) as page:
            assert b"<html" in page.read().lower()
    finally:
        os.killpg(server.pid, signal.SIGTERM)
        server.wait(60)
