"""MLflow as a view of the plain records: what stages call, and what brings store and records together again.

| call | from |
|---|---|
| `start` gives the `Tracker` of a run that trains, `complete` sees to one that was over before | stage `train` |
| `show_means` brings the means over seeds, `links` says where the runs are | stage `aggregate` |
| `rebuild`, `check`, `ui`, `views` | `python -m pipeline.tracking …` |

Nothing but this file, `pipeline.tracker` and `pipeline.mlflow_store` knows MLflow, and it is imported only when a store
is opened. Names come from `pipeline.metrics`, live and in a rebuild. Training and `aggregate` never fail because of a
store that was there when they began.
"""

from __future__ import annotations

import contextlib
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline import means, ui
from pipeline.checks import ConfigError
from pipeline.metrics import configuration_hash, records_hash
from pipeline.mlflow_store import Store
from pipeline.records import Run, read_run
from pipeline.store import place, reason
from pipeline.tracker import Tracker, put_mean, started

if TYPE_CHECKING:
    from mlflow.entities import Run as Tracked

    from pipeline.config import RunConfig


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
        tracker = Tracker(Store(), run.as_dict(), seed, environment, started(environment), run_id, step)
    tracker.log_all(history, curvature)
    return tracker


def complete(folder: Path) -> None:
    """See to it that the store has a run that was over before its process was killed; a warning if it cannot be."""
    try:
        with _refusing():
            _upload(Store(), folder, {}, bring_back=False)
    except ConfigError as error:
        sys.stderr.write(f"warning: {error}; upload later with `python -m pipeline.tracking rebuild`\n")


def show_means(study: Mapping[str, Mapping[str, Sequence[Run]]]) -> None:
    """Bring the means over seeds of all pairs into the store; a warning if it cannot be."""
    try:
        with _refusing():
            store = Store()
            for pairs in study.values():
                for runs in pairs.values():
                    put_mean(store, runs)
    except ConfigError as error:
        sys.stderr.write(f"warning: {error}; the means are uploaded by `python -m pipeline.tracking rebuild`\n")


@contextlib.contextmanager
def _refusing() -> Iterator[None]:
    """Turn what a store may raise into one line."""
    try:
        yield
    except (ConfigError, KeyboardInterrupt):
        raise
    except Exception as error:
        raise ConfigError(f"{place()}: the MLflow store cannot be used: {reason(error)}") from None


# --------------------------------------------------------------------------------------------- records and runs


@dataclass(frozen=True)
class Link:
    """Where a run is: identifiers of its experiment and of itself, and the address of its page."""

    experiment: str
    run: str
    address: str


def links(study: Mapping[str, Mapping[str, Sequence[Run]]]) -> dict[tuple[str, str, int], Link]:
    """The runs that stand for these records, by benchmark, optimizer and seed; without those that are not there.

    A store that cannot be asked has none.
    """
    found = {}
    try:
        with _refusing():
            store = Store()
            base = ui.address(store)
            there = {run.data.tags["records"]: run for run in _runs(store) if "records" in run.data.tags}
            for benchmark, pairs in study.items():
                for optimizer, runs in pairs.items():
                    for run in runs:
                        if tracked := there.get(records_hash(run.folder)):
                            experiment, run_id = tracked.info.experiment_id, tracked.info.run_id
                            link = Link(experiment, run_id, f"{base}/#/experiments/{experiment}/runs/{run_id}")
                            found[benchmark, optimizer, int(run.summary["seed"])] = link
    except ConfigError as error:
        sys.stderr.write(f"warning: {error}; the report has no links to MLflow\n")
    return found


def rebuild(results: Path, *, bring_back: bool = True) -> tuple[int, int]:
    """Bring every record below `results` into the store that is not there, and the means; (uploaded, already there).

    So are the records of a tuning's trials, in `trials` beside it. Doing it twice changes nothing. A run that was
    deleted in the UI comes back only if `bring_back`.
    """
    folders = _folders(results)
    every = [*folders, *_trials(results)]
    if not every:
        raise ConfigError(f"{results}: no run records ({results}/<benchmark>/<optimizer>/seed-<k>); run `dvc repro`")
    store = Store()
    there: dict[str, dict[str, Tracked]] = {}
    uploaded = sum(_upload(store, folder, there, bring_back) for folder in every)
    for runs in _pairs(folders):
        put_mean(store, runs)
    return uploaded, len(every) - uploaded


def check(results: Path) -> list[str]:
    """A line for each run without a record and each record without a run; means and trials of a tuning count as both.

    Records of an experiment that DVC still has are in its cache, and a run that goes on has none yet.
    """
    store, folders = Store(), _folders(results)
    records = {records_hash(folder): str(folder) for folder in [*folders, *_trials(results)]}
    records |= {means.checksum(runs): f"{runs[0].folder.parent}: the mean over its seeds" for runs in _pairs(folders)}
    kept, lines, missing = _experiments_of_dvc(), [], dict(records)
    names = {experiment.experiment_id: experiment.name for experiment in store.experiments()}
    for run in _runs(store):
        tags = run.data.tags
        known = tags.get("records", "") in records
        missing.pop(tags.get("records", ""), None)
        goes_on = run.info.status == "RUNNING" and not store.is_dead(run)
        if not (known or goes_on or tags.get("DVC_EXP_NAME") in kept):
            where = f"experiment {run.info.experiment_id}, run {run.info.run_id}, {tags.get('status', 'no status')}"
            lines.append(
                f"{names[run.info.experiment_id]} {run.info.run_name} ({where}): has no record below {results}"
            )
    return lines + [f"{what}: has no run in {store.place}" for what in missing.values()]


def _runs(store: Store) -> list[Tracked]:
    return [run for experiment in store.experiments() for run in store.runs(experiment.experiment_id)]


def _folders(results: Path) -> list[Path]:
    return sorted(summary.parent for summary in results.glob("*/*/seed-*/summary.json"))


def _trials(results: Path) -> list[Path]:
    """The records of a tuning's trials; of a setting that was trained again after code changed, the latest."""
    latest: dict[tuple[str, int], Run] = {}
    found = [read_run(path.parent) for path in (results.parent / "trials").glob("*/*/*/seed-*/summary.json")]
    for run in sorted(found, key=lambda run: (started(run.environment), run.folder)):
        latest[configuration_hash(run.config), int(run.summary["seed"])] = run
    return sorted(run.folder for run in latest.values())


def _pairs(folders: Sequence[Path]) -> list[list[Run]]:
    """The records of each pair, in the order of its seeds."""
    pairs: dict[Path, list[Run]] = {}
    for folder in folders:
        pairs.setdefault(folder.parent, []).append(read_run(folder))
    return [sorted(runs, key=lambda run: run.summary["seed"]) for runs in pairs.values()]


def _experiments_of_dvc() -> set[str]:
    """Names of the experiments in this repository, those of a run that was interrupted too."""
    words = ["git", "for-each-ref", "--format=%(refname:lstrip=-1)", "refs/exps"]
    try:
        answer = subprocess.run(words, capture_output=True, text=True, check=False)
    except OSError:
        return set()
    return set(answer.stdout.split())


def _upload(store: Store, folder: Path, there: dict[str, dict[str, Tracked]], bring_back: bool) -> bool:
    """Bring one record into the store if need be; `there` has the runs of experiments that were asked for."""
    run = read_run(folder)
    with store.turn():
        experiment = store.of_run(run.config, run.environment)
    if experiment not in there:
        found = store.runs(experiment, deleted=True)
        there[experiment] = {r.data.tags["records"]: r for r in found if "records" in r.data.tags}
    known = there[experiment].get(records_hash(folder))
    if known is not None and (known.info.lifecycle_stage == "active" or not bring_back):
        return False
    if known is not None:
        store.client.restore_run(known.info.run_id)
        return True
    tracker = Tracker(store, run.config, int(run.summary["seed"]), run.environment, started(run.environment))
    tracker.log_all(run.history, run.curvature)
    tracker.finish(run.summary, folder)
    if tracker.lost:
        raise ConfigError(f"{store.place}: lost while {folder} was uploaded; rebuild again later")
    return True


# --------------------------------------------------------------------------------------------- the command


def main(arguments: list[str] | None = None) -> None:
    """`python -m pipeline.tracking rebuild [results] | check [results] | views [--port N] | ui [--port N]`"""
    import argparse

    parser = argparse.ArgumentParser(prog="python -m pipeline.tracking", description="Training runs in MLflow.")
    commands = parser.add_subparsers(dest="command", required=True)
    for name, purpose in (
        ("rebuild", "bring all run records into the store"),
        ("check", "list runs without records and records without runs; exit status 1 if there are any"),
    ):
        command = commands.add_parser(name, help=purpose)
        command.add_argument("results", nargs="?", default="results", type=Path)
    for name, purpose in (("views", "print the link of each comparison"), ("ui", "serve the UI on this machine")):
        command = commands.add_parser(name, help=purpose)
        command.add_argument("--port", type=int, default=ui.PORT)
    given = parser.parse_args(arguments)
    try:
        with _refusing():
            if given.command == "rebuild":
                uploaded, there = rebuild(given.results)
                print(f"{place()}: {uploaded} runs uploaded, {there} were there")
            elif given.command == "check":
                if lines := check(given.results):
                    print("\n".join(lines))
                    sys.exit(1)
                print(f"{place()}: every run has its record, every record below {given.results} its run")
            elif given.command == "views" or place().is_server:
                ui.print_links(Store(), given.port)
            else:
                ui.check_port(given.port)
                if _folders(Path("results")) or _trials(Path("results")):
                    rebuild(Path("results"), bring_back=False)
                ui.serve(Store(), given.port)
    except ConfigError as error:
        sys.stderr.write(f"error: {error}\n")
        sys.exit(2)


if __name__ == "__main__":
    main()
