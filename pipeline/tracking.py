"""Training runs in MLflow: a view of the plain records, written while they are made and again from the files.

Nothing but this file and `pipeline.mlflow_store` knows MLflow, and it is imported only when a store is opened. Names
come from `pipeline.metrics`, live and in a rebuild. A run is identified by a checksum of its configuration and by its
seed: training the same again replaces the older run, another configuration stands beside it. Evaluations are sent when
a checkpoint holds them, so a run that was killed and goes on has every step once. The time of a metric is the training
clock, counted from one date that all runs share: the UI averages the times of a group of runs, and where one seed ends
early, starts that differ would tear the mean apart.
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

from pipeline import comparability, ui, views
from pipeline.checks import ConfigError
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
from pipeline.records import FILES, PICTURES, read_run
from pipeline.store import place, reason

if TYPE_CHECKING:
    from mlflow.entities import Metric, Run

    from pipeline.config import RunConfig

POINTS = 300  # a metric; the UI draws about as many
CLOCK_ZERO = 946_684_800  # seconds; training time 0 of every run, 2000-01-01 in UTC (the UI takes 0 for no time)
BATCH = 1000  # metrics a call, MLflow's own limit


# --------------------------------------------------------------------------------------------- one run


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
        tags = {
            "status": "running",
            "configuration": configuration_hash(config),
            "seed": str(seed),
            PROCESS_TAG: json.dumps({"machine": socket.gethostname(), **described_process()}),
            "comparability": comparability.text(comparability.key(config, environment)),
            views.GROUP_TAG: self._optimizer,
            "mlflow.runColor": views.colour(self._optimizer),
            "mlflow.user": "",
            "mlflow.source.name": "pipeline.train",
            "mlflow.source.type": "LOCAL",
        }
        for name in ("DVC_EXP_NAME", "DVC_STAGE", "DVC_EXP_BASELINE_REV"):
            if value := environment.get(name.lower()):
                tags[name] = str(value)
        if commit := environment.get("git_commit"):
            tags["git_commit"] = tags["mlflow.source.git.commit"] = str(commit)
        self._seed, self._configuration = seed, tags["configuration"]
        with store.turn():
            self._experiment = store.experiment(config["benchmark"], config["target_metric"])
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
        for first in range(0, len(new), BATCH):
            with self._store.turn():
                self._store.client.log_batch(self.run_id, metrics=new[first : first + BATCH])
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
                f"warning: MLflow store {self._store.place.address} was lost ({reason(error)}); the run goes on and its"
                " records will be complete; upload them later with `python -m pipeline.tracking rebuild`\n"
            )
        finally:
            self.seconds += time.perf_counter() - begin


def _points(metrics: Mapping[str, float], step: int, seconds: float) -> list[Metric]:
    from mlflow.entities import Metric

    timestamp = int((CLOCK_ZERO + seconds) * 1000)
    return [Metric(name, value, timestamp, step) for name, value in metrics.items()]


def start(
    run: RunConfig,
    seed: int,
    environment: Mapping[str, Any],
    run_id: str = "",
    history: Sequence[Mapping[str, Any]] = (),
    curvature: Sequence[Mapping[str, Any]] = (),
) -> Tracker:
    """Open the store and begin a run there, or go on with `run_id`, whose rows so far are given.

    Raises ConfigError in one line when the store cannot be used.
    """
    with _refusing():
        step = int(history[-1]["step"]) if history else 0
        tracker = Tracker(Store(), run.as_dict(), seed, environment, _started(environment), run_id, step)
    tracker.log_all(history, curvature)
    return tracker


def complete(folder: Path) -> None:
    """See to it that the store has a run that was over before its process was killed; a warning if it cannot be."""
    try:
        with _refusing():
            _upload(Store(), folder, {}, bring_back=False)
    except ConfigError as error:
        sys.stderr.write(f"warning: {error}; upload later with `python -m pipeline.tracking rebuild`\n")


@contextlib.contextmanager
def _refusing() -> Iterator[None]:
    """Turn what a store may raise before the first step into one line."""
    try:
        yield
    except (ConfigError, KeyboardInterrupt):
        raise
    except Exception as error:
        raise ConfigError(f"{place().address}: the MLflow store cannot be used: {reason(error)}") from None


# --------------------------------------------------------------------------------------------- again from the files


def rebuild(results: Path, *, bring_back: bool = True) -> tuple[int, int]:
    """Bring every record below `results` into the store that is not there; (uploaded, already there).

    Doing it twice changes nothing. A run that was deleted in the UI comes back only if `bring_back`.
    """
    folders = sorted(summary.parent for summary in results.glob("*/*/seed-*/summary.json"))
    if not folders:
        raise ConfigError(f"{results}: no run records ({results}/<benchmark>/<optimizer>/seed-<k>); run `dvc repro`")
    store = Store()
    there: dict[str, dict[str, Run]] = {}
    uploaded = sum(_upload(store, folder, there, bring_back) for folder in folders)
    return uploaded, len(folders) - uploaded


def _upload(store: Store, folder: Path, there: dict[str, dict[str, Run]], bring_back: bool) -> bool:
    """Bring one record into the store if need be; `there` has the runs of experiments that were asked for."""
    run = read_run(folder)
    with store.turn():
        experiment = store.experiment(run.config["benchmark"], run.config["target_metric"])
    if experiment not in there:
        found = store.runs(experiment, deleted=True)
        there[experiment] = {r.data.tags["records"]: r for r in found if "records" in r.data.tags}
    known = there[experiment].get(records_hash(folder))
    if known is not None and (known.info.lifecycle_stage == "active" or not bring_back):
        return False
    if known is not None:
        store.client.restore_run(known.info.run_id)
        return True
    seed = int(run.summary["seed"])
    tracker = Tracker(store, run.config, seed, run.environment, _started(run.environment))
    tracker.log_all(run.history, run.curvature)
    tracker.finish(run.summary, folder)
    if tracker.lost:
        raise ConfigError(f"{store.place.address}: lost while {folder} was uploaded; rebuild again later")
    return True


def _started(environment: Mapping[str, Any]) -> float:
    return float(environment.get("start_time") or time.time())


# --------------------------------------------------------------------------------------------- the command


def main(arguments: list[str] | None = None) -> None:
    """`python -m pipeline.tracking rebuild [results] | views [--port N] | ui [--port N]`"""
    import argparse

    parser = argparse.ArgumentParser(prog="python -m pipeline.tracking", description="Training runs in MLflow.")
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("rebuild", help="bring all run records into the store")
    command.add_argument("results", nargs="?", default="results", type=Path)
    for name, purpose in (("views", "print the link of each comparison"), ("ui", "serve the UI on this machine")):
        command = commands.add_parser(name, help=purpose)
        command.add_argument("--port", type=int, default=5000)
    given = parser.parse_args(arguments)
    try:
        with _refusing():
            if given.command == "rebuild":
                uploaded, there = rebuild(given.results)
                print(f"{place().address}: {uploaded} runs uploaded, {there} were there")
            elif given.command == "views" or place().database is None:
                ui.print_links(Store(), given.port)
            else:
                ui.check_port(given.port)
                if any(Path("results").glob("*/*/seed-*/summary.json")):
                    rebuild(Path("results"), bring_back=False)
                ui.serve(Store(), given.port)
    except ConfigError as error:
        sys.stderr.write(f"error: {error}\n")
        sys.exit(2)


if __name__ == "__main__":
    main()
