"""Small runs for the tests of the training loop: planted data, a small network, any optimizer."""

from typing import Any

import torch
from torch import Tensor, nn

from pipeline.config import RunConfig
from pipeline.data import Data, Split


def a_run(**changes: Any) -> RunConfig:
    fields: dict[str, Any] = {
        "benchmark": "tiny",
        "optimizer": "sgd",
        "model": {},
        "loss": "squared_error",
        "batch_size": 10,
        "steps": 20,
        "seconds": None,
        "evaluate_every": 5,
        "target_metric": "train_loss",
        "targets": {"easy": 0.0, "hard": 0.0},
        "averaging": None,
        "warmup": 0,
        "schedule": "constant",
        "target_class": "torch.optim.SGD",
        "options": {"lr": 0.1},
        "rest": None,
        "seeds": [0],
        "device": "cpu",
        "threads": 1,
        "precision": "fp32",
        "compile": False,
        "channels_last": False,
        "deterministic": True,
        "diagnostics": "off",
        "data": {},
    }  # fmt: skip
    return RunConfig(**{**fields, **changes})


def some_data(loss: str = "squared_error", *, examples: int = 44, planted: bool = False) -> Data:
    """Examples with 4 inputs and 3 outputs (or classes)."""
    generator = torch.Generator().manual_seed(7)
    weight = torch.randn(3, 4, generator=generator)

    def split(count: int) -> Split:
        inputs = torch.randn(count, 4, generator=generator)
        outputs = inputs @ weight.T
        targets: Tensor = outputs
        if loss == "cross_entropy":
            targets = outputs.argmax(dim=1)
        elif loss == "binary_cross_entropy":
            targets = (outputs > 0).float()
        return Split(inputs, targets)

    return Data(
        train=split(examples),
        validation=split(12),
        test=split(12),
        population=split(100) if planted else None,
        teacher_loss=0.25 if planted else None,
        input_shape=(4,),
        outputs=3,
        manifest={},
    )


def a_network(seed: int = 0, *, dropout: bool = False, batch_norm: bool = False) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        middle: list[nn.Module] = [nn.BatchNorm1d(6)] if batch_norm else []
        middle += [nn.Dropout(0.3)] if dropout else []
        return nn.Sequential(nn.Linear(4, 6), *middle, nn.Tanh(), nn.Linear(6, 3))


class Listener:
    """A tracker that keeps what it is told."""

    run_id = "listening"

    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []
        self.curvature: list[dict[str, Any]] = []
        self.finished: list[dict[str, Any]] = []

    def log(self, row: dict[str, Any], curvature_rows: list[dict[str, Any]]) -> None:
        self.rows.append(row)
        self.curvature += curvature_rows

    def send(self) -> None:
        pass

    def finish(self, summary: dict[str, Any], folder: Any) -> None:
        self.finished.append(summary)
