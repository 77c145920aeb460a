"""The training loop: ``loss.backward(); optimizer.step()``, the same for every optimizer, with everything measured.

The one idea is fairness. At a given seed every optimizer starts from the same weights and sees the same examples in
the same order: the order is a function of the seed and the epoch alone, and a batch is the next so many examples of
it, whatever its size. Batch size, averaging and schedule are the loop's, open to all alike. The training clock runs
for gradient and step only, and a rehearsal on copies keeps what only a process's first step costs off it.

A run ends in one of three ways. ``finished``: the budget is spent, of steps or of seconds on the training clock; the
clock is read at evaluations. ``diverged``: the loss is not finite, or above
``DIVERGED_FACTOR`` times the initial one at ``DIVERGED_EVALUATIONS`` evaluations in a row, and the run stops: a
result like any other. ``failed``: something raised although loss and weights were finite.
"""

from __future__ import annotations

import contextlib
import copy
import math
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from pipeline import optimizers
from pipeline.augmentation import draw
from pipeline.averaging import Average
from pipeline.batches import Order, batch_size, check_batch_size
from pipeline.clocks import PeakMemory, Stopwatch
from pipeline.config import RunConfig
from pipeline.device import autocast, compiled, loss_scaler
from pipeline.evaluation import LOSSES, Evaluation
from pipeline.probe import Probe
from pipeline.records import Row
from pipeline.seeds import number, random_states, set_random_states
from pipeline.states import plain, whole
from pipeline.targets import target_keys

DIVERGED_FACTOR = 10.0
DIVERGED_EVALUATIONS = 5
_REHEARSAL_STEPS = 2


class Tracker(Protocol):
    """Where a run is shown while it trains."""

    def log(self, row: Row, curvature_rows: list[Row]) -> None: ...


@dataclass
class Progress:
    """All that the loop itself remembers between steps."""

    step: int = 0
    examples: int = 0
    seconds: float = 0.0  # the training clock at the last evaluation
    lr: float = 0.0
    history: list[Row] = field(default_factory=list)
    curvature: list[Row] = field(default_factory=list)
    far_evaluations: int = 0  # evaluations in a row with a loss far above the initial one
    evaluation_seconds: float = 0.0
    diagnostics_seconds: float = 0.0
    status: str = "finished"
    message: str = ""


@dataclass(frozen=True)
class Outcome:
    """What a run leaves: rows and summary as in :mod:`pipeline.records`."""

    history: list[Row]
    curvature: list[Row]
    summary: dict[str, Any]
    failure: str | None = None  # the traceback of a failed run
    interruption: str = ""  # why it ended before its time; it may go on from its `state`


class Training:
    """One run, one seed: network, optimizer, schedule, order of examples and clocks in one place.

    ``model`` has its initial weights and lives on the data's device, as ``data`` (``pipeline.data.Data``) does.
    Raises ``ConfigError`` for an optimizer that cannot be built, before anything is trained.
    """

    def __init__(self, run: RunConfig, data: Any, seed: int, model: nn.Module) -> None:
        self.run, self.data, self.seed, self.model = run, data, seed, model
        self.device = data.train.inputs.device
        self.progress = Progress()
        examples = len(data.train)
        self.order = Order(examples, seed, self.device)
        self.draws = Order(examples, seed, self.device, "augmentation", draw) if data.train.augmented else None
        check_batch_size(run, examples)
        self.evaluation = Evaluation(run.loss, data)
        self.averaged = None if run.averaging is None else Average(model, run.averaging)
        self.probe = Probe(run, model, data)
        self.autocast = autocast(run, self.device)
        self._rehearse()
        self.network = compiled(model, run)  # the same weights as `model`
        self.scaler = loss_scaler(run, self.device)
        self.criterion = LOSSES[run.loss](data.outputs)
        self.optimizer = optimizers.build(run, model, self.criterion, seed)
        self.scheduler = LambdaLR(self.optimizer, learning_rate_factor(run))
        self.stopwatch = Stopwatch(self.device)
        self.memory = PeakMemory(self.device)
        if hasattr(self.optimizer, "phase"):
            self.optimizer.phase = self.stopwatch
        torch.manual_seed(number(seed, "dropout"))

    @property
    def evaluated(self) -> nn.Module:
        """The network that is judged: the averaged one where weights are averaged."""
        return self.model if self.averaged is None else self.averaged

    def _rehearse(self) -> None:
        """A step or two on copies, thrown away: lazy imports, workspaces and kernels are then ready.

        What raises in these steps raises again in the run, where it is recorded.
        """
        devices = [self.device] if self.device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices):
            model, criterion = copy.deepcopy(self.model), LOSSES[self.run.loss](self.data.outputs)
            optimizer = optimizers.build(self.run, model, criterion, self.seed)
            count = batch_size(self.run, 0, self.order.examples)
            inputs, targets = self.data.train.batch(slice(count))
            model.train()
            network, scaler = compiled(model, self.run), loss_scaler(self.run, self.device)
            with contextlib.suppress(Exception):
                for _ in range(_REHEARSAL_STEPS):
                    self._backward(network, criterion, scaler, inputs, targets)
                    scaler.step(optimizer)
                    scaler.update()
                    optimizer.zero_grad()

    def train(
        self,
        tracker: Tracker,
        watch: Callable[[Progress], None] = lambda progress: None,
        interruption: Callable[[], str] = lambda: "",
    ) -> Outcome:
        """Run to the end of the budget, or to the first sign that it diverged; ``watch`` sees every evaluation, and
        ``interruption``, asked between two steps, may name a reason to stop there."""
        failure, stopped = None, ""
        tested: dict[str, float | None] = {}
        try:
            if self.progress.history:  # it goes on from a checkpoint
                self.memory.resume()
            else:
                self._evaluate(tracker, watch)
            self.model.train()
            while not (self._over() or (stopped := interruption())):
                self._step()
                if self.progress.step % self.run.evaluate_every == 0 or self.progress.step == self.run.steps:
                    self._evaluate(tracker, watch)
            if not stopped:
                tested = self.evaluation.test(self.evaluated)
        except Exception as error:  # whatever an optimizer raises is the run's outcome
            where = f"after {self.progress.step} steps: {_in_one_line(error)}"
            if self._finite():
                self.progress.status, self.progress.message = "failed", where
                failure = traceback.format_exc()
            else:
                self.progress.status = "diverged"
                self.progress.message = f"weights not finite; {where}"
        return Outcome(self.progress.history, self.progress.curvature, self._summary(tested), failure, stopped)

    def state(self) -> dict[str, Any]:
        """All that this run needs to go on from here to the very same numbers: plain values and tensors.

        The order of examples is not among it, for it is a function of the seed and ``progress.examples``.
        """
        modules = {name: module.state_dict() for name, module in self._modules().items()}
        return {
            "progress": vars(self.progress),
            "modules": {**modules, "optimizer": plain(modules["optimizer"])},
            "probe": self.probe.state(),
            "seconds": self.stopwatch.seconds(),
            "memory_mib": self.memory.mib,
            "random": random_states(self.device),
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from what ``state`` gave, in a new process."""
        self.progress = Progress(**state["progress"])
        classes = [self.run.target_class, *([self.run.rest["_target_"]] if self.run.rest else [])]
        packages = {name.partition(".")[0] for name in classes}
        modules = {**state["modules"], "optimizer": whole(state["modules"]["optimizer"], packages, self.device)}
        for name, module in self._modules().items():
            module.load_state_dict(modules[name])
        self.probe.restore(state["probe"])
        self.stopwatch.go_on_from(state["seconds"])
        self.memory.go_on_from(state["memory_mib"])
        set_random_states(state["random"], self.device)

    def _modules(self) -> dict[str, Any]:
        """What has a ``state_dict``; the schedule comes after the optimizer whose rates it sets."""
        modules = {"model": self.model, "optimizer": self.optimizer, "scheduler": self.scheduler, "scaler": self.scaler}
        return modules if self.averaged is None else {**modules, "averaged": self.averaged}

    def _over(self) -> bool:
        """Whether the budget is spent, or the run diverged."""
        progress, run = self.progress, self.run
        late = run.seconds is not None and progress.seconds >= run.seconds
        return progress.step >= run.steps or late or progress.status != "finished"

    def _step(self) -> None:
        progress, model, optimizer = self.progress, self.model, self.optimizer
        size = batch_size(self.run, progress.examples, self.order.examples)
        draws = None if self.draws is None else self.draws.next(progress.examples, size)
        inputs, targets = self.data.train.batch(self.order.next(progress.examples, size), draws)
        if progress.step + 1 in self.probe.steps:
            self.probe.before(model, inputs, targets)
        progress.lr = float(optimizer.param_groups[0]["lr"])
        with self.stopwatch("forward_backward"):
            optimizer.zero_grad()
            self._backward(self.network, self.criterion, self.scaler, inputs, targets)
        with self.stopwatch("update"):
            self.scaler.step(optimizer)
            self.scaler.update()
            self.scheduler.step()
            if self.averaged is not None:
                self.averaged.update_parameters(model)
        progress.step += 1
        progress.examples += size

    def _backward(
        self, network: nn.Module, criterion: nn.Module, scaler: torch.amp.GradScaler, inputs: Tensor, targets: Tensor
    ) -> None:
        with self.autocast:
            loss = criterion(network(inputs), targets)
        scaler.scale(loss).backward()

    def _evaluate(self, tracker: Tracker, watch: Callable[[Progress], None]) -> None:
        progress = self.progress
        self.memory.pause()
        seconds = self.stopwatch.seconds()
        progress.seconds = sum(seconds.values())
        start = time.perf_counter()
        measured = self.evaluation(self.evaluated)
        progress.evaluation_seconds += time.perf_counter() - start
        row: Row = {
            "step": progress.step,
            "epoch": progress.examples / self.order.examples,
            "examples": progress.examples,
            "training_seconds": progress.seconds,
            **measured,
            "lr": progress.lr if progress.step else float(self.optimizer.param_groups[0]["lr"]),
            "batch_size": batch_size(self.run, progress.examples, self.order.examples),
            **{f"{phase}_seconds": spent for phase, spent in seconds.items()},
            "peak_memory_mib": self.memory.mib,
            **{f"stats_{name}": float(value) for name, value in getattr(self.optimizer, "stats", {}).items()},
        }
        progress.history.append(row)
        self._judge(row)
        rows: list[Row] = []
        if progress.step in self.probe.steps and progress.status == "finished":
            start = time.perf_counter()
            rows = self.probe.measure(progress.step, self.model, self.optimizer)
            progress.diagnostics_seconds += time.perf_counter() - start
            progress.curvature += rows
        tracker.log(row, rows)
        watch(progress)
        self.memory.resume()

    def _judge(self, row: Row) -> None:
        """Has the run diverged? See the head of this file."""
        progress, loss = self.progress, float(row["train_loss"] or 0.0)
        initial = float(progress.history[0]["train_loss"] or 0.0)
        if not math.isfinite(loss) or not self._finite():
            progress.status = "diverged"
            progress.message = f"training loss {loss} or weights not finite at step {progress.step}"
            return
        progress.far_evaluations = progress.far_evaluations + 1 if loss > DIVERGED_FACTOR * initial else 0
        if progress.far_evaluations >= DIVERGED_EVALUATIONS:
            progress.status = "diverged"
            progress.message = (
                f"training loss {loss:.4g} at step {progress.step}, above {DIVERGED_FACTOR:g} times the initial "
                f"{initial:.4g} at {DIVERGED_EVALUATIONS} evaluations in a row"
            )

    def _finite(self) -> bool:
        return all(bool(parameter.isfinite().all()) for parameter in self.model.parameters())

    def _summary(self, tested: dict[str, float | None]) -> dict[str, Any]:
        run, progress = self.run, self.progress
        seconds = self.stopwatch.seconds()
        last = progress.history[-1] if progress.history else {}
        losses = [float(v) for row in progress.history if (v := row["validation_loss"]) is not None]
        return {
            "benchmark": run.benchmark,
            "optimizer": run.optimizer,
            "seed": self.seed,
            "status": progress.status,
            "message": progress.message,
            "steps": progress.step,
            "examples": progress.examples,
            "parameters": sum(parameter.numel() for parameter in self.model.parameters()),
            "training_seconds": sum(seconds.values()),
            **{f"{phase}_seconds": spent for phase, spent in seconds.items()},
            "evaluation_seconds": progress.evaluation_seconds,
            "diagnostics_seconds": progress.diagnostics_seconds,
            "peak_memory_mib": self.memory.mib,
            "target_metric": run.target_metric,
            **target_keys(progress.history, run.target_metric, run.targets, run.seconds),
            **{name: last.get(name) for name in ("train_loss", "train_score")},
            **{f"validation_{name}": last.get(f"validation_{name}") for name in ("loss", "score", "error")},
            "test_loss": tested.get("test_loss"),
            "test_score": tested.get("test_score"),
            "best_validation_loss": min(filter(math.isfinite, losses), default=None),
            "excess_loss": last.get("excess_loss"),
            "teacher_loss": self.data.teacher_loss,
        }


def learning_rate_factor(run: RunConfig) -> Callable[[int], float]:
    """Multiplier of every group's learning rate at a step (from 0): linear warm-up, then constant, or to zero at the
    end of the budget along a line or a cosine."""
    warmup, rest = run.warmup, max(1, run.steps - run.warmup)

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        share = min(1.0, (step - warmup) / rest)
        if run.schedule == "linear":
            return 1.0 - share
        if run.schedule == "cosine":
            return 0.5 * (1.0 + math.cos(math.pi * share))
        return 1.0

    return factor


def _in_one_line(error: Exception) -> str:
    """Kind and first line of an error, and the line of code that raised it."""
    text = next(iter(str(error).splitlines()), "")
    frame = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__}: {text} ({'/'.join(Path(frame.filename).parts[-2:])}:{frame.lineno})"
