"""Losses and scores of a network on whole splits, in evaluation mode, without a trace in the training.

The one idea: evaluation calls a criterion of its own and no gradient is recorded, so an optimizer that watches the
training criterion sees none of it; dropout is off, so no random number is drawn.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.data import Split

LOSSES: dict[str, Callable[[int], nn.Module]] = {
    "squared_error": lambda outputs: nn.MSELoss(),
    "binary_cross_entropy": lambda outputs: nn.BCEWithLogitsLoss(),
    "summed_binary_cross_entropy": lambda outputs: nn.BCEWithLogitsLoss(weight=torch.tensor(float(outputs))),
    "cross_entropy": lambda outputs: nn.CrossEntropyLoss(),
}
"""Criteria of networks with so many outputs. All are means, over cases and outputs; the summed one adds up the
outputs of a case."""
TRAIN_EXAMPLES = 4_096  # the training loss is that of the whole split up to this size, else of a fixed subset
_CHUNK = 1024  # examples evaluated at once, or fewer: as many as have
# numbers, for images go through layers that are many times as wide; on a CPU so few that these stay in its caches
_CHUNK_NUMBERS, _CHUNK_NUMBERS_CPU = 2**22, 2**19


class Evaluation:
    """Loss and score of a network on the splits of ``data``.

    Score: accuracy for classes and for binary targets (at probability one half); else R², 1 - SSE / SST, of the
    predictions (of their sigmoid for binary cross-entropy with targets between 0 and 1), where SST is taken around
    each output's mean over the split.
    """

    def __init__(self, loss: str, data: Any) -> None:
        self._loss = loss
        self._criterion = LOSSES[loss](data.outputs)
        self._data = data
        self._on_cpu = data.train.inputs.device.type == "cpu"
        numbers = _CHUNK_NUMBERS_CPU if self._on_cpu else _CHUNK_NUMBERS
        fitting = max(1, numbers // math.prod(data.input_shape))
        self._chunk = min(_CHUNK, 1 << fitting.bit_length() - 1)
        self._train = data.train
        self._spread: dict[int, float] = {}
        examples = len(data.train)
        if examples > TRAIN_EXAMPLES:
            generator = torch.Generator().manual_seed(0)
            chosen = torch.randperm(examples, generator=generator)[:TRAIN_EXAMPLES].sort().values
            self._train = data.train.subset(chosen.to(data.train.inputs.device))
        self._binary = loss.endswith("binary_cross_entropy") and all(
            bool(((targets == 0) | (targets == 1)).all()) for _, targets in data.train.batches(_CHUNK)
        )

    def __call__(self, network: nn.Module) -> dict[str, float | None]:
        """``train_loss``, ``train_score``, ``validation_loss``, ``validation_score``, ``validation_error`` (the share
        of wrong answers; None unless the task is to classify), ``excess_loss`` (the population loss minus the
        teacher's; None without planted targets)."""
        data = self._data
        with _evaluating(network):
            train_loss, train_score = self._measure(network, self._train)
            validation = self._measure(network, data.validation)
            excess = None
            if data.population is not None and data.teacher_loss is not None:
                population, _ = self._measure(network, data.population, score=False)
                excess = population - data.teacher_loss
        return {
            "train_loss": train_loss,
            "train_score": train_score,
            "validation_loss": validation[0],
            "validation_score": validation[1],
            "validation_error": 1.0 - (validation[1] or 0.0) if self._classifies else None,
            "excess_loss": excess,
        }

    def test(self, network: nn.Module) -> dict[str, float | None]:
        """``test_loss`` and ``test_score``; to be called once, when training is over."""
        with _evaluating(network):
            loss, score = self._measure(network, self._data.test)
        return {"test_loss": loss, "test_score": score}

    def _measure(self, network: nn.Module, split: Split, *, score: bool = True) -> tuple[float, float | None]:
        """Mean loss and score, summed in float64 and read once."""
        sums = torch.zeros(2, dtype=torch.float64, device=split.inputs.device)
        answers = 0
        for x, y in split.batches(self._chunk):
            if self._on_cpu and x.dim() == 4:  # without gradients, a CPU's poolings and ReLUs are faster so
                x = x.contiguous(memory_format=torch.channels_last)
            outputs = network(x)
            sums[0] += self._criterion(outputs, y).double() * len(x)
            answers += y.numel()
            if score:
                sums[1] += self._points(outputs, y)
        loss, points = sums.tolist()
        if not score:
            return loss / len(split), None
        if self._classifies:
            return loss / len(split), points / answers
        spread = self._spread_of(split)
        return loss / len(split), 1.0 - points / spread if spread > 0 else None

    def _spread_of(self, split: Split) -> float:
        """Sum of squares of the targets around each output's mean."""
        if id(split) not in self._spread:
            targets = split.batch(slice(None))[1].double()
            self._spread[id(split)] = float((targets - targets.mean(dim=0)).square().sum())
        return self._spread[id(split)]

    @property
    def _classifies(self) -> bool:
        return self._loss == "cross_entropy" or self._binary

    def _points(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Right answers where the task is to classify, the sum of squared errors elsewhere."""
        if self._loss == "cross_entropy":
            return (outputs.argmax(dim=1) == targets).sum()
        if self._binary:
            return ((outputs > 0) == (targets > 0.5)).sum()
        if self._loss.endswith("binary_cross_entropy"):
            outputs = outputs.sigmoid()
        return (outputs - targets).double().square().sum()


@contextmanager
def _evaluating(network: nn.Module) -> Iterator[None]:
    training = network.training
    network.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        network.train(training)
