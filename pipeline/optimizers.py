"""From a run's configuration to its optimizer: any `torch.optim.Optimizer`, or two that share the parameters.

The one idea: a class that asks for `model` first gets the network and the criterion to watch, any other the
parameters. Where the configuration names an optimizer of the `rest`, as Muon needs it, weights go to the first as
matrices and everything else goes to the rest; the loop sees one optimizer.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from pipeline.checks import ConfigError
from pipeline.config import RunConfig, optimizer_class
from pipeline.seeds import number


def build(run: RunConfig, model: nn.Module, criterion: nn.Module, seed: int) -> torch.optim.Optimizer:
    """The optimizer of this run; one that draws random numbers gets a generator seeded by ``seed``.

    Raises ConfigError for a class or arguments that cannot be.
    """
    field = f"optimizer.{run.optimizer}"
    if run.rest is None:
        return _make(field, run.target_class, run.options, model, criterion, seed)
    rest = {name: value for name, value in run.rest.items() if name != "_target_"}
    parameters = list(model.parameters())
    weights = [Matrix(parameter) for parameter in parameters if parameter.ndim > 1]
    others = [parameter for parameter in parameters if parameter.ndim <= 1]
    first = _make(field, run.target_class, run.options, [weight.matrix for weight in weights], criterion, seed)
    parts = [first]
    if others:
        parts.append(_make(f"{field}.rest", run.rest["_target_"], rest, others, criterion, seed))
    return Shared(parameters, weights, parts)


def _make(
    field: str,
    target: str,
    options: dict[str, Any],
    what: nn.Module | list[nn.Parameter],
    criterion: nn.Module,
    seed: int,
) -> torch.optim.Optimizer:
    """An optimizer of the network or of the parameters `what`."""
    cls = optimizer_class(field, target, options)
    closure = inspect.signature(cls.step).parameters.get("closure")
    if closure is not None and closure.default is inspect.Parameter.empty:
        raise ConfigError(f"{field}._target_: {target!r} needs a closure; expected a step() without")
    accepted = inspect.signature(cls).parameters
    options = dict(options)
    parameters = list(what.parameters()) if isinstance(what, nn.Module) else what
    if "generator" in accepted and options.get("generator") is None:
        options["generator"] = torch.Generator(parameters[0].device).manual_seed(number(seed, "optimizer"))
    try:
        if next(iter(accepted), None) != "model":
            return cls(parameters, **options)
        if not isinstance(what, nn.Module):
            raise ConfigError(f"{field}._target_: {target!r} takes whole networks; expected one that takes parameters")
        return cls(what, loss=criterion, **options)  # type: ignore[call-arg, arg-type]
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{field}: refused by {target}: {' '.join(str(error).split())}") from error


class Matrix:
    """A weight as a matrix [outputs, all else]: itself where it is one, else a copy that follows it."""

    def __init__(self, weight: nn.Parameter) -> None:
        self.weight = weight
        self.matrix = weight if weight.ndim == 2 else nn.Parameter(weight.detach().flatten(1).clone())

    def read(self) -> None:
        """Bring value and gradient from the weight."""
        if self.matrix is not self.weight:
            self.matrix.copy_(self.weight.flatten(1))
            self.matrix.grad = None if self.weight.grad is None else self.weight.grad.flatten(1)

    def write(self) -> None:
        """Take the value back to the weight."""
        if self.matrix is not self.weight:
            self.weight.copy_(self.matrix.view_as(self.weight))


class Shared(torch.optim.Optimizer):
    """Several optimizers of disjoint parameters as one; its groups are theirs, so that schedules reach all."""

    def __init__(
        self, parameters: Iterable[nn.Parameter], weights: list[Matrix], parts: list[torch.optim.Optimizer]
    ) -> None:
        super().__init__(parameters, {})
        self._all = [parameter for group in self.param_groups for parameter in group["params"]]
        self._weights, self._parts = weights, parts
        self._share()

    def _share(self) -> None:
        self.param_groups = [group for part in self._parts for group in part.param_groups]

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Gradients of the network's parameters to None."""
        for parameter in self._all:
            parameter.grad = None

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One step of each part."""
        for weight in self._weights:
            weight.read()
        for part in self._parts:
            part.step()
        for weight in self._weights:
            weight.write()

    def state_dict(self) -> dict[str, Any]:
        return {"parts": [part.state_dict() for part in self._parts]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        for part, state in zip(self._parts, state_dict["parts"], strict=True):
            part.load_state_dict(state)
        self._share()
