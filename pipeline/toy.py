"""Stage `toy`: Gaussian inputs with targets planted by a teacher network, whose own loss is therefore known.

A student's excess loss is its loss on a large fixed noiseless draw, the population, minus the teacher's
there: zero for a student that has become the teacher, whatever the noise in the training targets.
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

    stream = torch.Generator().manual_seed(source["seed"])
    spread = input_map(source["inputs"], source["condition"], stream)
    teacher = Teacher(white(4096, source["inputs"], stream), source["outputs"], **source["teacher"], stream=stream)
    splits: dict[str, Split] = {}
    for part in ("train", "validation", "test", "population"):
        coordinates = white(source[part], source["inputs"], stream)
        clean = teacher(coordinates)
        if source["task"] == "binary":
            targets = torch.sigmoid(clean)
            if part == "population":
                teacher_loss = float(torch.nn.functional.binary_cross_entropy_with_logits(clean, targets))
            else:
                targets = torch.bernoulli(targets, generator=stream)
        else:
            noise = torch.randn(clean.shape, generator=stream, dtype=clean.dtype)
            targets = clean if part == "population" else clean + source["noise"] * noise
            teacher_loss = 0.0
        splits[part] = Split((coordinates @ spread).float(), targets.float())
    write(folder, splits, source["outputs"], source, teacher_loss)


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
    so that every output has standard deviation `scale` on the inputs `sample`.
    """

    def __init__(
        self,
        sample: "Tensor",
        outputs: int,
        depth: int,
        width: int,
        activation: str,
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
        self.weights[-1] *= scale / self(sample).std(0)

    def __call__(self, inputs: "Tensor") -> "Tensor":
        for weight in self.weights[:-1]:
            inputs = self.activation(inputs @ weight)
        return inputs @ self.weights[-1]


if __name__ == "__main__":
    run_stage(toy, "benchmark")
