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

PORT = 5000
# A name of the loopback (RFC 6761). On localhost itself MLflow's page opens a chat over a quarter of itself.
HOST = "mlflow.localhost"


def check_port(port: int) -> None:
    """Refuse a port of this machine that is taken."""
    with socket.socket() as probe:
        if probe.connect_ex(("127.0.0.1", port)) == 0:
            raise ConfigError(f"--port: {port} is in use on this machine; allowed: a free one")


def address(store: Store, port: int = PORT) -> str:
    """Of the page: the tracking server's, or that of the one which `make ui` starts."""
    return str(store.place).rstrip("/") if store.place.is_server else f"http://{HOST}:{port}"


def serve(store: Store, port: int) -> None:
    """Print the links and become the MLflow server of a store without one: loopback, one worker."""
    print_links(store, port)
    print(f"Ctrl-C ends the server. If the browser does not find {HOST}: 127.0.0.1 instead", flush=True)
    environment = {
        **os.environ,
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "MLFLOW_LOGGING_LEVEL": "WARNING",
        "PYTHONWARNINGS": "ignore",
        # Not in the command line, which everyone on the machine can read: it may have a password.
        "MLFLOW_BACKEND_STORE_URI": store.place.address,
        "MLFLOW_REGISTRY_STORE_URI": store.place.address,
    }
    names = [f"{name}:{port}" for name in (HOST, "127.0.0.1", "localhost")]
    words = f"-m mlflow server --host 127.0.0.1 --port {port} --workers 1 --uvicorn-opts --log-level=warning".split()
    words += [
        "--allowed-hosts",
        ",".join(names),
        "--cors-allowed-origins",
        ",".join(f"http://{name}" for name in names),
    ]
    os.chdir(workspace())
    os.execve(sys.executable, [sys.executable, *words], environment)


def print_links(store: Store, port: int) -> None:
    """One line an experiment of the benchmark: its name and the address of its prefilled view."""
    found = store.experiments()
    if not found:
        print(f"{store.place}: no runs yet; `dvc repro` makes them", flush=True)
    width = max((len(experiment.name) for experiment in found), default=0)
    for experiment in found:
        link = f"{address(store, port)}/#/experiments/{experiment.experiment_id}/runs{views.link_query()}"
        print(f"{experiment.name:{width}}  {link}", flush=True)
