"""Stage ``train``: one optimizer on one benchmark, every seed. ``python -m pipeline.train <benchmark> <optimizer>``

The one idea: a seed's records appear whole, at its end, in ``results/<benchmark>/<optimizer>/seed-<k>/``; whatever is
wrong with configuration, data, permissions or tracking server is refused before the first step.

Exit status: 0 when every seed finished or diverged, for a diverged run is a result. 1 when a seed failed: the other
seeds are still trained and all records written, but DVC does not keep the outputs of such a stage, so `dvc repro`
tries again once the cause is mended, and no comparison is made with a seed missing. 2 for a refusal.
"""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.config import TARGETS, ConfigError, RunConfig, load, optimizer_class, resolve, run_stage
from pipeline.records import seed_folder, write_run

if TYPE_CHECKING:
    from pipeline.loop import Progress

RESULTS = "results"
_PLAIN_INTERVAL = 15.0  # seconds between lines of progress where there is no terminal


def main(benchmark: str, optimizer: str) -> None:
    """Train all seeds of a pair as ``params.yaml`` has it."""
    run = resolve(load(), benchmark, optimizer)  # before torch is imported: a wrong value is refused at once
    # scipy's vectors are short, and threads of its BLAS that spin between calls take torch's cores
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    train(run)


def train(run: RunConfig, results: str | Path = RESULTS) -> None:
    """Train all seeds of ``run`` and write their records; see the head of this file for how it ends."""
    from pipeline import data as datasets
    from pipeline import models, pictures, tracking
    from pipeline.device import describe_environment, placed, prepare_device
    from pipeline.loop import Training

    optimizer_class(f"optimizer.{run.optimizer}", run.target_class, run.options)
    folder = Path(results) / run.benchmark / run.optimizer
    _check_writable(folder)
    device = prepare_device(run)
    data = datasets.load(run.benchmark, device=device)
    environment = describe_environment(run, device)
    failed: list[str] = []
    for number, seed in enumerate(run.seeds):
        model = placed(models.build(run.model, data.input_shape, data.outputs, seed), run, device)
        training = Training(run, data, seed, model)
        described = {**environment, "start_time": time.time()}
        tracker = _start_tracking(tracking, run, seed, described, required=number == 0)
        if number == 0:
            _remove_records(folder)
        with _progress(run, seed) as watch:
            outcome = training.train(tracker, watch)
        place = seed_folder(results, run.benchmark, run.optimizer, seed)
        write_run(
            place,
            config={**run.as_dict(), "seed": seed},
            environment=described,
            history=outcome.history,
            curvature=outcome.curvature,
            summary=outcome.summary,
            failure=outcome.failure,
            pictures=pictures.of_run(run, data, training.evaluated) if outcome.summary["status"] == "finished" else {},
        )
        tracker.finish(outcome.summary, place)
        print(_outcome_line(outcome.summary), flush=True)
        if outcome.interrupted:
            raise KeyboardInterrupt
        if outcome.summary["status"] == "failed":
            failed.append(f"seed {seed}: {outcome.summary['message']}")
    if failed:
        sys.exit(
            f"error: {run.benchmark} {run.optimizer}: {len(failed)} of {len(run.seeds)} seeds failed; {failed[0]}; "
            f"traceback in {folder}/seed-*/failure.txt"
        )


# ---------------------------------------------------------------- before the first step


def _check_writable(folder: Path) -> None:
    """Refuse a folder in which no records could be written; nothing is made yet."""
    there = next(path for path in (folder, *folder.parents) if path.exists())
    try:
        tempfile.TemporaryFile(dir=there).close()
    except OSError as error:
        raise ConfigError(f"{folder}: cannot write records there: {error.strerror or error}") from None


def _remove_records(folder: Path) -> None:
    """Records of seeds that were trained before do not belong to this run."""
    for old in [*folder.glob("seed-*"), *folder.glob(".seed-*.partial")]:
        shutil.rmtree(old)


def _start_tracking(tracking: Any, run: RunConfig, seed: int, environment: dict[str, Any], *, required: bool) -> Any:
    """A server that cannot be reached stops the stage at its start; later the records are what counts."""
    try:
        return tracking.start(run, seed, environment)
    except ConfigError as error:
        if required:
            raise
        print(f"warning: seed {seed} is not tracked: {error}", file=sys.stderr, flush=True)
        return Untracked()


class Untracked:
    """The tracker of a run that only leaves files."""

    def log(self, row: dict[str, Any], curvature_rows: list[dict[str, Any]]) -> None:
        pass

    def finish(self, summary: dict[str, Any], folder: Path) -> None:
        pass


# ---------------------------------------------------------------- what is shown


@contextmanager
def _progress(run: RunConfig, seed: int) -> Iterator[Callable[[Progress], None]]:
    """A bar on a terminal, now and then a line elsewhere; redrawn at evaluations only, off the training clock."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
    from rich.progress import Progress as Bar

    title = f"{run.benchmark} {run.optimizer} seed {seed}"
    console = Console()
    if not console.is_terminal:
        last = [time.monotonic(), 0.0]

        def say(progress: Progress) -> None:
            now, share = time.monotonic(), progress.step / run.steps
            if now - last[0] >= _PLAIN_INTERVAL and share - last[1] >= 0.1 and share < 1:
                last[:] = [now, share]
                print(
                    f"{title}: step {progress.step} of {run.steps}, {_losses(progress.history[-1])}",
                    flush=True,
                )

        yield say
        return
    columns = (
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[losses]}"),
        TimeElapsedColumn(),
    )  # fmt: skip
    with Bar(*columns, console=console, auto_refresh=False, transient=True) as bar:
        task = bar.add_task(title, total=run.steps, losses="")

        def draw(progress: Progress) -> None:
            bar.update(task, completed=progress.step, losses=_losses(progress.history[-1]), refresh=True)

        yield draw


def _losses(row: dict[str, Any]) -> str:
    return f"loss {row['train_loss']:.4g}, validation {row['validation_loss']:.4g}"


def _outcome_line(summary: dict[str, Any]) -> str:
    title = f"{summary['benchmark']} {summary['optimizer']} seed {summary['seed']}: {summary['status']}"
    if summary["status"] != "finished":
        return f"{title}, {summary['message']}"
    reached = [_reached(summary, target) for target in TARGETS]
    ending = f"{_losses(summary)}, {summary['training_seconds']:.2f} s"
    return f"{title}, {ending}; {summary['target_metric']} {', '.join(reached)}"


def _reached(summary: dict[str, Any], target: str) -> str:
    value = f"{summary[f'{target}_target']:g}"
    if not summary[f"{target}_reached"]:
        return f"{value} not reached"
    return f"{value} at step {summary[f'{target}_step']}, {summary[f'{target}_seconds']:.2f} s"


if __name__ == "__main__":
    run_stage(main, "benchmark", "optimizer")
