"""The same view in every kind of store: MLflow's server on SQLite and on PostgreSQL, and PostgreSQL itself."""

from __future__ import annotations

import os
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from pipeline import mlflow_store, records, store, tracking, views
from pipeline.config import ConfigError, resolve
from tests.pipeline import synthetic_records as study
from tests.pipeline.servers import PASSWORD, Postgres, free_port, mlflow_server, postgres, wait_for

pytestmark = pytest.mark.slow
BENCHMARK = "digits_autoencoder"
PARAMS = study.params((BENCHMARK,), ("sgd", "kfac"), (0, 1))
REPOSITORY = Path(__file__).parents[2]


@pytest.fixture
def database() -> Iterator[Postgres]:
    with postgres() as started:
        yield started


@pytest.fixture(params=["server on sqlite", "server on postgresql", "postgresql", "sqlite"])
def place(request: pytest.FixtureRequest, root: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A store of some kind, in use; yields the kind."""
    kind = request.param
    with ExitStack() as stack:
        address = stack.enter_context(postgres()).address if "postgresql" in kind else f"sqlite:///{root}/other.db"
        if kind.startswith("server"):
            (root / "server").mkdir()
            address, _ = stack.enter_context(mlflow_server(root / "server", address))
        monkeypatch.setenv("MLFLOW_TRACKING_URI", address)
        yield kind


def content(opened: mlflow_store.Store) -> dict[tuple[str, str], Any]:
    """All that is to be seen, without identifiers and what logging cost."""
    found, ask = {}, opened.client.get_metric_history
    for experiment in opened.experiments():
        shown = {name: value for name, value in experiment.tags.items()}
        for run in opened.runs(experiment.experiment_id):
            series = {
                name: sorted((point.step, point.value, point.timestamp) for point in ask(run.info.run_id, name))
                for name in run.data.metrics
                if name != "time/tracking_seconds"
            }
            tags = {name: value for name, value in run.data.tags.items() if name != mlflow_store.PROCESS_TAG}
            files = {file.path for file in opened.client.list_artifacts(run.info.run_id)}
            found[experiment.name, run.info.run_name] = (shown, run.info.status, run.data.params, tags, series, files)
    return found


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory, new_store: Path) -> dict[tuple[str, str], Any]:
    """The content of the default store after a rebuild."""
    folder = tmp_path_factory.mktemp("expected")
    (folder / "mlflow.db").write_bytes(new_store.read_bytes())
    study.write_study(folder / "results", PARAMS)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DVC_ROOT", str(folder))
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        tracking.rebuild(folder / "results")
        return content(tracking.Store())


def test_records_and_means_are_the_same_in_every_store(
    place: str, root: Path, expected: dict[tuple[str, str], Any], capfd: pytest.CaptureFixture[str]
) -> None:
    study.write_study(root / "results", PARAMS)
    tracking.main(["rebuild", "results"])
    opened = tracking.Store()
    found = content(opened)
    assert set(found) == {
        *((BENCHMARK, f"{optimizer} seed {seed}") for optimizer in ("sgd", "kfac") for seed in (0, 1)),
        *((f"{BENCHMARK} mean", f"{optimizer} mean") for optimizer in ("sgd", "kfac")),
    }
    for key, entry in found.items():
        assert entry == expected[key], key
    tracking.main(["check", "results"])
    tracking.main(["views"])
    printed = "".join(capfd.readouterr())
    assert "4 runs uploaded, 0 were there" in printed and "every run has its record" in printed
    assert views.link_query() in printed and PASSWORD not in printed
    for file in root.rglob("*"):  # files of the workspace; MLflow's server keeps none of them
        assert not file.is_file() or PASSWORD.encode() not in file.read_bytes(), file
    made = {BENCHMARK: {o: records.read_runs(root / "results", BENCHMARK, o, (0, 1)) for o in ("sgd", "kfac")}}
    base = os.environ["MLFLOW_TRACKING_URI"] if place.startswith("server") else "http://mlflow.localhost:5000"
    assert {link.address.partition("/#/")[0] for link in tracking.links(made).values()} == {base}


def test_processes_that_open_a_new_database_at_once_all_find_it_whole(
    database: Postgres, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", database.address)
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    words = [sys.executable, "-c", "from pipeline.tracking import Store; Store().experiments()"]
    processes = [subprocess.Popen(words, env=environment, stderr=subprocess.PIPE) for _ in range(3)]
    said = [process.communicate()[1].decode() for process in processes]
    assert [process.returncode for process in processes] == [0] * 3, said


def test_a_database_that_stops_in_mid_run_is_one_warning_and_the_records_are_uploaded_later(
    root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = study.write_record(root / "results", PARAMS, BENCHMARK, "sgd", 0)
    run = records.read_run(folder)
    with postgres() as started:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", started.address)
        tracker = tracking.start(resolve(PARAMS, BENCHMARK, "sgd"), 0, run.environment)
        for number, row in enumerate(run.history):
            if number == 5:
                started.stop()
            tracker.log(row)
            tracker.send()
        tracker.finish(run.summary, folder)
        assert tracker.lost and tracker.seconds < 40
        [line] = capsys.readouterr().err.splitlines()
        where = f"postgresql+psycopg2://127.0.0.1:{started.port}/postgres"
        assert line.startswith(f"warning: MLflow store {where} was lost (") and PASSWORD not in line
        with pytest.raises(ConfigError) as refused:
            tracking.start(resolve(PARAMS, BENCHMARK, "sgd"), 0, run.environment)
        assert f"MLFLOW_TRACKING_URI: no tracking store answers at '{where}'" in str(refused.value)
        assert PASSWORD not in str(refused.value)
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    assert tracking.rebuild(root / "results") == (1, 0)


def test_the_ui_of_a_database_is_served_on_the_loopback_to_known_hosts_alone(
    database: Postgres, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    study.write_study(root / "results", PARAMS)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", database.address)
    tracking.rebuild(root / "results")
    port = free_port()
    server = subprocess.Popen(
        [sys.executable, "-m", "pipeline.tracking", "ui", "--port", str(port)],
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)}, cwd=root, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        assert server.stdout is not None
        assert f"http://mlflow.localhost:{port}/#/experiments/" in server.stdout.readline()
        wait_for(f"http://127.0.0.1:{port}/health")
        shown = Path(f"/proc/{server.pid}/cmdline")
        assert not shown.exists() or PASSWORD not in shown.read_text()
        question = f"http://127.0.0.1:{port}/api/2.0/mlflow/experiments/get-by-name?experiment_name={BENCHMARK}"
        for host, status in ((f"mlflow.localhost:{port}", 200), (f"127.0.0.1:{port}", 200), ("somewhere.example", 403)):
            try:
                asked = urllib.request.Request(question, headers={"Host": host})
                answered = urllib.request.urlopen(asked, timeout=20).status
            except urllib.error.HTTPError as refusal:
                answered = refusal.code
            assert answered == status, host
    finally:
        server.terminate()
        server.wait(60)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("postgresql+psycopg2://me:se@cret@host:5432/db?password=secret", "postgresql+psycopg2://host:5432/db"),
        ("https://me:secret@host/path", "https://host/path"),
        ("sqlite:////folder/mlflow.db", "sqlite:////folder/mlflow.db"),
        ("request to http://me:secret@host:80/api failed", "request to http://host:80/api failed"),
    ],
)
def test_credentials_are_left_out_of_what_is_printed(text: str, shown: str) -> None:
    assert store.without_credentials(text) == shown
