"""Ten small problems on which an optimizer has to hold with its defaults, and one loop that trains any of them.

Each is a data set, a network with its first weights, a criterion and a batch size, all drawn from seeds of their own;
each trains in a few seconds on one core. What makes them hard differs: conditioning, depth, initialisation, small
batches, label noise, rare labels, batch norm, attention, recurrence.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from cases import mlp
from sklearn.datasets import load_digits
from torch import Tensor, nn


@dataclass
class Task:
    """A problem ready to train; inputs and targets are all of the data, batches are drawn without replacement."""

    model: nn.Module
    criterion: nn.Module
    inputs: Tensor
    targets: Tensor
    batch: int

    def batches(self, steps: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
        """`steps` batches: epoch after epoch, each in an order of its own, the incomplete last batch left out."""
        stream = torch.Generator().manual_seed(seed)
        left: list[Tensor] = []
        for _ in range(steps):
            if not left:
                order = torch.randperm(len(self.inputs), generator=stream)
                left = [x for x in order.split(self.batch) if len(x) == self.batch]
            chosen = left.pop()
            yield self.inputs[chosen], self.targets[chosen]

    @torch.no_grad()
    def loss(self) -> float:
        """The criterion over all of the data, the model in evaluation mode."""
        self.model.eval()
        value = float(self.criterion(self.model(self.inputs), self.targets))
        self.model.train()
        return value


def train(task: Task, optimizer: Any, steps: int, every: int = 10, seed: int = 0) -> list[float]:
    """The loss over all data at the start, then after each `every` steps."""
    curve = [task.loss()]
    for count, (inputs, targets) in enumerate(task.batches(steps, seed), start=1):
        optimizer.zero_grad()
        task.criterion(task.model(inputs), targets).backward()
        optimizer.step()
        if count % every == 0:
            curve.append(task.loss())
    return curve


def _seeded(build: Callable[[], Task]) -> Callable[[int], Task]:
    def make(seed: int = 0) -> Task:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return build()

    return make


def _scaled(model: nn.Module, gain: float) -> nn.Module:
    """Weights of all Linear layers drawn anew, Gaussian with variance gain^2 over the fan-in; biases zero."""
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=gain / module.in_features**0.5)
            nn.init.zeros_(module.bias)
    return model


def _digits() -> tuple[Tensor, Tensor]:
    """1,797 images [N, 64] in [0, 1] and their classes."""
    images, classes = load_digits(return_X_y=True)
    return torch.tensor(images / 16, dtype=torch.float32), torch.tensor(classes)


def linear_regression() -> Task:
    """Inputs whose covariance has condition number 10,000; noise leaves a loss of 0.01."""
    inputs = torch.randn(2000, 30) * torch.logspace(0, -2, 30) @ torch.linalg.qr(torch.randn(30, 30))[0]
    inputs /= inputs.std()
    targets = inputs @ torch.linalg.pinv(inputs) @ torch.randn(2000, 5) * 5
    return Task(nn.Linear(30, 5), nn.MSELoss(), inputs, targets + 0.1 * torch.randn(2000, 5), 32)


def planted_regression() -> Task:
    """A tanh net learns another one, squared error summed over outputs and examples."""
    inputs = torch.randn(2000, 10)
    with torch.no_grad():
        targets = 2 * _scaled(mlp(10, 20, 20, 4), 1.5)(inputs)
    return Task(mlp(10, 40, 40, 4), nn.MSELoss(reduction="sum"), inputs, targets, 64)


def noisy_digits() -> Task:
    """One label in ten is wrong; batches of 32."""
    inputs, classes = _digits()
    wrong = torch.rand(len(classes)) < 0.1
    classes = torch.where(wrong, torch.randint(10, classes.shape), classes)
    return Task(mlp(64, 50, 50, 10, activation=nn.ReLU), nn.CrossEntropyLoss(), inputs, classes, 32)


def rare_labels() -> Task:
    """Twelve binary labels, each true for one example in twenty, by an eight-layer ReLU net with torch's weights."""
    inputs = torch.randn(3000, 16)
    with torch.no_grad():
        scores = _scaled(mlp(16, 32, 12), 1.5)(inputs)
    labels = (scores > scores.quantile(0.95, dim=0)).float()
    model = mlp(16, *[32] * 7, 12, activation=nn.ReLU)
    return Task(model, nn.BCEWithLogitsLoss(), inputs, labels, 64)


def autoencoder() -> Task:
    """A deep autoencoder from torch's own, far too small weights: it starts on a plateau."""
    pixels, _ = _digits()
    model = mlp(64, 64, 32, 16, 6, 16, 32, 64, 64)
    return Task(model, nn.BCEWithLogitsLoss(), pixels, pixels, 100)


def saturated() -> Task:
    """Ten tanh layers whose weights are 2.5 times too large."""
    inputs, classes = _digits()
    model = _scaled(mlp(64, *[32] * 9, 10), 2.5)
    return Task(model, nn.CrossEntropyLoss(), inputs, classes, 64)


def convolutions() -> Task:
    """Three convolutions without normalisation, batches of 16."""
    inputs, classes = _digits()
    model = nn.Sequential(
        nn.Unflatten(1, (1, 8, 8)),
        nn.Conv2d(1, 8, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(8, 12, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Conv2d(12, 16, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(64, 10),
    )
    return Task(model, nn.CrossEntropyLoss(), inputs, classes, 16)


class _Residual(nn.Module):
    """x + f(x), f two convolutions with batch norm."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.second = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norms = nn.ModuleList([nn.BatchNorm2d(channels), nn.BatchNorm2d(channels)])

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(x + self.norms[1](self.second(torch.relu(self.norms[0](self.first(x))))))


def residual() -> Task:
    """Seven convolutions with batch norm and shortcuts, batches of 32."""
    inputs, classes = _digits()
    model = nn.Sequential(
        nn.Unflatten(1, (1, 8, 8)),
        nn.Conv2d(1, 12, 3, stride=2, padding=1, bias=False),
        nn.BatchNorm2d(12),
        nn.ReLU(),
        _Residual(12),
        _Residual(12),
        _Residual(12),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(12, 10),
    )
    return Task(model, nn.CrossEntropyLoss(), inputs, classes, 32)


class _Attention(nn.Module):
    """A pre-norm transformer block of two heads."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norms = nn.ModuleList([nn.LayerNorm(width), nn.LayerNorm(width)])
        self.mix, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        n, t, width = x.shape
        query, key, value = self.mix(self.norms[0](x)).reshape(n, t, 3, 2, width // 2).permute(2, 0, 3, 1, 4)
        seen = nn.functional.scaled_dot_product_attention(query, key, value)
        x = x + self.out(seen.transpose(1, 2).reshape(n, t, width))
        return x + self.down(nn.functional.gelu(self.up(self.norms[1](x))))


class _Transformer(nn.Module):
    """Tokens [N, T] to scores [N, symbols, T]."""

    def __init__(self, symbols: int, length: int, width: int) -> None:
        super().__init__()
        self.symbol, self.position = nn.Embedding(symbols, width), nn.Embedding(length, width)
        self.blocks = nn.Sequential(_Attention(width), _Attention(width))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, symbols)

    def forward(self, tokens: Tensor) -> Tensor:
        places = torch.arange(tokens.shape[1]).expand_as(tokens)
        return self.head(self.norm(self.blocks(self.symbol(tokens) + self.position(places)))).mT


def transformer() -> Task:
    """A two-block transformer sorts eight symbols."""
    tokens = torch.randint(10, (2000, 8))
    return Task(_Transformer(10, 8, 24), nn.CrossEntropyLoss(), tokens, tokens.sort(dim=1).values, 64)


class _Recurrent(nn.Module):
    """h <- tanh(cell(h, x_t)) over T steps, one Linear called T times; [N, T, d] -> [N, outputs]."""

    def __init__(self, inputs: int, width: int, outputs: int) -> None:
        super().__init__()
        self.width, self.cell, self.head = width, nn.Linear(inputs + width, width), nn.Linear(width, outputs)

    def forward(self, sequence: Tensor) -> Tensor:
        state = sequence.new_zeros(len(sequence), self.width)
        for x in sequence.unbind(1):
            state = torch.tanh(self.cell(torch.cat([x, state], dim=1)))
        return self.head(state)


def recurrent() -> Task:
    """Ten steps of an unrolled cell add the numbers that are marked, batches of 32."""
    numbers, marks = torch.rand(2000, 10), (torch.rand(2000, 10) < 0.3).float()
    inputs, targets = torch.stack([numbers, marks], dim=2), (numbers * marks).sum(1, keepdim=True)
    return Task(_Recurrent(2, 24, 1), nn.MSELoss(), inputs, targets, 32)


STEPS = 200
PROBLEMS: dict[str, Callable[[int], Task]] = {
    build.__name__.replace("_", " "): _seeded(build)
    for build in (
        linear_regression,
        planted_regression,
        noisy_digits,
        rare_labels,
        autoencoder,
        saturated,
        convolutions,
        residual,
        transformer,
        recurrent,
    )
}
