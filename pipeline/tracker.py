"""One training run in MLflow, while it is made and again from its files; and the mean of a pair's runs.

A run is identified by a checksum of its configuration and by its seed: training the same again replaces the older run,
another configuration stands beside it. Evaluations are sent when a checkpoint holds them, so a run that was killed and
goes on has every step once. The time of a metric is the training clock, counted from one date that all runs share: the
UI averages the times of a group of runs, and where one seed ends early, starts that differ would tear the mean apart.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import math
import socket
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline import comparability, means, notes, views
from pipeline.interruption import described_process
from pipeline.metrics import (
    configuration_hash,
    curvature_metrics,
    history_metrics,
    parameters,
    records_hash,
    summary_metrics,
)
from pipeline.mlflow_store import PROCESS_TAG, Store
from pipeline.records import FILES, PICTURES, seed_folder
from pipeline.records import Run as Records
from pipeline.store import reason

if TYPE_CHECKING:
    from mlflow.entities import Metric

POINTS = 300  # a metric; the UI draws about as many
CLOCK_ZERO = 946_684_800  # seconds; training time 0 of every run, 2000-01-01 in UTC (the UI takes 0 for no time)
BATCH = 1000  # metrics a call, MLflow's own limit


class Tracker:
    """One training run in the store. Nothing here raises: a store that is lost is one warning, and the run goes on.

    `seconds` is what tracking has cost so far; the caller keeps it off the training clock. A run that goes on from a
    checkpoint has its `run_id` and the `step` it had reached, and is told its evaluations again; what the store has of
    them is not sent twice.
    """

    def __init__(
        self,
        store: Store,
        config: Mapping[str, Any],
        seed: int,
        environment: Mapping[str, Any],
        started: float,
        run_id: str = "",
        step: int = 0,
    ) -> None:
        self.seconds = 0.0
        self.lost = False
        self._store = store
        self._started = started
        self._optimizer = str(config["optimizer"])
        self._stride = max(1, math.ceil(config["steps"] / config["evaluate_every"] / POINTS))
        self._rows = 0
        self._held: list[Metric] | None = None  # the latest evaluation, when it was thinned out
        self._waiting: list[Metric] = []
        self._there: set[tuple[str, int]] = set()  # metrics and steps that the store has of an earlier process

        from mlflow.entities import Param

        flat = parameters({**config, "seed": seed})
        record = seed_folder("results", config["benchmark"], config["optimizer"], seed).as_posix()
        if notes.is_trial(environment):
            record = f"trials/{config['benchmark']}/{config['optimizer']}"
        tags = {
            "status": "running",
            "seed": str(seed),
            "record": record,
            **_tags(config, environment),
            "mlflow.note.content": notes.of_run(record, environment),
        }
        self._seed, self._configuration = seed, tags["configuration"]
        with store.turn():
            self._experiment = store.of_run(config, environment)
            store.bury(self._experiment)
            if run_id and self._go_on(run_id, step, tags):
                self.run_id = run_id
            else:
                run = store.client.create_run(
                    self._experiment,
                    start_time=int(started * 1000),
                    tags=tags,
                    run_name=f"{self._optimizer} seed {seed}",
                )
                self.run_id = run.info.run_id
                store.client.log_batch(self.run_id, params=[Param(key, value[:6000]) for key, value in flat.items()])
            store.label(self._experiment, self._optimizer)
        atexit.register(self._abandon)

    def _go_on(self, run_id: str, step: int, tags: Mapping[str, str]) -> bool:
        """Open the run of an earlier process again; False if the store has none that can go on from this step."""
        from mlflow.exceptions import MlflowException

        client = self._store.client
        try:
            run = client.get_run(run_id)
        except MlflowException:
            return False
        ended = run.info.status not in ("RUNNING", "KILLED") or run.info.lifecycle_stage != "active"
        if ended or run.data.tags.get("configuration") != tags["configuration"]:
            return False
        there = {(name, point.step) for name in run.data.metrics for point in client.get_metric_history(run_id, name)}
        if any(logged > step for _, logged in there):  # it went on from a checkpoint before the last: other clocks
            client.delete_run(run_id)
            return False
        self._there = there
        client.update_run(run_id, status="RUNNING")
        for name, value in tags.items():
            client.set_tag(run_id, name, value)
        return True

    def log(self, row: Mapping[str, Any], curvature_rows: Iterable[Mapping[str, Any]] = ()) -> None:
        """Take the numbers of one evaluation; `send` sends them."""
        if self.lost:
            return
        with self._safely():
            metrics = {**history_metrics(row), **curvature_metrics(curvature_rows)}
            points = _points(metrics, int(row["step"]), float(row["training_seconds"]))
            kept = self._rows % self._stride == 0
            self._rows += 1
            self._held = None if kept else points
            if kept:
                self._waiting += points

    def log_all(self, history: Iterable[Mapping[str, Any]], curvature: Iterable[Mapping[str, Any]]) -> None:
        """Take the rows of a record, or of a checkpoint."""
        diagnosed: dict[int, list[Any]] = {}
        for row in curvature:
            diagnosed.setdefault(int(row["step"]), []).append(row)
        for row in history:
            self.log(row, diagnosed.get(int(row["step"]), ()))

    def send(self) -> None:
        """Send what was logged; a checkpoint has it now."""
        if not self.lost:
            with self._safely():
                self._send()

    def finish(self, summary: Mapping[str, Any], folder: Path) -> None:
        """Send the rest, the summary and the record files below `folder`; replace older runs of the same kind."""
        if self.lost:
            return
        begin = time.perf_counter()
        with self._safely():
            from mlflow.entities import RunTag

            client, status = self._store.client, str(summary["status"])
            self._waiting += self._held or []
            # Figures of the whole run stand at step 0: the UI draws bars of them, not lines of one point.
            self._waiting += _points(summary_metrics(summary), 0, 0.0)
            self._attach(folder)
            self._send()
            with self._store.turn():
                tags = {"status": status}
                if summary.get("message"):
                    tags["message"] = str(summary["message"])[:500]
                cost = {"time/tracking_seconds": self.seconds + time.perf_counter() - begin}
                client.log_batch(
                    self.run_id,
                    metrics=_points(cost, 0, 0.0),
                    tags=[RunTag(key, value) for key, value in tags.items()],
                )
                elapsed = sum(
                    float(summary.get(key) or 0)
                    for key in ("training_seconds", "evaluation_seconds", "diagnostics_seconds")
                )
                client.set_terminated(
                    self.run_id,
                    status="FAILED" if status == "failed" else "FINISHED",
                    end_time=int((self._started + elapsed) * 1000),
                )
                if status != "failed":
                    self._replace_older()
                self._store.label(self._experiment, self._optimizer)
                client.set_tag(self.run_id, "records", records_hash(folder))  # last: it says that all is there
        atexit.unregister(self._abandon)

    def _attach(self, folder: Path) -> None:
        """Keep the record files with the run. Where a server stores files is another place, and may be out of reach."""
        try:
            for name in (*FILES, *PICTURES):
                if (folder / name).exists():
                    self._store.client.log_artifact(self.run_id, str(folder / name))
        except Exception as error:
            sys.stderr.write(f"warning: MLflow did not take the files of {folder} ({reason(error)}); they stay there\n")

    def _abandon(self) -> None:
        """At the end of a process that was interrupted: without this the run would seem to go on for ever."""
        with self._safely(), self._store.turn():
            self._store.end_as_killed(self.run_id)

    def _replace_older(self) -> None:
        for run in self._store.runs(self._experiment, f"tags.configuration = '{self._configuration}'"):
            seed = run.data.params.get("seed", run.data.tags.get("seed"))  # killed at its start it has no parameters
            if seed == str(self._seed) and run.info.run_id != self.run_id:
                self._store.client.delete_run(run.info.run_id)

    def _send(self) -> None:
        new = [point for point in self._waiting if (point.key, point.step) not in self._there]
        _log(self._store, self.run_id, new)
        self._waiting = []

    @contextlib.contextmanager
    def _safely(self) -> Iterator[None]:
        begin = time.perf_counter()
        try:
            yield
        except Exception as error:
            self.lost = True
            atexit.unregister(self._abandon)
            sys.stderr.write(
                f"warning: MLflow store {self._store.place} was lost ({reason(error)}); the run goes on and its"
                " records will be complete; upload them later with `python -m pipeline.tracking rebuild`\n"
            )
        finally:
            self.seconds += time.perf_counter() - begin


def put_mean(store: Store, runs: Sequence[Records]) -> bool:
    """Bring the mean of a pair's runs into the store, in the place of the one before; False if it is there already."""
    from mlflow.entities import Param

    config, environment, client = runs[0].config, runs[0].environment, store.client
    seeds = [int(run.summary["seed"]) for run in runs]
    tags, checksum = _tags(config, environment), means.checksum(runs)
    with store.turn():
        experiment = store.of_means(config)
        older = store.runs(experiment, f"tags.configuration = '{tags['configuration']}'")
        if [run.data.tags.get("records") for run in older] == [checksum]:
            return False
        run = client.create_run(
            experiment,
            start_time=int(started(environment) * 1000),
            tags={
                **tags,
                "seeds": ", ".join(map(str, seeds)),
                "mlflow.source.name": "pipeline.aggregate",
                "mlflow.note.content": notes.of_mean(config["benchmark"], config["optimizer"], seeds),
            },
            run_name=config["optimizer"] + notes.MEANS,
        )
        run_id = run.info.run_id
        flat = parameters({key: value for key, value in config.items() if key != "seed"})
        client.log_batch(run_id, params=[Param(key, value[:6000]) for key, value in flat.items()])
    points = _points(means.summary(runs), 0, 0.0)
    rows = list(means.curves(runs))
    stride = max(1, math.ceil(len(rows) / POINTS))
    for step, seconds, metrics in [*rows[:-1:stride], *rows[-1:]]:
        points += _points(metrics, step, seconds)
    _log(store, run_id, points)
    with store.turn():
        client.set_terminated(run_id)
        client.set_tag(run_id, "records", checksum)  # it says that all is there
        for run in store.runs(experiment, f"tags.configuration = '{tags['configuration']}'"):
            written_meanwhile = run.info.status == "RUNNING" and not store.is_dead(run)
            if run.info.run_id != run_id and not written_meanwhile:
                client.delete_run(run.info.run_id)
        store.label(experiment, config["optimizer"])
    return True


def started(environment: Mapping[str, Any]) -> float:
    return float(environment.get("start_time") or time.time())


def _tags(config: Mapping[str, Any], environment: Mapping[str, Any]) -> dict[str, str]:
    """The tags that the runs of a pair share."""
    optimizer = str(config["optimizer"])
    tags = {
        "configuration": configuration_hash(config),
        PROCESS_TAG: json.dumps({"machine": socket.gethostname(), **described_process()}),
        "comparability": comparability.text(comparability.key(config, environment)),
        views.GROUP_TAG: optimizer,
        "mlflow.runColor": views.colour(optimizer),
        "mlflow.user": "",
        "mlflow.source.name": "pipeline.train",
        "mlflow.source.type": "LOCAL",
    }
    for name in ("study", "device", "git_commit", "DVC_EXP_NAME", "DVC_STAGE", "DVC_EXP_BASELINE_REV"):
        if value := environment.get(name.lower()):
            tags[name] = str(value)
    if "git_commit" in tags:
        tags["mlflow.source.git.commit"] = tags["git_commit"]
    return tags


def _log(store: Store, run_id: str, points: Sequence[Metric]) -> None:
    for first in range(0, len(points), BATCH):
        with store.turn():
            store.client.log_batch(run_id, metrics=points[first : first + BATCH])


def _points(metrics: Mapping[str, float], step: int, seconds: float) -> list[Metric]:
    from mlflow.entities import Metric

    timestamp = int((CLOCK_ZERO + seconds) * 1000)
    return [Metric(name, value, timestamp, step) for name, value in metrics.items()]
