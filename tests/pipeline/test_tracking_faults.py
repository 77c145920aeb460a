"""What a store that is busy, broken, unreachable or lost does to a run: one line, and nothing worse."""

from __future__ import annotations

import os
import signal
import socket
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy

from pipeline import metrics, mlflow_store, records, store, tracking
from pipeline.config import ConfigError, resolve
from tests.pipeline import synthetic_records as study
from tests.pipeline.servers import free_port, mlflow_server, wait_for

BENCHMARK = "digits_autoencoder"
PARAMS = study.params(benchmarks=(BENCHMARK,), optimizers=("sgd",), seeds=(0,))
RUN = resolve(PARAMS, BENCHMARK, "sgd")
REPOSITORY = Path(__file__).parents[2]


def command(*words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "pipeline.tracking", *words],
        env={**os.environ, "PYTHONPATH": str(REPOSITORY), **environment},
        capture_output=True,
        text=True,
        check=False,
    )


def one_line(text: str) -> str:
    assert text.count("\n") <= 1, text
    return text.strip()


def test_a_closed_port_is_refused_within_ten_seconds_in_one_line(tmp_path: Path) -> None:
    address = f"http://127.0.0.1:{free_port()}"
    begin = time.monotonic()
    done = command("views", MLFLOW_TRACKING_URI=address, DVC_ROOT=str(tmp_path))
    assert time.monotonic() - begin < 10 + 20  # interpreter and imports on a busy machine; the wait itself is below
    line = one_line(done.stderr)
    assert done.returncode == 2 and not done.stdout
    assert line.startswith(
        f"error: MLFLOW_TRACKING_URI: no tracking server answers at '{address}' (Connection refused)"
    )
    assert "allowed: http(s)://host:port" in line


def test_a_server_that_accepts_and_stays_silent_is_given_up_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    assert mlflow_store.START_WITHIN < 10
    monkeypatch.setattr(mlflow_store, "START_WITHIN", 0.5)
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{silent.getsockname()[1]}")
        begin = time.monotonic()
        with pytest.raises(ConfigError, match="no answer within"):
            tracking.start(RUN, 0, {})
        assert time.monotonic() - begin < 10


def test_a_server_that_is_no_tracking_server_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    port = free_port()
    server = subprocess.Popen(
        [sys.executable, "-m", "http.server", str(port), "--bind", "127.0.0.1"],
        cwd=tmp_path,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        wait_for(f"http://127.0.0.1:{port}/")
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{port}")
        with pytest.raises(ConfigError, match="MLFLOW_TRACKING_URI: no tracking server answers"):
            tracking.start(RUN, 0, {})
    finally:
        server.kill()
        server.wait()


@pytest.mark.parametrize("address", ["runs", "./mlruns", "file:///tmp/mlruns", "ftp://somewhere"])
def test_an_address_that_is_no_store_is_refused_with_what_is_allowed(
    address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", address)
    with pytest.raises(ConfigError) as refused:
        tracking.start(RUN, 0, {})
    line = one_line(str(refused.value))
    assert f"MLFLOW_TRACKING_URI: '{address}' is no tracking store" in line and "sqlite:///" in line


def test_a_file_that_is_no_database_is_refused_and_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setenv("DVC_ROOT", str(tmp_path))
    (tmp_path / "mlflow.db").write_text("not a database\n" * 100)
    with pytest.raises(ConfigError) as refused:
        tracking.start(RUN, 0, {})
    assert "mlflow.db: is no MLflow store: file is not a database" in one_line(str(refused.value))
    assert (tmp_path / "mlflow.db").read_text() == "not a database\n" * 100


def test_a_database_held_by_another_program_is_refused(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "BUSY_WITHIN", 0.2)
    holder = sqlite3.connect(root / "mlflow.db")
    holder.execute("BEGIN EXCLUSIVE")
    with pytest.raises(ConfigError, match=r"mlflow\.db: the MLflow store cannot be written: database is locked"):
        tracking.start(RUN, 0, {})
    holder.close()


def test_a_lock_that_is_never_given_back_is_refused(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "LOCK_WITHIN", 0.2)
    with store.place().turn(), pytest.raises(ConfigError, match=r"mlflow\.db\.lock: held by another process"):
        tracking.start(RUN, 0, {})


def train_through(lose: Any, folder: Path) -> tuple[tracking.Tracker, Path]:
    """A run whose store is lost by `lose()` after some evaluations; records are written as always."""
    written = study.write_record(folder / "results", PARAMS, BENCHMARK, "sgd", 0)
    run = records.read_run(written)
    tracker = tracking.start(RUN, 0, run.environment)
    for number, row in enumerate(run.history):
        if number == 5:
            lose()
        tracker.log(row, [])
        tracker.send()
    tracker.finish(run.summary, written)
    return tracker, written


@pytest.fixture
def impatient() -> Iterator[None]:
    """MLflow waits a second for a locked database, not twenty."""

    def wait_less(connection: Any, cursor: Any, statement: str, parameters: Any, *_: Any) -> tuple[str, Any]:
        return statement.replace("busy_timeout = 20000", "busy_timeout = 1000"), parameters

    sqlalchemy.event.listen(sqlalchemy.Engine, "before_cursor_execute", wait_less, retval=True)
    yield
    sqlalchemy.event.remove(sqlalchemy.Engine, "before_cursor_execute", wait_less)


@pytest.mark.parametrize("fault", ["broken", "gone", "locked"])
def test_a_store_lost_in_mid_run_is_one_warning_and_rebuild_uploads_the_run(
    fault: str, root: Path, capsys: pytest.CaptureFixture[str], impatient: None
) -> None:
    database, aside = root / "mlflow.db", root / "aside.db"
    holder = sqlite3.connect(database)

    def lose_it() -> None:
        if fault == "locked":
            holder.execute("BEGIN EXCLUSIVE")
        elif fault == "gone":
            database.rename(aside)
        else:
            aside.write_bytes(database.read_bytes())
            database.write_bytes(b"broken" * 10_000)

    tracker, folder = train_through(lose_it, root)
    assert tracker.lost
    line = one_line(capsys.readouterr().err)
    assert line.startswith("warning: MLflow store sqlite:///") and "python -m pipeline.tracking rebuild" in line
    assert {"gone": "(the file is gone)", "locked": "(database is locked)"}.get(fault, "") in line
    holder.close()
    if fault == "gone":
        aside.rename(database)
    elif fault == "broken":
        database.write_bytes(aside.read_bytes())
    assert tracking.rebuild(root / "results") == (1, 0)
    found = finished_runs()
    assert [run.data.tags["records"] for run in found] == [metrics.records_hash(folder)]


def finished_runs() -> list[Any]:
    opened = tracking.Store()
    experiment = opened.client.get_experiment_by_name(BENCHMARK)
    assert experiment is not None
    return opened.runs(experiment.experiment_id)


@pytest.fixture
def server(root: Path) -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    """A real MLflow server on the workspace's store."""
    with mlflow_server(root, f"sqlite:///{root}/mlflow.db") as started:
        yield started


@pytest.mark.parametrize("fault", [signal.SIGKILL, pytest.param(signal.SIGSTOP, marks=pytest.mark.slow)])
def test_a_server_lost_in_mid_run_is_one_warning_and_no_long_wait(
    fault: signal.Signals,
    root: Path,
    server: tuple[str, subprocess.Popen[bytes]],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    address, process = server
    monkeypatch.setenv("MLFLOW_TRACKING_URI", address)
    tracker, _ = train_through(lambda: os.killpg(process.pid, fault), root)
    line = one_line(capsys.readouterr().err)
    assert tracker.lost and line.startswith(f"warning: MLflow store {address} was lost (")
    assert tracker.seconds < 40  # at most two requests that time out, once
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    assert tracking.rebuild(root / "results") == (1, 0)
    assert [run.data.tags["status"] for run in finished_runs()] == ["finished"]


@pytest.mark.slow
def test_a_run_reaches_a_server_whole(
    root: Path,
    server: tuple[str, subprocess.Popen[bytes]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", server[0])
    tracker, folder = train_through(lambda: None, root)
    assert not tracker.lost
    assert [run.data.tags["records"] for run in finished_runs()] == [metrics.records_hash(folder)]


@pytest.mark.slow
@pytest.mark.parametrize("after", [0.0, 0.3, 1.0])
def test_a_store_whose_maker_was_killed_is_made_anew(after: float, tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "DVC_ROOT": str(tmp_path)}
    environment.pop("MLFLOW_TRACKING_URI", None)
    words = [sys.executable, "-c", "from pipeline.tracking import Store; print(len(Store().experiments()))"]
    maker = subprocess.Popen(words, env=environment, stdout=subprocess.DEVNULL)
    while not list(tmp_path.glob("mlflow.db.partial*")):
        assert maker.poll() is None
        time.sleep(0.005)
    time.sleep(after)
    maker.kill()
    maker.wait()
    done = subprocess.run(words, env=environment, capture_output=True, text=True, check=False)
    assert done.stdout == "0\n", done.stderr
    assert {path.name for path in tmp_path.iterdir()} == {"mlflow.db", "mlflow.db.lock"}


def test_processes_that_open_a_new_store_at_once_all_write_to_it(tmp_path: Path) -> None:
    study.write_study(tmp_path / "results", study.params((BENCHMARK,), ("sgd", "kfac"), (0, 1)))
    code = """
import sys, pathlib
from pipeline import records, tracking
folder = pathlib.Path(sys.argv[1])
run = records.read_run(folder)
tracker = tracking.Tracker(tracking.Store(), run.config, run.summary["seed"], run.environment, 1e9)
for row in run.history:
    tracker.log(row)
tracker.finish(run.summary, folder)
sys.exit(tracker.lost)
"""
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "DVC_ROOT": str(tmp_path)}
    environment.pop("MLFLOW_TRACKING_URI", None)
    processes = [
        subprocess.Popen([sys.executable, "-c", code, str(folder)], env=environment, stderr=subprocess.PIPE)
        for folder in sorted(tmp_path.glob("results/*/*/seed-*"))
    ]
    said = [process.communicate()[1].decode() for process in processes]
    assert [process.returncode for process in processes] == [0] * 4, said
    assert said == [""] * 4
    listed = command("rebuild", str(tmp_path / "results"), DVC_ROOT=str(tmp_path))
    assert "0 runs uploaded, 4 were there" in listed.stdout, listed.stderr
