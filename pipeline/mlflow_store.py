"""An open MLflow store: the experiments of the benchmarks, their runs, and the names of their groups."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import socket
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline import notes, views
from pipeline.checks import ConfigError
from pipeline.interruption import is_running
from pipeline.store import ALLOWED, VARIABLE, Place, place, reason, within

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Experiment, Run

START_WITHIN = 9.0  # seconds a tracking server has to answer at the start
PROCESS_TAG = "process"  # of a run: machine and process that write it


class Store:
    """An open tracking store: its `place`, a `client`, and `turn`, which keeps writers of a local store in a queue."""

    def __init__(self) -> None:
        self.place = place()
        with self.place.opening():
            self.place.check()
            self.client = _client(self.place)
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

    def of_run(self, config: Mapping[str, Any], environment: Mapping[str, Any]) -> str:
        """Identifier of the experiment that has such a run: its benchmark's, or that of the benchmark's tuning."""
        view = views.comparison(config["target_metric"])
        if notes.is_trial(environment):
            return self._experiment(config["benchmark"] + notes.TUNING, view, notes.of_tuning(config))
        return self._experiment(config["benchmark"], view, notes.of_benchmark(config))

    def of_means(self, config: Mapping[str, Any]) -> str:
        """Identifier of the experiment that has the means over their seeds."""
        view = views.means(config["target_metric"])
        return self._experiment(config["benchmark"] + notes.MEANS, view, notes.of_means(config))

    def _experiment(self, name: str, view: str, note: str) -> str:
        """The experiment, made or brought back if need be, with its prefilled view and its description."""
        from mlflow.exceptions import MlflowException

        found = self.client.get_experiment_by_name(name)
        if found is None:
            location = None if self.place.is_server else (self.place.folder / "mlartifacts" / name).as_uri()
            with contextlib.suppress(MlflowException):  # another process was faster
                self.client.create_experiment(name, artifact_location=location)
            found = self.client.get_experiment_by_name(name)
            assert found is not None
        if found.lifecycle_stage == "deleted":
            self.client.restore_experiment(found.experiment_id)
        for tag, value in ((views.VIEW_TAG, view), ("mlflow.note.content", note)):
            if found.tags.get(tag) != value:
                self.client.set_experiment_tag(found.experiment_id, tag, value)
        return found.experiment_id

    def experiments(self) -> list[Experiment]:
        """Those that this file made, by name."""
        found = self.client.search_experiments(max_results=1000)
        return sorted((e for e in found if views.VIEW_TAG in e.tags), key=lambda e: e.name)

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
            if self.is_dead(run):
                self.end_as_killed(run.info.run_id)
                buried += 1
        return buried

    def is_dead(self, run: Run) -> bool:
        """Whether the process that writes a run was on this machine and is gone."""
        process = json.loads(run.data.tags.get(PROCESS_TAG, "{}"))
        return process.get("machine") == socket.gethostname() and not is_running(process)

    def end_as_killed(self, run_id: str) -> None:
        self.client.set_tag(run_id, "status", "killed")
        self.client.set_terminated(run_id, status="KILLED")

    def label(self, experiment: str, optimizer: str) -> None:
        """Name the groups of the charts: the optimizer, and where its runs differ in settings, those settings.

        Means have the name of their group. Settings that only some runs have tell nothing apart, they come from other
        versions of the code; where no other differs, the configuration's checksum does.
        """
        runs = self.runs(experiment, f"params.optimizer = '{optimizer}' and tags.configuration LIKE '%'")
        settings = {run.data.tags["configuration"]: run.data.params for run in runs}
        shared = set.intersection(*(set(params) for params in settings.values())) if settings else set()
        seen = {name: {params[name] for params in settings.values()} for name in shared - {"seed", "seeds"}}
        differing = sorted(name for name, values in seen.items() if len(values) > 1)
        labels = {}
        for configuration, params in settings.items():
            words = (f"{name.removeprefix('optimizer.')}={params[name]}" for name in differing)
            labels[configuration] = " ".join([optimizer, *words])
        taken = Counter(labels.values())
        for run in runs:
            configuration, tags = run.data.tags["configuration"], run.data.tags
            label = labels[configuration] + (f" {configuration}" if taken[labels[configuration]] > 1 else "")
            if tags.get(views.GROUP_TAG) != label:
                self.client.set_tag(run.info.run_id, views.GROUP_TAG, label)
                self.client.set_tag(run.info.run_id, "mlflow.runColor", views.colour(label))
            if "seeds" in tags and run.info.run_name != label + notes.MEANS:
                self.client.update_run(run.info.run_id, name=label + notes.MEANS)


def _client(place: Place) -> MlflowClient:
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
        if place.database is not None and not (place.database.exists() and place.database.stat().st_size):
            _make(place.database)
        if place.database is None and not place.is_server:
            _ask_database(place.address)
        client = MlflowClient(tracking_uri=place.address)
        client.search_experiments(max_results=1)
        return client

    if place.database is not None:
        return connect()
    try:
        return within(START_WITHIN, connect)
    except Exception as error:
        message = f"{VARIABLE}: no tracking {'server' if place.is_server else 'store'} answers at {str(place)!r}"
        raise ConfigError(f"{message} ({reason(error)}); allowed: {ALLOWED}") from None


def _make(database: Path) -> None:
    """A new SQLite store, whole or not at all: what MLflow leaves when it is killed meanwhile, it never opens again."""
    from mlflow import MlflowClient

    partial = database.with_name(f"{database.name}.partial")
    for old in database.parent.glob(f"{partial.name}*"):
        old.unlink()
    MlflowClient(tracking_uri=f"sqlite:///{partial}").search_experiments(max_results=1)
    os.replace(partial, database)


def _ask_database(address: str) -> None:
    """Raises at once when it does not answer; MLflow would go on trying."""
    import sqlalchemy

    engine = sqlalchemy.create_engine(address)
    try:
        engine.connect().close()
    finally:
        engine.dispose()
