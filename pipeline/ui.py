"""The MLflow UI of this repository, and the links that open the comparison of each benchmark in it."""

from __future__ import annotations

import os
import socket
import sys
from typing import TYPE_CHECKING

from pipeline import views
from pipeline.checks import ConfigError
from pipeline.store import workspace

if TYPE_CHECKING:
    from pipeline.mlflow_store import Store


def check_port(port: int) -> None:
    """Refuse a port of this machine that is taken."""
    with socket.socket() as probe:
        if probe.connect_ex(("127.0.0.1", port)) == 0:
            raise ConfigError(f"--port: {port} is in use on this machine; allowed: a free one")


def serve(store: Store, port: int) -> None:
    """Print the links and become the MLflow server of a local store: loopback, one worker."""
    print_links(store, port)
    print("Ctrl-C ends the server", flush=True)
    environment = {
        **os.environ,
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "MLFLOW_LOGGING_LEVEL": "WARNING",
        "PYTHONWARNINGS": "ignore",
    }
    words = f"-m mlflow server --host 127.0.0.1 --port {port} --workers 1 --uvicorn-opts --log-level=warning".split()
    words += ["--backend-store-uri", store.place.address, "--registry-store-uri", store.place.address]
    os.chdir(workspace())
    os.execve(sys.executable, [sys.executable, *words], environment)


def print_links(store: Store, port: int) -> None:
    """One line an experiment of the benchmark: its name and the address of its prefilled view."""
    base = f"http://127.0.0.1:{port}" if store.place.database else store.place.address
    found = sorted((e for e in store.client.search_experiments() if views.VIEW_TAG in e.tags), key=lambda e: e.name)
    if not found:
        print(f"{store.place.address}: no runs yet; `dvc repro` makes them", flush=True)
    width = max((len(experiment.name) for experiment in found), default=0)
    for experiment in found:
        address = f"{base.rstrip('/')}/#/experiments/{experiment.experiment_id}/runs{views.link_query()}"
        print(f"{experiment.name:{width}}  {address}", flush=True)
