"""The deep MNIST autoencoder by the stopwatch: K-FAC as it ships against the best Adam found for each target.

Every contestant is a run of the pipeline's own loop on its benchmark `mnist_autoencoder`, with the settings of
`pipeline/conf` or, where it says so below, others. The contestants of a seed train in one process, turn and turn about:
a turn leads to the next evaluation, and whoever has the highest loss takes it. So all of them pass a loss at about the
same time, and whatever slows the machine slows all. Seconds are those of training: no evaluation, no data.

    python -m benchmarks.race --seed 0        # a race, into benchmarks/results/race.json, and the table of all races
    python -m benchmarks.race --seed 1        # one more
    python -m benchmarks.race --show --figure race.png

Where MNIST is, if it cannot be downloaded, says IMAGE_FOLDER (docs/data.md). A seed takes some minutes. On a machine
that is busy with other work `--threads 1 --clock cpu` counts processor time, which waiting does not enter.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.step_cost import HERE, circumstances
from pipeline import data as datasets
from pipeline import models, prepare
from pipeline.clocks import PHASES
from pipeline.composition import compose
from pipeline.config import ConfigError, Params, load, resolve
from pipeline.device import placed, prepare_device
from pipeline.loop import Training

BENCHMARK = "mnist_autoencoder"
TARGETS = (73.9, 67.2, 63.0)  # nats a case, on the pipeline's fixed training examples
KFAC, BF16, ADAMS = "K-FAC", "K-FAC bf16", ("Adam, batch 100", "Adam, batch 250")
STEPS = {73.9: 60, 67.2: 90}  # within which K-FAC shall be there
RATIOS = {KFAC: {67.2: 0.70, 63.0: 0.58}, BF16: {67.2: 0.60, 63.0: 0.50}}  # of the best Adam's seconds
SAME_MACHINE = ("cpu", "cores", "threads", "clock", "torch", "python")


@dataclass(frozen=True)
class Contestant:
    """Who races.

    Args:
        name, optimizer: in the table, and in pipeline/conf/optimizer.
        every: steps between evaluations, about half a second.
        last: the target at which it may stop.
        loop, options: what differs from pipeline/conf.
    """

    name: str
    optimizer: str
    every: int
    last: float = TARGETS[-1]
    loop: dict[str, Any] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)


CONTESTANTS = {
    contestant.name: contestant
    for contestant in (
        Contestant(KFAC, "kfac", 3),
        Contestant(BF16, "kfac", 3, options={"preconditioning_dtype": "bfloat16"}),
        # The two best of 17 Adams: this one is first at 67.2, where it has slowed down so far that it is not asked for
        # more; the other is first at 63.
        Contestant(ADAMS[0], "adam", 36, last=67.2),
        Contestant(ADAMS[1], "adam", 20, loop={"batch_size": 250, "warmup": 50}, options={"lr": 2e-3}),
        Contestant("E-KFAC", "ekfac", 5),
        Contestant("GKFAC", "gkfac", 5),
        Contestant("SGD", "sgd", 100),
    )
}
USUAL = (KFAC, BF16, *ADAMS)


class Unwatched:
    """The tracker of a run that is shown nowhere."""

    def log(self, row: dict[str, Any], curvature_rows: list[dict[str, Any]]) -> None:
        pass


class ProcessorTime:
    """A stopwatch like the pipeline's, of the processor's time: each stretch counts for the innermost phase."""

    def __init__(self) -> None:
        self._spent = dict.fromkeys(PHASES, 0.0)
        self._open: list[str] = []
        self._mark = 0.0

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        self._count()
        self._open.append(phase)
        try:
            yield
        finally:
            self._count()
            self._open.pop()

    def _count(self) -> None:
        now = time.process_time()
        if self._open:
            self._spent[self._open[-1]] = self._spent.get(self._open[-1], 0.0) + now - self._mark
        self._mark = now

    def seconds(self) -> dict[str, float]:
        return dict(self._spent)


class Runner:
    """A contestant in training on a seed."""

    def __init__(self, contestant: Contestant, params: Params, data: datasets.Data, seed: int, limit: float) -> None:
        run = resolve(params, BENCHMARK, contestant.optimizer)
        run = replace(
            run,
            evaluate_every=contestant.every,
            seconds=limit,
            diagnostics="off",
            options=run.options | contestant.options,
            **contestant.loop,
        )
        device = prepare_device(run)
        model = placed(models.build(run.model, data.input_shape, data.outputs, seed), run, device)
        self.contestant = contestant
        self.training = Training(run, data, seed, model)
        self.over = False

    def count_processor_time(self) -> None:
        """From now on, in place of the wall's."""
        self.training.stopwatch = ProcessorTime()  # type: ignore[assignment]
        if hasattr(self.training.optimizer, "phase"):
            self.training.optimizer.phase = self.training.stopwatch

    @property
    def curve(self) -> list[tuple[int, float, float]]:
        """Step, training seconds and loss at each evaluation."""
        rows = self.training.progress.history
        return [(row["step"], row["training_seconds"], row["train_loss"]) for row in rows]

    @property
    def loss(self) -> float:
        return self.curve[-1][2] if self.curve else math.inf

    def turn(self) -> None:
        """Train to the next evaluation."""
        history = self.training.progress.history
        seen = len(history)
        outcome = self.training.train(Unwatched(), interruption=lambda: "its turn is over" * (len(history) > seen))
        if outcome.failure:
            raise RuntimeError(f"{self.contestant.name}: {outcome.summary['message']}\n{outcome.failure}")
        self.over = not outcome.interruption or self.loss <= self.contestant.last

    def record(self) -> dict[str, Any]:
        steps, seconds, losses = zip(*self.curve, strict=True)
        return {
            "contestant": self.contestant.name,
            "status": self.training.progress.status,
            "reached": {str(target): crossing for target in TARGETS if (crossing := self.crossing(target))},
            "phases": {name: round(spent, 3) for name, spent in self.training.stopwatch.seconds().items()},
            "test_loss": self.training.evaluation.test(self.training.evaluated)["test_loss"],
            "step": steps,
            "seconds": [round(value, 3) for value in seconds],
            "loss": [round(value, 3) for value in losses],
        }

    def crossing(self, target: float) -> list[float] | None:
        """Step and seconds of the first evaluation at or below a target."""
        return next(([step, round(seconds, 3)] for step, seconds, loss in self.curve if loss <= target), None)


def race(
    names: Iterable[str], seed: int, params: Params, data: datasets.Data, limit: float, clock: str = "wall"
) -> list[dict[str, Any]]:
    """The records of a seed."""
    runners = [Runner(CONTESTANTS[name], params, data, seed, limit) for name in names]
    if clock == "cpu":
        for runner in runners:
            runner.count_processor_time()
    while running := [runner for runner in runners if not runner.over]:
        last = max(running, key=lambda runner: runner.loss)
        last.turn()
        step, seconds, loss = last.curve[-1]
        sys.stderr.write(f"\r{last.contestant.name:20} step {step:5} {seconds:6.1f} s {loss:8.2f} nats")
    sys.stderr.write("\n")
    return [runner.record() for runner in runners]


def composed(threads: int) -> Params:
    """The configuration as it ships."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "params.yaml"
        optimizers = ",".join({contestant.optimizer: None for contestant in CONTESTANTS.values()})
        compose(path, [f"benchmark={BENCHMARK}", f"optimizer=[{optimizers}]", f"threads={threads}", "device=cpu"])
        return load(path)


def images(params: Params) -> datasets.Data:
    """MNIST; its split is made in a folder of its own, so that data/ stays as DVC has it."""
    from pipeline.imagefiles import image_folder
    from pipeline.imagesets import SETS

    source = params.images[BENCHMARK]
    with tempfile.TemporaryDirectory() as folder:
        prepare.make_split(source, f"{folder}/{BENCHMARK}", SETS[source["source"]], image_folder())
        return datasets.load(BENCHMARK, folder)


# Reporting.


def times(races: list[dict], name: str, target: float) -> list[list[float]]:
    """Step and seconds of a contestant at a target, for each seed; infinite where it did not get there."""
    runs = [run for race in races for run in race["runs"] if run["contestant"] == name]
    return [run["reached"].get(str(target), [math.inf, math.inf]) for run in runs]


def ratios(races: list[dict], name: str, target: float) -> list[float]:
    """Seconds over those of the best Adam, for each seed; the best is the one with the lowest median."""
    adams = [seconds for adam in ADAMS if (seconds := [pair[1] for pair in times(races, adam, target)])]
    best = min(adams, key=statistics.median, default=[])
    own = [pair[1] for pair in times(races, name, target)]
    both = zip(own, best, strict=False)
    return [a / b for a, b in both if math.isfinite(a) and math.isfinite(b)] if len(own) == len(best) else []


def table(races: list[dict]) -> str:
    """Medians over seeds, with the extremes of seconds and of ratios, and the goals."""
    head = f"{'contestant':18} {'nats':>5} {'seeds':>5} {'steps':>6} {'goal':>5} {'seconds':>20} "
    lines = [head + f"{'ms a step':>9} {'of the best Adam':>20} {'goal':>5}"]
    present = {run["contestant"]: None for race in races for run in race["runs"]}
    for name in present:
        for target in TARGETS:
            pairs = times(races, name, target)
            there = [pair for pair in pairs if math.isfinite(pair[1])]
            if not there:
                continue
            steps, seconds = (statistics.median(column) for column in zip(*pairs, strict=True))
            cost = statistics.median(1e3 * pair[1] / pair[0] for pair in there)
            goal = STEPS.get(target, "") if name in RATIOS else ""
            lines.append(
                f"{name:18} {target:5} {f'{len(there)}/{len(pairs)}':>5} {steps:6.0f} {goal:5} "
                f"{spread([pair[1] for pair in pairs], seconds, 1):>20} {cost:9.0f} "
                f"{spread(ratios(races, name, target), None, 2):>20} {RATIOS.get(name, {}).get(target, ''):5}"
            )
    return "\n".join(lines)


def spread(values: list[float], middle: float | None, digits: int) -> str:
    """The median of some values and the extremes."""
    if not values:
        return ""
    middle = statistics.median(values) if middle is None else middle
    return f"{middle:.{digits}f} [{min(values):.{digits}f}, {max(values):.{digits}f}]"


def draw(races: list[dict], path: str) -> None:
    """Loss against steps and against seconds, a line a seed."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    names = list({run["contestant"]: None for race in races for run in race["runs"]})
    panels = figure.subplots(1, 2, sharey=True)
    for axis, clock, label in zip(panels, ("step", "seconds"), ("steps", "training seconds"), strict=True):
        for race_ in races:
            for run in race_["runs"]:
                number = names.index(run["contestant"])
                named = run["contestant"] if race_ is races[0] else None
                axis.plot(run[clock], run["loss"], color=f"C{number}", linewidth=1.3, label=named)
        for target in TARGETS:
            axis.axhline(target, color="0.6", linewidth=0.7, linestyle=":")
        axis.set(xlabel=label, ylim=(TARGETS[-1] - 2, 120))
        axis.spines[["top", "right"]].set_visible(False)
    panels[0].set(xscale="log", xlim=(8, None), ylabel="training loss, nats a case")
    panels[1].set(xlim=(0, None))
    panels[1].legend(frameon=False)
    figure.savefig(path, dpi=110)


# Keeping.


def read(path: Path) -> list[dict]:
    return json.loads(path.read_text()) if path.exists() else []


def write(path: Path, races: list[dict]) -> None:
    """One line a run."""
    texts = []
    for race_ in races:
        runs = ",\n".join(json.dumps(run) for run in race_["runs"])
        head = {key: value for key, value in race_.items() if key != "runs"}
        texts.append(f'{json.dumps(head)[:-1]}, "runs": [\n{runs}\n]}}')
    path.parent.mkdir(exist_ok=True)
    path.write_text("[\n" + ",\n".join(texts) + "\n]\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--contestants", default=";".join(USUAL), metavar="NAMES", help="with ; between: %(default)s")
    parser.add_argument("--limit", type=float, default=100.0, help="training seconds of each (default 100)")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--clock", choices=("wall", "cpu"), default="wall", help="cpu: processor time of all threads")
    parser.add_argument("--name", default="race", help="of the file in benchmarks/results")
    parser.add_argument("--show", action="store_true", help="only print the table of what is there")
    parser.add_argument("--figure", metavar="FILE", help="draw the curves too")
    options = parser.parse_args()
    options.device = "cpu"
    path = HERE / "results" / f"{options.name}.json"
    races = read(path)
    if not options.show:
        names = [name.strip() for name in options.contestants.split(";")]
        for name in names:
            if name not in CONTESTANTS:
                parser.error(f"--contestants: no {name!r}; there are {'; '.join(CONTESTANTS)}")
        if BF16 in names and not torch.cpu.get_capabilities().get("avx512_bf16"):
            sys.stderr.write(f"{BF16}: left out, this CPU multiplies no bfloat16\n")
            names.remove(BF16)
        here = circumstances(options)
        for earlier in races:
            differs = [key for key in SAME_MACHINE if earlier["circumstances"][key] != here[key]]
            if differs:
                parser.error(f"--name: {path.name} has races of other {', '.join(differs)}; choose another name")
        os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # as in pipeline/train.py
        try:
            params = composed(options.threads)
            runs = race(names, options.seed, params, images(params), options.limit, options.clock)
        except ConfigError as error:
            parser.error(str(error))
        races = [earlier for earlier in races if earlier["seed"] != options.seed]
        races.append({"seed": options.seed, "circumstances": here, "runs": runs})
        races.sort(key=lambda race_: race_["seed"])
        write(path, races)
    print(table(races))
    if options.figure:
        draw(races, options.figure)


if __name__ == "__main__":
    main()
