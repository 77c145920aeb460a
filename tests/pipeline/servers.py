"""Servers that tests start on the loopback and end again: MLflow's own, and PostgreSQL as its store."""

from __future__ import annotations

import importlib.util
import os
import pwd
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

PASSWORD = "not-to-be-seen"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def wait_for(address: str) -> None:
    for _ in range(1200):
        try:
            urllib.request.urlopen(address, timeout=5).close()
            return
        except OSError:
            time.sleep(0.1)
    raise AssertionError(f"{address} did not come up")


@contextmanager
def mlflow_server(folder: Path, store: str) -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    """`mlflow server` on a database; files that it is sent are in `folder`. Its address and process."""
    port = free_port()
    words = ["-m", "mlflow", "server", "--workers", "1", "--host", "127.0.0.1", "--port", str(port)]
    process = subprocess.Popen(
        [
            sys.executable,
            *words,
            "--allowed-hosts",
            f"127.0.0.1:{port}",
            "--artifacts-destination",
            str(folder / "sent"),
        ],
        cwd=folder,
        env={
            **os.environ,
            "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
            "MLFLOW_DISABLE_TELEMETRY": "true",
            "MLFLOW_BACKEND_STORE_URI": store.replace("postgresql:", "postgresql+psycopg2:"),
        },
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        wait_for(f"http://127.0.0.1:{port}/health")
        yield f"http://127.0.0.1:{port}", process
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


@dataclass(frozen=True)
class Postgres:
    """A database server with one empty database."""

    port: int
    process: subprocess.Popen[bytes]

    @property
    def address(self) -> str:
        return f"postgresql://owner:{PASSWORD}@127.0.0.1:{self.port}/postgres"

    def stop(self) -> None:
        self.process.send_signal(signal.SIGINT)  # "fast": open connections are ended
        self.process.wait(60)


@contextmanager
def postgres() -> Iterator[Postgres]:
    """PostgreSQL from Debian's package, started for the test; skipped with the reason where it cannot be."""
    folders = [Path("/usr/bin"), *sorted(Path("/usr/lib/postgresql").glob("*/bin"))]
    binaries = next((folder for folder in folders if (folder / "initdb").exists()), None)
    if binaries is None:
        pytest.skip("needs the server of PostgreSQL (Debian: postgresql)")
    if importlib.util.find_spec("psycopg2") is None:
        pytest.skip("needs psycopg2 (pip install '.[postgres]')")
    folder = Path(tempfile.mkdtemp(prefix="postgres-", dir="/tmp"))
    try:
        became = _unprivileged(folder)
        password = folder / "password"
        password.write_text(PASSWORD)
        password.chmod(0o644)
        make = ["-D", folder / "data", "-U", "owner", "--auth=scram-sha-256", "--pwfile", password, "--no-sync"]
        subprocess.run([*became, binaries / "initdb", *make], cwd=folder, check=True, capture_output=True)
        port = free_port()
        words = ["-D", folder / "data", "-p", str(port), "-h", "127.0.0.1", "-k", folder, "-c", "fsync=off"]
        with (folder / "printed").open("wb") as printed:
            process = subprocess.Popen(
                [*became, binaries / "postgres", *words], cwd=folder, stdout=printed, stderr=printed
            )
        try:
            _wait_for_port(port, process)
            yield Postgres(port, process)
        finally:
            process.send_signal(signal.SIGQUIT)
            process.wait(60)
    finally:
        shutil.rmtree(folder)


def _unprivileged(folder: Path) -> list[str]:
    """Words that make a command one of a user who owns the folder; PostgreSQL refuses to run as root."""
    if os.geteuid() != 0:
        return []
    if shutil.which("setpriv") is None:
        pytest.skip("PostgreSQL does not run as root, and there is no setpriv to become another user")
    user = pwd.getpwnam("nobody")
    os.chown(folder, user.pw_uid, user.pw_gid)
    return ["setpriv", f"--reuid={user.pw_uid}", f"--regid={user.pw_gid}", "--clear-groups"]


def _wait_for_port(port: int, process: subprocess.Popen[bytes]) -> None:
    for _ in range(600):
        assert process.poll() is None, "PostgreSQL ended"
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.1)
    raise AssertionError("PostgreSQL did not come up")
