"""Trains the trials of a tuning on a Ray cluster: one task a trial, with its share of a GPU.

The one idea: a task is the pipeline's own stages in a folder of its node, data then `train`, and its records come back
as files. Ray places and moves them. A task that brings none, because its worker died or its training failed, is given
again, and on the same node its training goes on from its checkpoint. RAY_ADDRESS names a cluster (`auto`: the one that
this machine belongs to), on whose nodes Python has the packages of requirements.lock; without it Ray starts on this
machine.

What a node keeps (downloads, checkpoints, an MLflow store if MLFLOW_TRACKING_URI names no server) lies below a folder
`kfac-bench` of its place for temporary files.
"""

from __future__ import annotations

import logging
import os
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pipeline.checks import ConfigError
from pipeline.composition import ROOT, compose
from pipeline.store import place, workspace
from pipeline.trials import Trial

SECONDS = 8.0  # that a trial takes besides its training: starting processes, making its data
TIMES = 3  # that a trial is asked for at most
NOT_SENT = (".git", ".dvc", ".venv", "data", "results", "trials", "raw", "checkpoints", "mlartifacts", "mlflow.db*",
            "report", "tuning", "docs", "tests")  # fmt: skip


def train(trials: Sequence[Trial], workers: int, over: Callable[[Trial], None], gpu_share: float = 1.0) -> Counter[str]:
    """Train these, and tell `over` of each that has records; how often each was asked for, by name.

    `workers` is their number on this machine; a cluster has as many as it has room for. A trial that fails again and
    again is left without records. Raises ConfigError where Ray is not installed or its cluster does not answer.
    """
    ray = _connect(workers)
    asked: Counter[str] = Counter()
    try:
        gpus = gpu_share if trials[0].run.device != "cpu" and ray.cluster_resources().get("GPU") else 0
        task = ray.remote(num_cpus=1, num_gpus=gpus, max_retries=0)(_train)  # Ray would not count its own
        waiting = {}

        def ask(trial: Trial) -> None:
            params = _params(trial)
            words = (trial.benchmark, trial.optimizer, trial.key, trial.data_stage, params, _variables(trial, params))
            waiting[task.options(name=trial.name).remote(*words)] = trial
            asked[trial.name] += 1

        for trial in trials:
            ask(trial)
        while waiting:
            [done], _ = ray.wait(list(waiting))
            trial = waiting.pop(done)
            if _take(ray, done, trial):
                over(trial)
            elif asked[trial.name] < TIMES:
                ask(trial)
    finally:
        ray.shutdown()
    return asked


def _connect(workers: int) -> Any:
    try:
        import ray
    except ImportError:
        raise ConfigError("engine: ray is not installed; `pip install '.[ray]'`, or --engine dvc") from None
    address = os.environ.get("RAY_ADDRESS", "local")
    environment = {"working_dir": str(ROOT), "excludes": [f"/{name}" for name in NOT_SENT]}
    try:
        here: dict[str, Any] = {"num_cpus": workers, "include_dashboard": False} if address == "local" else {}
        ray.init(address=address, runtime_env=environment, log_to_driver=False, logging_level=logging.ERROR, **here)
    except (OSError, RuntimeError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ConfigError(f"RAY_ADDRESS: {address!r} cannot be used: {reason}; allowed: auto, HOST:PORT") from None
    return ray


def _params(trial: Trial) -> str:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "params.yaml"
        compose(path, list(trial.overrides))
        return path.read_text(encoding="utf-8")


def _variables(trial: Trial, params: str) -> dict[str, str]:
    """What the user says of data, store and threads, as it holds on any node, and what DVC would say of the trial."""
    from ruamel.yaml import YAML

    names = ("MLFLOW_TRACKING_URI", "OMP_NUM_THREADS")
    found = {name: os.environ[name] for name in names if name in os.environ}
    if "MLFLOW_TRACKING_URI" in found and _store_is_a_file():
        found["MLFLOW_TRACKING_URI"] = ""  # the node's own: `_take` brings its runs into the one here
    images = os.environ.get("IMAGE_FOLDER") or YAML(typ="safe", pure=True).load(params)["image_folder"]
    if images:  # a relative path is one below this repository, a home that of the node
        found["IMAGE_FOLDER"] = images if images.startswith("~") else str(workspace() / images)
    return {**found, "DVC_EXP_NAME": trial.name, "DVC_STAGE": f"train@{trial.benchmark}-{trial.optimizer}"}


def _store_is_a_file() -> bool:
    """Whether the MLflow store is a file of this machine, and no server that nodes reach too."""
    return place().database is not None


def _train(
    benchmark: str, optimizer: str, key: str, stage: str, params: str, variables: Mapping[str, str]
) -> dict[str, bytes]:
    """On a node: make the data, train, and bring what lies in results/. Raises what the stages printed."""
    node = Path(tempfile.gettempdir()) / f"kfac-bench-{os.getuid()}"
    folder = node / "tasks" / key
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "params.yaml").write_text(params, encoding="utf-8")
    # With DVC_STAGE among the variables it ends, and leaves a checkpoint, when this process dies.
    environment = {**os.environ, **variables, "DVC_ROOT": str(node), "PYTHONPATH": os.getcwd()}
    for words in ([f"pipeline.{stage}", benchmark], ["pipeline.train", benchmark, optimizer]):
        ended = subprocess.run(
            [sys.executable, "-m", *words], cwd=folder, env=environment, capture_output=True, text=True, check=False
        )
        if ended.returncode:
            raise RuntimeError(f"{' '.join(words)} ended with {ended.returncode}: {ended.stderr.strip()[-2000:]}")
    found = [path for path in (folder / "results").rglob("*") if path.is_file()]
    files = {str(path.relative_to(folder / "results")): path.read_bytes() for path in found}
    shutil.rmtree(folder)
    return files


def _take(ray: Any, done: Any, trial: Trial) -> bool:
    """Keep the records of a task that is over, and show them in this machine's MLflow store; whether it brought any."""
    from pipeline import tracking

    try:
        files = ray.get(done)
    except (ray.exceptions.RayTaskError, ray.exceptions.RayError) as error:
        lines = str(error).strip().splitlines()
        sys.stderr.write(f"warning: {trial.title}: {lines[-1] if lines else type(error).__name__}\n")
        return False
    with tempfile.TemporaryDirectory() as folder:
        for name, content in files.items():
            path = Path(folder) / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
        trial.keep(Path(folder))
    if _store_is_a_file():
        for seed in trial.run.seeds:
            tracking.complete(trial.folder / f"seed-{seed}")
    return True
