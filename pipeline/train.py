"""Stage ``train``: one optimizer on one benchmark, every seed. ``python -m pipeline.train <benchmark> <optimizer>``

The one idea: a seed's records appear whole, at its end, in ``results/<benchmark>/<optimizer>/seed-<k>/``; whatever is
wrong with configuration, data, permissions or tracking server is refused before the first step. A stage that was killed
or interrupted goes on from its checkpoints (``pipeline.checkpoint``) when the same command is given again, and ends
with the records of a stage that was not.

Exit status: 0 when every seed finished or diverged, for a diverged run is a result. 1 when a seed failed: the other
seeds are still trained and all records written, but DVC does not keep the outputs of such a stage, so `dvc repro`
tries again once the cause is mended, and no comparison is made with a seed missing. 2 for a refusal. 128 and the
signal's number after an interruption.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline import checkpoint
from pipeline.checkpoint import Checkpoints, say
from pipeline.config import TARGETS, ConfigError, RunConfig, load, optimizer_class, resolve, run_stage
from pipeline.interruption import Interruption
from pipeline.records import copy_run, write_run

if TYPE_CHECKING:
    import torch

    from pipeline.loop import Progress, Training

RESULTS = "results"
_PLAIN_INTERVAL = 15.0  # seconds between lines of progress where there is no terminal


def main(benchmark: str, optimizer: str) -> None:
    """Train all seeds of a pair as ``params.yaml`` has it."""
    params = load()
    run = resolve(params, benchmark, optimizer)  # before torch is imported: a wrong value is refused at once
    # scipy's vectors are short, and threads of its BLAS that spin between calls take torch's cores
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    train(run, checkpoint_seconds=params.checkpoint_seconds, study=params.study)


def train(
    run: RunConfig, results: str | Path = RESULTS, checkpoint_seconds: float = 60.0, study: str = "default"
) -> None:
    """Train all seeds of ``run`` and write their records; see the head of this file for how it ends.

    ``study`` is only recorded.
    """
    from pipeline import data as datasets
    from pipeline.device import describe_environment, prepare_device

    target = optimizer_class(f"optimizer.{run.optimizer}", run.target_class, run.options)
    folder = Path(results) / run.benchmark / run.optimizer
    _check_writable(folder)
    device = prepare_device(run)
    data = datasets.load(run.benchmark, device=device)
    environment = {**describe_environment(run, device), "study": study}
    home = checkpoint.home(run, data.manifest, environment, target)
    with checkpoint.locked(home, run.seeds), Interruption() as interruption:
        stage = Stage(run, data, device, environment, folder, interruption)
        for seed in run.seeds:
            stage.train(seed, Checkpoints(home, seed, checkpoint_seconds))
        if not stage.troubles:
            checkpoint.remove(home, run.seeds)
    if stage.troubles:
        troubles = f"{len(stage.troubles)} of {len(run.seeds)} seeds failed; {stage.troubles[0]}"
        sys.exit(f"error: {run.benchmark} {run.optimizer}: {troubles}")


class Stage:
    """What the seeds of a stage share; `troubles` has a line for each that does not leave its records in `folder`."""

    def __init__(
        self,
        run: RunConfig,
        data: Any,
        device: torch.device,
        environment: dict[str, Any],
        folder: Path,
        interruption: Interruption,
    ) -> None:
        self.run, self.data, self.device, self.environment = run, data, device, environment
        self.folder, self.interruption = folder, interruption
        self.troubles: list[str] = []
        self._begun = False

    def train(self, seed: int, kept: Checkpoints) -> None:
        """Train a seed, from its checkpoint if there is one, or bring back the records of one that is over."""
        from pipeline import tracking

        if kept.records.is_dir():
            self._begin()
            say(f"{self._title(seed)}: was over before the stage was stopped, its records are kept")
            tracking.complete(kept.records)
        else:
            self._train(seed, kept)
        place = self.folder / f"seed-{seed}"
        if kept.records.is_dir():
            try:
                copy_run(kept.records, place)
            except OSError as error:
                where = f"{self.folder}: cannot be written: {error.strerror or error}"
                self.troubles.append(f"{where}; records are in {kept.records} and the same command brings them in")
        elif not place.is_dir():
            self.troubles.append(f"{kept.records}: was removed by something else; the same command trains it again")

    def _train(self, seed: int, kept: Checkpoints) -> None:
        from pipeline import models, pictures
        from pipeline.device import placed
        from pipeline.loop import Training

        run, data = self.run, self.data
        model = placed(models.build(run.model, data.input_shape, data.outputs, seed), run, self.device)
        training = Training(run, data, seed, model)
        earlier = kept.load() or {}
        if earlier:
            training.restore(earlier["training"])
            say(f"{self._title(seed)}: goes on from step {training.progress.step} of {run.steps}")
        described = {**self.environment, "start_time": earlier.get("start_time", time.time())}
        tracker = _start_tracking(run, seed, described, training, earlier.get("run_id", ""), required=not self._begun)
        self._begin()

        def keep() -> bool:
            """Write a checkpoint, then send to the store what it holds."""
            state = {"training": training.state(), "start_time": described["start_time"], "run_id": tracker.run_id}
            kept_it = kept.save(training.progress.step, state)
            if kept_it:
                tracker.send()
            return kept_it

        with _progress(run, seed) as show:

            def watch(progress: Progress) -> None:
                show(progress)
                if kept.due:
                    keep()

            outcome = training.train(tracker, watch, self.interruption)
        summary = outcome.summary
        if outcome.interruption:
            future = "the same command goes on from there" if keep() else "the same command trains it again"
            say(f"{self._title(seed)}: stopped after step {training.progress.step} ({outcome.interruption}); {future}")
            sys.exit(self.interruption.status)
        records: dict[str, Any] = {
            "config": {**run.as_dict(), "seed": seed},
            "environment": described,
            "history": outcome.history,
            "curvature": outcome.curvature,
            "summary": summary,
            "failure": outcome.failure,
            "pictures": pictures.of_run(run, data, training.evaluated) if summary["status"] == "finished" else {},
        }
        place = self._write(seed, kept, records, failed=summary["status"] == "failed")
        tracker.finish(summary, place)
        say(_outcome_line(summary))
        if summary["status"] == "failed":
            self.troubles.append(f"seed {seed}: {summary['message']}; traceback in {place}/failure.txt")

    def _write(self, seed: int, kept: Checkpoints, records: dict[str, Any], *, failed: bool) -> Path:
        """Write the records of a seed, and where they are then.

        They are kept beside the checkpoints until the stage is over: if it is killed, DVC empties its results. A failed
        seed keeps its checkpoint instead, for the same command tries it again. On a full disk a checkpoint gives way.
        """
        if not failed:
            with contextlib.suppress(OSError):
                try:
                    write_run(kept.records, **records)
                except OSError:
                    kept.make_room()
                    write_run(kept.records, **records)
                kept.finish()
                return kept.records
        place = self.folder / f"seed-{seed}"
        try:
            write_run(place, **records)
        except OSError as error:
            reason = error.strerror or error
            raise ConfigError(f"{place}: {reason}; the same command goes on from its checkpoint") from None
        return place

    def _begin(self) -> None:
        """Records of seeds that were trained before do not belong to this run; removed once, when nothing refused."""
        if not self._begun:
            for old in [*self.folder.glob("seed-*"), *self.folder.glob(".seed-*.partial")]:
                shutil.rmtree(old)
        self._begun = True

    def _title(self, seed: int) -> str:
        return f"{self.run.benchmark} {self.run.optimizer} seed {seed}"


# ---------------------------------------------------------------- before the first step


def _check_writable(folder: Path) -> None:
    """Refuse a folder in which no records could be written; nothing is made yet."""
    there = next(path for path in (folder, *folder.parents) if path.exists())
    try:
        tempfile.TemporaryFile(dir=there).close()
    except OSError as error:
        raise ConfigError(f"{folder}: cannot write records there: {error.strerror or error}") from None


def _start_tracking(
    run: RunConfig, seed: int, environment: dict[str, Any], training: Training, run_id: str, *, required: bool
) -> Any:
    """A server that cannot be reached stops the stage at its start; later the records are what counts."""
    from pipeline import tracking

    progress = training.progress
    try:
        return tracking.start(run, seed, environment, run_id, progress.history, progress.curvature)
    except ConfigError as error:
        if required:
            raise
        say(f"warning: seed {seed} is not tracked: {error}", sys.stderr)
        return Untracked()


class Untracked:
    """The tracker of a run that only leaves files."""

    run_id = ""

    def log(self, row: dict[str, Any], curvature_rows: list[dict[str, Any]]) -> None:
        pass

    def send(self) -> None:
        pass

    def finish(self, summary: dict[str, Any], folder: Path) -> None:
        pass


# ---------------------------------------------------------------- what is shown


@contextlib.contextmanager
def _progress(run: RunConfig, seed: int) -> Iterator[Callable[[Progress], None]]:
    """A bar on a terminal, now and then a line elsewhere; redrawn at evaluations only, off the training clock."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
    from rich.progress import Progress as Bar

    title = f"{run.benchmark} {run.optimizer} seed {seed}"
    console = Console()
    if not console.is_terminal:
        last = [time.monotonic(), 0.0]

        def tell(progress: Progress) -> None:
            now, share = time.monotonic(), progress.step / run.steps
            if now - last[0] >= _PLAIN_INTERVAL and share - last[1] >= 0.1 and share < 1:
                last[:] = [now, share]
                say(f"{title}: step {progress.step} of {run.steps}, {_losses(progress.history[-1])}")

        yield tell
        return
    columns = (
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[losses]}"),
        TimeElapsedColumn(),
    )  # fmt: skip
    with Bar(*columns, console=console, auto_refresh=False, transient=True) as bar:
        task = bar.add_task(title, total=run.steps, losses="")

        def draw(progress: Progress) -> None:
            with contextlib.suppress(OSError):  # the terminal was closed
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
