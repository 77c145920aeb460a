"""An open MLflow store: the experiments of the benchmarks, their runs, and the names of their groups."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import socket
from collections.abc import Iterator
from typing import TYPE_CHECKING

from pipeline import views
from pipeline.checks import ConfigError
from pipeline.interruption import is_running
from pipeline.store import ALLOWED, VARIABLE, place, reason, within

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

START_WITHIN = 9.0  # seconds a tracking server has to answer at the start
PROCESS_TAG = "process"  # of a run: machine and process that write it


class Store:
    """An open tracking store: its `place`, a `client`, and `turn`, which keeps writers of a local store in a queue."""

    def __init__(self) -> None:
        self.place = place()
        with self.place.turn():
            self.place.check()
            self.client = _client(self.place.address)
        self._file = self._identity()

    @contextlib.contextmanager
    def turn(self) -> Iterator[None]:
        """Have a local store for oneself. SQLite would go on writing to a file that was deleted; here that raises."""
        with self.place.turn():
            if self._identity() != self._file:
                raise FileNotFoundError("the file is gone")
            yield

    def _identity(self) -> tuple[int, int] | None:
        database = self.place.database
        if database is None or not database.exists():
            return None
        found = database.stat()
        return found.st_dev, found.st_ino

    def experiment(self, benchmark: str, target_metric: str) -> str:
        """Identifier of the benchmark's experiment, made or brought back if need be, with its prefilled view."""
        from mlflow.exceptions import MlflowException

        found = self.client.get_experiment_by_name(benchmark)
        if found is None:
            location = None
            if self.place.database is not None:
                location = (self.place.database.parent / "mlartifacts" / benchmark).as_uri()
            with contextlib.suppress(MlflowException):  # another process was faster
                self.client.create_experiment(benchmark, artifact_location=location)
            found = self.client.get_experiment_by_name(benchmark)
            assert found is not None
        if found.lifecycle_stage == "deleted":
            self.client.restore_experiment(found.experiment_id)
        view = views.comparison(target_metric)
        if found.tags.get(views.VIEW_TAG) != view:
            self.client.set_experiment_tag(found.experiment_id, views.VIEW_TAG, view)
            self.client.set_experiment_tag(found.experiment_id, "mlflow.note.content", views.note(benchmark))
        return found.experiment_id

    def runs(self, experiment: str, condition: str = "", *, deleted: bool = False) -> list[Run]:
        """All runs of an experiment that meet a condition, the oldest first."""
        from mlflow.entities import ViewType

        found: list[Run] = []
        token = None
        while True:
            page = self.client.search_runs(
                [experiment],
                condition,
                run_view_type=ViewType.ALL if deleted else ViewType.ACTIVE_ONLY,
                max_results=1000,
                order_by=["attributes.start_time ASC"],
                page_token=token,
            )
            found.extend(page)
            token = page.token
            if not token:
                return found

    def bury(self, experiment: str) -> int:
        """Mark runs as killed that seem to go on although their process on this machine is gone; how many."""
        buried = 0
        for run in self.runs(experiment, "attributes.status = 'RUNNING'"):
            process = json.loads(run.data.tags.get(PROCESS_TAG, "{}"))
            if process.get("machine") == socket.gethostname() and not is_running(process):
                self.end_as_killed(run.info.run_id)
                buried += 1
        return buried

    def end_as_killed(self, run_id: str) -> None:
        self.client.set_tag(run_id, "status", "killed")
        self.client.set_terminated(run_id, status="KILLED")

    def label(self, experiment: str, optimizer: str) -> None:
        """Name the groups of the charts: the optimizer, and where its runs differ in settings, those settings."""
        runs = self.runs(experiment, f"params.optimizer = '{optimizer}'")
        values: dict[str, set[str | None]] = {}
        for key in {key for run in runs for key in run.data.params} - {"seed"}:
            values[key] = {run.data.params.get(key) for run in runs}
        differing = sorted(key for key, seen in values.items() if len(seen) > 1)
        for run in runs:
            words = [
                f"{key.removeprefix('optimizer.')}={run.data.params[key]}"
                for key in differing
                if key in run.data.params
            ]
            setting = " ".join([optimizer, *words])
            if run.data.tags.get(views.GROUP_TAG) != setting:
                self.client.set_tag(run.info.run_id, views.GROUP_TAG, setting)
                self.client.set_tag(run.info.run_id, "mlflow.runColor", views.colour(setting))


def _client(address: str) -> MlflowClient:
    """A client that answered once. A server that cannot be reached is refused; MLflow's own chatter is turned off."""
    for name, value in {
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
        "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
        "MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR": "1",
        "GIT_PYTHON_REFRESH": "quiet",
    }.items():
        os.environ.setdefault(name, value)
    from mlflow import MlflowClient

    for name in ("mlflow", "alembic", "urllib3"):
        logging.getLogger(name).setLevel(logging.CRITICAL)

    def connect() -> MlflowClient:
        client = MlflowClient(tracking_uri=address)
        client.search_experiments(max_results=1)
        return client

    if address.startswith("sqlite:"):
        return connect()
    try:
        return within(START_WITHIN, connect)
    except Exception as error:
        message = f"{VARIABLE}: no tracking server answers at {address!r} ({reason(error)})"
        raise ConfigError(f"{message}; allowed: {ALLOWED}") from None
