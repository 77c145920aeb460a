"""Stage `toy`: Gaussian inputs with targets planted by a teacher network, so that the best possible loss is known.

A student's excess loss is its loss on a large fixed draw, the population, minus the best possible one there. The
population's targets have no draw in them: outputs without noise, or the probabilities that labels are drawn from. So
the best loss is zero for regression and the entropy of the labels else, and a student that has become the teacher
has an excess of zero.
"""

import math
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from pipeline.checks import ConfigError
from pipeline.config import load, run_stage

if TYPE_CHECKING:
    from torch import Generator, Tensor


def toy(benchmark: str) -> None:
    """Write data/<benchmark> as `planted.<benchmark>` says."""
    planted = load().planted
    if benchmark not in planted:
        raise ConfigError(f"planted: has no {benchmark!r}; it has {', '.join(planted) or 'nothing'}")
    make(planted[benchmark], f"data/{benchmark}")


def make(source: dict[str, Any], folder: str) -> None:
    """Write the data set that `source` (the fields of `planted.<benchmark>`) describes into `folder`.

    Inputs are [N, inputs], targets [N, outputs]. The teacher sees the inputs' white coordinates: directions of
    little variance matter as much as others, so a student has to undo the condition number. All is drawn and
    computed in float64, then rounded.
    """
    import torch

    from pipeline.data import Split, write

    plant = {"regression": regression, "binary": binary, "classification": classification}[source["task"]]
    stream = torch.Generator().manual_seed(source["seed"])
    spread = input_map(source["inputs"], source["condition"], stream)
    teacher = Teacher(white(4096, source["inputs"], stream), source["outputs"], **source["teacher"], stream=stream)
    splits: dict[str, Split] = {}
    for part in ("train", "validation", "test", "population"):
        coordinates = white(source[part], source["inputs"], stream)
        mean, drawn, best_loss = plant(teacher(coordinates), source["noise"], stream)
        targets = mean if part == "population" else drawn
        splits[part] = Split(
            (coordinates @ spread).float(), targets.float() if targets.is_floating_point() else targets
        )
    write(folder, splits, source["outputs"], source, best_loss)


def regression(outputs: "Tensor", noise: float, stream: "Generator") -> tuple["Tensor", "Tensor", float]:
    """Means, draws and the best possible squared error on the means: outputs [N, outputs], the same with Gaussian noise
    of standard deviation `noise`, zero."""
    import torch

    drawn = torch.randn(outputs.shape, generator=stream, dtype=outputs.dtype)
    return outputs, outputs + noise * drawn, 0.0


def binary(logits: "Tensor", noise: float, stream: "Generator") -> tuple["Tensor", "Tensor", float]:
    """Probabilities of label 1, labels drawn from them, the mean entropy of a label: each output number on its own.

    The share `noise` of the labels is thrown by a coin.
    """
    import torch

    probabilities = (1 - noise) * torch.sigmoid(logits) + noise / 2
    entropy = -(probabilities.xlogy(probabilities) + (1 - probabilities).xlogy(1 - probabilities))
    return probabilities, torch.bernoulli(probabilities, generator=stream), float(entropy.mean())


def classification(logits: "Tensor", noise: float, stream: "Generator") -> tuple["Tensor", "Tensor", float]:
    """Probabilities [N, classes], classes [N] drawn from them, the mean entropy of a class.

    The share `noise` of the classes is drawn from all classes alike.
    """
    import torch

    probabilities = (1 - noise) * torch.softmax(logits, dim=1) + noise / logits.shape[1]
    drawn = torch.multinomial(probabilities, 1, generator=stream)[:, 0]
    return probabilities, drawn, float(-probabilities.xlogy(probabilities).sum(1).mean())


def input_map(inputs: int, condition: float, stream: "Generator") -> "Tensor":
    """Square root [inputs, inputs] of an input covariance of mean eigenvalue 1.

    Its eigenvalues fall geometrically by `condition` in all, its eigenvectors are random.
    """
    import torch

    exponents = torch.linspace(0, -1, inputs, dtype=torch.float64)
    eigenvalues = condition**exponents
    eigenvalues /= eigenvalues.mean()
    basis, upper = torch.linalg.qr(torch.randn(inputs, inputs, generator=stream, dtype=torch.float64))
    basis = basis * upper.diagonal().sign()  # makes the factorisation unique, and the basis uniform
    return eigenvalues.sqrt()[:, None] * basis.T


def white(examples: int, inputs: int, stream: "Generator") -> "Tensor":
    """Independent standard Gaussians [examples, inputs]."""
    import torch

    return torch.randn(examples, inputs, generator=stream, dtype=torch.float64)


class Teacher:
    """A random network without biases, [N, inputs] -> [N, outputs], through `depth` layers of `width` units.

    Weights are Gaussian with variance one over the fan-in; the last ones are then scaled, column by column,
    so that every output has standard deviation `scale` on the inputs `sample`. With `batch_norm` every hidden unit is
    shifted and scaled before its activation, once and for all, to mean zero and variance one on `sample`: without,
    the outputs of a deep teacher are about the same for all inputs.
    """

    def __init__(
        self,
        sample: "Tensor",
        outputs: int,
        depth: int,
        width: int,
        activation: str,
        batch_norm: bool,
        scale: float,
        stream: "Generator",
    ) -> None:
        import torch

        sizes = [sample.shape[1], *[width] * (depth - 1), outputs]
        self.activation = {"none": lambda x: x, "relu": torch.relu, "tanh": torch.tanh}[activation]
        self.weights = [
            torch.randn(rows, columns, generator=stream, dtype=torch.float64) / math.sqrt(rows)
            for rows, columns in pairwise(sizes)
        ]
        self.shifts = [torch.zeros(1, dtype=torch.float64)] * (depth - 1)
        if batch_norm:
            hidden = sample
            for k in range(depth - 1):
                sums = hidden @ self.weights[k]
                self.weights[k] /= sums.std(0)
                self.shifts[k] = -sums.mean(0) / sums.std(0)
                hidden = self.activation(hidden @ self.weights[k] + self.shifts[k])
        self.weights[-1] *= scale / self(sample).std(0)

    def __call__(self, inputs: "Tensor") -> "Tensor":
        for weight, shift in zip(self.weights, self.shifts, strict=False):
            inputs = self.activation(inputs @ weight + shift)
        return inputs @ self.weights[-1]


if __name__ == "__main__":
    run_stage(toy, "benchmark")
