"""The MLflow store of a workspace, read through MLflow's own client."""

from __future__ import annotations

import sqlite3
import tempfile
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from mlflow import MlflowClient


@dataclass(frozen=True)
class Tracked:
    """A run as MLflow has it. `series`: metric -> (step, value, milliseconds) of every point."""

    benchmark: str
    name: str
    status: str
    params: dict[str, str]
    tags: dict[str, str]
    series: dict[str, list[tuple[int, float, int]]]
    files: set[str]


def tracked(root: Path, means: bool = False) -> list[Tracked]:
    """The training runs of the store in a workspace's root, or the means over their seeds.

    A copy is read: MLflow keeps its connection to a path, and would go on showing a store that was deleted.
    """
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "mlflow.db"
        with closing(sqlite3.connect(root / "mlflow.db")) as store, closing(sqlite3.connect(copy)) as target:
            store.backup(target)
        runs = _runs(MlflowClient(tracking_uri=f"sqlite:///{copy}"))
        return [run for run in runs if run.benchmark.endswith(" mean") == means]


def _runs(client: MlflowClient) -> list[Tracked]:
    found = []
    for experiment in client.search_experiments():
        for run in client.search_runs([experiment.experiment_id], max_results=1000):
            run_id = run.info.run_id
            series = {
                name: [(point.step, point.value, point.timestamp) for point in client.get_metric_history(run_id, name)]
                for name in run.data.metrics
            }
            found.append(
                Tracked(
                    benchmark=experiment.name,
                    name=str(run.info.run_name),
                    status=run.info.status,
                    params=run.data.params,
                    tags=run.data.tags,
                    series=series,
                    files={file.path for file in client.list_artifacts(run_id)},
                )
            )
    return found
