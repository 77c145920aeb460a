"""Curvature diagnostics of a run, of whatever optimizer: what the loss looks like where it is, and how good a step is.

The one idea: everything is measured on a copy of the network against the exact GGN of the loss. The spectrum and the
gradient's norm are those on one fixed batch, the same for every optimizer and seed; the quality of a step is judged on
the batch that the step was made from, since only that gradient is what the optimizer saw. The training is looked at,
never touched: not its weights, gradients, buffers, random numbers nor the optimizer's statistics.

A probe at step k looks at the step that led from k - 1 to k: curvature and gradient are those at k - 1, the update is
the difference of the raw weights. At step 0 there is no update yet. The copy is in training mode (the objective that is
being minimised, batch norm by the statistics of the probe batch), but without dropout.

Price levels: ``off``; ``light``, up to five points of the run, evenly spaced in the logarithm of the step; ``full``,
every evaluation, on more examples, with more eigenvalues and the GGN block of every layer. Of a large network the
curvature is that of fewer examples (`Price.operations`), since a probe takes dozens of products with it; the gradient
and the decrease of a step are always those of its batch.
"""

from __future__ import annotations

import copy
import math
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from kfac import diagnostics
from pipeline.config import RunConfig
from pipeline.evaluation import LOSSES
from pipeline.records import Row

RELATIVE_DAMPING = 0.5  # of the reference natural gradient: this times the mean curvature, trace / parameters
LEAST = 16  # examples for curvature, however large the network
_LIGHT_POINTS = 4  # besides step 0
_ORDINALS = ("top", "second", "third", "fourth", "fifth", "sixth", "seventh", "eighth")


@dataclass(frozen=True)
class Price:
    examples: int  # of the fixed batch
    step_examples: int  # of the step's batch, at most
    operations: float  # of a forward pass for curvature, at most: decides between these examples and LEAST
    eigenvalues: int
    tolerance: float  # relative, of an eigenvalue
    trace_samples: int
    solve_iterations: int  # products for the natural gradient, at most
    solve_tolerance: float  # of its residual, relative
    blocks: bool


PRICES = {
    "light": Price(
        examples=64,
        step_examples=512,
        operations=5e8,
        eigenvalues=2,
        tolerance=0.03,
        trace_samples=8,
        solve_iterations=25,
        solve_tolerance=0.02,
        blocks=False,
    ),
    "full": Price(
        examples=256,
        step_examples=1024,
        operations=1e10,
        eigenvalues=8,
        tolerance=0.01,
        trace_samples=32,
        solve_iterations=100,
        solve_tolerance=1e-3,
        blocks=True,
    ),
}


def probe_steps(steps: int, evaluate_every: int, level: str) -> frozenset[int]:
    """The evaluations at which a run is probed."""
    evaluations = [*range(0, steps, evaluate_every), steps]
    if level == "off":
        return frozenset()
    if level == "full":
        return frozenset(evaluations)
    first = evaluations[1]
    ratio = (steps / first) ** (1.0 / (_LIGHT_POINTS - 1))
    wanted = [first * ratio**i for i in range(_LIGHT_POINTS)]
    return frozenset([0, *(min(evaluations[1:], key=lambda e: abs(math.log(e / w))) for w in wanted)])


class Probe:
    """Diagnostics of one run; made before its optimizer, so that the copy has none of its hooks.

    ``steps``: where ``measure`` is due; ``before`` belongs right before the step that leads there.
    """

    def __init__(self, run: RunConfig, model: nn.Module, data: Any) -> None:
        self.steps = probe_steps(run.steps, run.evaluate_every, run.diagnostics)
        self._factors: dict[str, tuple[Tensor, Tensor]] = {}
        if not self.steps:
            return
        self._price = PRICES[run.diagnostics]
        self._criterion = LOSSES[run.loss](data.outputs)
        self._twin = copy.deepcopy(model)
        most = self._price.operations / _operations(self._twin, data.train)
        self._most = max(LEAST, int(most))  # examples for curvature
        self._twin.train()
        for module in self._twin.modules():
            if isinstance(module, nn.modules.dropout._DropoutNd):
                module.eval()
        count = len(data.train)
        generator = torch.Generator().manual_seed(0)
        chosen = torch.randperm(count, generator=generator)[: min(self._price.examples, self._most)]
        self._inputs, self._targets = data.train.batch(chosen.to(data.train.inputs.device))
        self._layers: dict[str, list[int]] = defaultdict(list)  # indices into the trained parameters
        for index, (name, _) in enumerate(_trained(self._twin)):
            self._layers[name.rpartition(".")[0]].append(index)

    def before(self, model: nn.Module, inputs: Tensor, targets: Tensor) -> None:
        """Remember the weights that the next step starts from, and its batch."""
        self._follow(model)
        self._batch = inputs[: self._price.step_examples], targets[: self._price.step_examples]

    def state(self) -> dict[str, Any]:
        """What the next ``measure`` compares with, for checkpoints made between an evaluation and the next step."""
        return {"factors": dict(self._factors)}

    def restore(self, state: dict[str, Any]) -> None:
        device = self._inputs.device if self.steps else "cpu"
        self._factors = {layer: (a.to(device), g.to(device)) for layer, (a, g) in state["factors"].items()}

    def _follow(self, model: nn.Module) -> None:
        with torch.no_grad():
            for mine, theirs in zip(_tensors(self._twin), _tensors(model), strict=True):
                mine.copy_(theirs)

    def measure(self, step: int, model: nn.Module, optimizer: torch.optim.Optimizer) -> list[Row]:
        """Rows for ``curvature.csv`` (step, layer, quantity, value)."""
        if step == 0:
            self._follow(model)
        operator = diagnostics.GGN(self._twin, self._criterion, self._inputs, self._targets)
        rows = self._spectrum(step, "", operator, self._price.eigenvalues)
        trace = float(rows[-1]["value"] or 0.0)
        if self._price.blocks:
            for layer, members in self._layers.items():
                weights = [parameter for _, parameter in _trained(self._twin)]
                block = diagnostics.GGN(
                    self._twin, self._criterion, self._inputs, self._targets, [weights[i] for i in members]
                )
                rows += self._spectrum(step, layer, block, 1)
        gradient = list(operator.gradient)
        rows += self._norms(step, "gradient_norm", gradient)
        rows.append(_row(step, "", "examples", len(self._inputs)))
        if step:
            rows += self._update(step, model, RELATIVE_DAMPING * trace / operator.size)
        if hasattr(optimizer, "curvature"):
            rows += self._kronecker(step, optimizer)
        return rows

    def _spectrum(self, step: int, layer: str, operator: Any, count: int) -> list[Row]:
        """Largest eigenvalues and trace of the exact GGN, or of a layer's block of it."""
        count = min(count, operator.size)
        values = diagnostics.largest_eigenvalues(operator, count, seed=0, tolerance=self._price.tolerance)
        trace = diagnostics.trace(operator, self._price.trace_samples, seed=0)
        rows = [
            _row(step, layer, f"{name}_eigenvalue", value)
            for name, value in zip(_ORDINALS, values.tolist(), strict=False)
        ]
        return [*rows, _row(step, layer, "trace", trace)]

    def _update(self, step: int, model: nn.Module, damping: float) -> list[Row]:
        """How good the step was that led here, on its own batch; moves the copy to its end."""
        inputs, targets = (part[: self._most] for part in self._batch)
        operator = diagnostics.GGN(self._twin, self._criterion, inputs, targets)
        loss = self._loss()
        weights = [parameter for _, parameter in _trained(self._twin)]
        gradient = list(torch.autograd.grad(loss, weights, materialize_grads=True))
        with torch.no_grad():
            pairs = zip(_trained(model), _trained(self._twin), strict=True)
            update = [after - before for (_, after), (_, before) in pairs]
            self._follow(model)
            decrease = float(loss) - float(self._loss())
        natural = diagnostics.damped_natural_gradient(
            operator,
            gradient,
            damping,
            tolerance=self._price.solve_tolerance,
            max_iterations=self._price.solve_iterations,
        )
        predicted = -float(diagnostics.quadratic_model(operator, gradient, update))
        found: dict[str, float | Tensor] = {
            "cosine_gradient": -diagnostics.cosine(update, gradient),
            "cosine_natural": -diagnostics.cosine(update, natural.direction),
            "natural_residual": natural.residual,
            "predicted_decrease": predicted,
            "actual_decrease": decrease,
            "reduction_ratio": decrease / predicted if predicted else math.nan,
        }
        rows = [_row(step, "", quantity, value) for quantity, value in found.items()]
        return self._norms(step, "update_norm", update) + rows

    def _norms(self, step: int, quantity: str, vector: list[Tensor]) -> list[Row]:
        """Length of the whole vector and of each layer's part."""
        parts = {"": range(len(vector)), **self._layers}
        return [
            _row(step, layer, quantity, diagnostics.norm([vector[i] for i in members]))
            for layer, members in parts.items()
        ]

    def _loss(self) -> Tensor:
        inputs, targets = self._batch
        return self._criterion(self._twin(inputs), targets)

    def _kronecker(self, step: int, optimizer: Any) -> list[Row]:
        """What the Kronecker optimizers believe, by layer and summarised by the median over layers.

        Extreme eigenvalues are those of the factors, condition numbers those of the damped factors.
        """
        rows: list[Row] = []
        over_layers: dict[str, list[float]] = defaultdict(list)
        for layer, state in optimizer.curvature().items():
            previous = self._factors.get(layer)
            measured: dict[str, float | Tensor] = {}
            for side, factor, damping in (("a", state.A, state.damping_a), ("g", state.G, state.damping_g)):
                spectrum = diagnostics.factor_spectrum(factor)
                measured[f"largest_{side}"] = spectrum.largest
                measured[f"smallest_{side}"] = spectrum.smallest
                if damping.dim():  # a convolution with groups: one damping each
                    spectrum = diagnostics.factor_spectrum(factor, damping[:, None])
                    measured[f"condition_{side}"] = spectrum.condition
                else:
                    low, high = float(spectrum.smallest + damping), float(spectrum.largest + damping)
                    measured[f"condition_{side}"] = high / low if low > 0 else math.inf
                measured[f"damping_{side}"] = damping.mean()
                if previous is not None:
                    old = previous[0 if side == "a" else 1]
                    measured[f"drift_{side}"] = (factor - old).norm() / old.norm()
            self._factors[layer] = (state.A.detach().clone(), state.G.detach().clone())
            measured["pi"] = state.pi.mean()
            measured["inverse_age"] = float(state.age)
            for quantity, value in measured.items():
                rows.append(_row(step, layer, quantity, value))
                if quantity != "condition_a" or state.A.shape[-1] > 1:  # a norm layer's A is the number 1
                    over_layers[quantity].append(float(value))
        summary: dict[str, float | Tensor] = {
            quantity: median(over_layers[quantity])
            for quantity in ("condition_a", "condition_g", "pi", "inverse_age")
            if over_layers[quantity]
        }
        drifts = over_layers["drift_a"] + over_layers["drift_g"]
        if drifts:
            summary["factor_drift"] = median(drifts)
        stats = getattr(optimizer, "stats", {})
        summary |= {key: stats[key] for key in ("damping", "kl_clip", "coarse_gain") if key in stats}
        return [_row(step, "", quantity, value) for quantity, value in summary.items()] + rows


def _row(step: int, layer: str, quantity: str, value: float | Tensor) -> Row:
    return {"step": step, "layer": layer, "quantity": quantity, "value": float(value)}


def _operations(model: nn.Module, split: Any) -> int:
    """Multiplications and additions of a forward pass of one example."""
    inputs, _ = split.batch(slice(1))
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.eval()(inputs)
    return max(1, counter.get_total_flops())


def _trained(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    return [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]


def _tensors(model: nn.Module) -> Iterable[Tensor]:
    yield from model.parameters()
    yield from model.buffers()
