"""The engine that optimizers and `Preconditioner` share: a model's Kronecker-factored curvature, kept up to date.

Inside the user's backward it collects statistics (capture.py, collect.py); once a step it averages them (factors.py),
chooses the damping and lets a method (method.py) renew its preconditioners. A step is then

    arm -> forward, backward -> gather -> update -> directions -> finish
"""

from __future__ import annotations

import contextlib
import math
import os
import sys
import warnings
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from . import compiling, distributed, factors
from .batch import Batch
from .capture import Capture, without_autocast
from .collect import Collector
from .find import find_blocks, without_block
from .later import Later, at_once, seen_one
from .layers import Block
from .linalg import diagonal
from .method import Method
from .options import value_at
from .parts import worth_joining
from .precision import rounded_products
from .rows import MODEL_ROWS, row_products
from .state import BlockState, LayerCurvature

SAVED = {"steps", "scalars", "dampings", "generators", "blocks", "layers", "kind", "method", "later"}  # of a state
SMALLEST_LOSS_SCALE = 256  # of a GradScaler; a smaller factor on the loss is taken for the user's own
AVERAGED_EXAMPLES = 2_500  # that a running average of sampled curvature holds before batches are thinned


class Curvature:
    """Statistics, damping and preconditioners of all blocks of a model.

    Args:
        model, loss, damping, relative_damping, fisher, fisher_samples, generator: as in `KroneckerOptimizer`.
        method: makes preconditioners of factors.
        stat_decay, factor_interval, inverse_interval: as in `KroneckerOptimizer`, but never None.
        early_steps: at each of the first so many steps everything is renewed.
        first_order: ids of parameters that are to have no block.
        owner: the class that a warning names; `instead` says what becomes of parameters without a block.

    Attributes:
        stats: what the last step measured, 0-dimensional tensors on the device.
        trust: Levenberg-Marquardt factor on the damping, 0-dimensional, or None for 1.
    """

    def __init__(
        self,
        model: nn.Module,
        loss: object,
        method: Method,
        *,
        damping: float | Callable[[int], float] | None,
        relative_damping: float | Callable[[int], float],
        fisher: str,
        fisher_samples: int,
        stat_decay: float,
        factor_interval: int | Callable[[int], int],
        inverse_interval: int | Callable[[int], int],
        generator: torch.Generator | None,
        sharing: str | Mapping[str, str],
        max_factor_size: int,
        first_order: frozenset[int] = frozenset(),
        early_steps: int = 0,
        owner: str = "kfac",
        instead: str = "",
    ):
        self.method = method
        self.damping, self.relative_damping = damping, relative_damping
        self.stat_decay, self.early_steps = stat_decay, early_steps
        self.factor_interval, self.inverse_interval = factor_interval, inverse_interval
        self.stats: dict[str, Tensor] = {}
        self.phase: Callable[[str], AbstractContextManager] = no_phase
        network = compiling.unwrapped(model)
        self.blocks = find_blocks(network, sharing=sharing, max_factor_size=max_factor_size, first_order=first_order)
        self.states: dict[Block, BlockState] = {}  # of the blocks that have statistics
        self.step = 0
        self.trust: Tensor | None = None
        self.mean_curvature: Tensor | None = None
        self.base_damping: Tensor | None = None
        self.dampings: dict[Block, Tensor] = {}
        loss = compiling.unwrapped(loss) if isinstance(loss, nn.Module) else loss
        enough = max(MODEL_ROWS, round(AVERAGED_EXAMPLES * (1 - stat_decay)))
        rounds = method.dtype == torch.bfloat16
        self.collector = Collector(loss, fisher, fisher_samples, generator, method.keeps_rows, enough, rounds)
        self._owner = owner
        self._factors_at = self._inverses_at = -1
        self._factors_due = self._inverses_due = False
        self._warned: set[str] = set()
        self._pending: list[Later] = []  # whether steps that renewed something were finite
        self._failures: list[tuple[list[Block], Later]] = []  # which inverses failed
        self._factor: Later | None = None  # of the first loss
        weak = weakref.WeakMethod(self._receive)
        arguments = getattr(self.collector.curvature, "arguments", ((0, "input"),))
        self._capture = Capture(model, loss, self.blocks, lambda batch: _call(weak, batch), arguments)
        parameters = dict(network.named_parameters())
        missing = [
            f"{name} ({reason})"
            for name, reason in without_block(network, self.blocks).items()
            if id(parameters[name]) not in first_order
        ]
        if missing:
            more = f" and {len(missing) - 8} more" if len(missing) > 8 else ""
            self.warn("without", f"without a curvature block: {', '.join(missing[:8])}{more}; {instead}")

    # Statistics.

    def arm(self, model_due: bool, exactly: bool = False) -> None:
        """Decide what the coming step has to collect.

        `model_due` asks for rows of the quadratic model, `exactly` for those of exact vectors where factors have them.
        """
        while self._pending and self._pending[0].known(self.step, self.distributed):
            if not self._pending.pop(0).value():  # what was due then is due again
                self._factors_at = self._inverses_at = -1
                self.method.due_again()
        self._climb()
        early = self.step < self.early_steps
        self._factors_due = early or self._due(self._factors_at, self.factor_interval)
        self._inverses_due = early or self._due(self._inverses_at, self.inverse_interval)
        self.collector.factors_due, self.collector.model_due = self._factors_due, model_due
        self.collector.exact_model = exactly
        self.collector.clear()
        self._capture.clear()
        self._capture.active = bool(self.blocks) and (model_due or self._factors_due)

    def _due(self, last: int, interval: int | Callable[[int], int]) -> bool:
        since = self.step - (last if last >= self.early_steps else 0)  # intervals are counted from the first step on
        return last < 0 or since >= value_at(interval, self.step)

    def _receive(self, batch: Batch) -> bool:
        with self.phase("statistics"):
            return self.collector.receive(batch)

    def paused(self) -> AbstractContextManager:
        """A context in which forwards and backwards leave no statistics."""
        return _Paused(self._capture)

    def unmixed(self) -> AbstractContextManager:
        """A context for a step's own arithmetic, whatever autocast region the loop is in."""
        return without_autocast(self.blocks[0].parameters[0].device) if self.blocks else nullcontext()

    def drop(self) -> None:
        """Forget what was collected with gradients that are dropped; forwards whose backward is to come stay."""
        if self._capture.active:  # paused, an evaluation drops gradients of its own
            self.collector.clear()

    def gather(self, needs_loss: bool) -> None:
        """Take what the backwards left; `needs_loss` says that the step cannot do without the criterion's value.

        Raises:
            RuntimeError: for `needs_loss` when another object than the given criterion was called.
        """
        if not self._capture.active:
            return
        self.collector.share(self._capture.process_group)
        if not self.collector.weights:
            if any(block.has_gradient() for block in self.blocks):
                self.warn(
                    "nothing",
                    "statistics were due, but no forward and backward of the model came before this step",
                )
        elif not self.collector.losses and needs_loss:
            raise RuntimeError(
                "loss: the object given was not the one called before this step, and without lr= the step needs its "
                "value; allowed: calling that object in the loop, or lr=<number>"
            )
        elif needs_loss:
            self._check_factor()
        elif not self.collector.losses:
            self.warn("root", "the object given as loss= was not the one called; the model's output serves instead")

    def _check_factor(self) -> None:
        """Warn, as soon as the host knows, where the first loss of a self-tuned step was multiplied in the loop.

        A GradScaler's factor is gone from the gradients before the step, and cannot be told from another; it is large.
        """
        if self._factor is None:
            self._factor = Later(self.collector.factor(), self.step)
        if "factor" in self._warned or not self._factor.known(self.step, self.distributed):
            return
        factor: Any = self._factor.value().tolist()
        if abs(factor - 1) > 0.01 and abs(factor) < SMALLEST_LOSS_SCALE:
            self.warn(
                "factor",
                f"the loop multiplied the criterion's values by {factor:.4g} in all, of which the curvature knows "
                "nothing; allowed without lr=: a mean over micro-batches (1/k each), a GradScaler; another factor "
                "belongs into the criterion",
            )
        self._warned.add("factor")

    def knows(self, block: Block) -> bool:
        """Whether statistics of a block have arrived, at this step or before."""
        return block in self.states or block in self.collector.sums

    def finite(self, tensors: Iterable[Tensor]) -> Tensor:
        """Whether all that a step works on is finite: `tensors`, losses, new statistics; 0-dimensional bool."""
        # A row that is not finite shows on the diagonal of its own outer product.
        diagonals = [diagonal(x) for a, _, g in self.collector.sums.values() for x in (a, g)]
        return all_finite([*tensors, *self.collector.values(), *diagonals])

    # Averages, damping, preconditioners.

    def update(self, finite: Tensor, overrides: dict[Block, tuple[Any, float]] | None = None) -> None:
        """Average the new statistics and renew the preconditioners where that is due.

        Args:
            finite: where it is False, averages stay as they were.
            overrides: for a block its own damping (a number, a callable of the step, or None) and what an L2 term in
                the objective adds to it.
        """
        self.stats = {"skipped": 1.0 - finite.float()}
        with self.phase("statistics"):
            self._update_averages(finite)
        unsolved = any(not state.solver for state in self.states.values())  # a layer whose first statistics came now
        if unsolved or (self._inverses_due and self.states):
            with self.phase("inverses"):
                self._renew(overrides or {})
        if self.collector.factor_rows:
            with self.phase("statistics"):
                self.method.after_statistics(self, self.collector.kept_rows(), finite)
                self.collector.factor_rows = []
        if self.base_damping is not None and self.mean_curvature is not None:
            self.stats |= {"damping": self.base_damping, "mean_curvature": self.mean_curvature}

    def _update_averages(self, finite: Tensor) -> None:
        if not self.collector.sums:
            return
        for block in self.collector.sums:
            if block not in self.states:
                self.states[block] = BlockState.of(block)
        states = [self.states[block] for block in self.collector.sums]
        outer_a, rows, outer_g = (list(column) for column in zip(*self.collector.sums.values(), strict=True))
        torch._foreach_div_(outer_a, torch._foreach_clamp_min(rows, 1))  # nobody reads the sums again
        if not seen_one(norm := self.collector.norm()):
            torch._foreach_div_(outer_g, norm)
        counts = [state.count for state in states]
        torch._foreach_add_(counts, [finite.to(counts[0].dtype)] * len(counts))
        averages = [*(state.A for state in states), *(state.G for state in states)]
        factors.update_averages(averages, [*outer_a, *outer_g], counts * 2, self.stat_decay, finite)

    def _renew(self, overrides: dict[Block, tuple[Any, float]]) -> None:
        """The damping and the preconditioners of all layers, from the present averages."""
        self.mean_curvature = self._trace() / sum(math.prod(block.shape) for block in self.states)
        if self.damping is None:
            relative = value_at(self.relative_damping, self.step) * self.mean_curvature
            self.base_damping = torch.where(relative > 0, relative, 1.0)  # without any curvature: plain gradients
        else:
            self.base_damping = torch.full_like(self.mean_curvature, value_at(self.damping, self.step))
        if self.trust is not None:
            self.base_damping = self.base_damping * self.trust
        for block, state in self.states.items():
            own, l2 = overrides.get(block, (None, 0.0))
            damping = self.base_damping
            if own is not None:
                damping = torch.full_like(damping, value_at(own, self.step))
                damping = damping if self.trust is None else damping * self.trust
            self.dampings[block] = damping + l2 if l2 else damping
            state.age = 0
        dampings = [self.dampings[block] for block in self.states]
        failures = torch.stack(self.method.refresh(list(self.states), list(self.states.values()), dampings))
        self.stats["failed_inverses"] = failures.sum()
        self._failures.append((list(self.states), Later(failures, self.step)))
        self._climb()
        self._inverses_at = self.step

    def _trace(self) -> Tensor:
        """Of the curvature of all layers."""
        traces, single = [], []
        for block, state in self.states.items():
            if worth_joining(state.A.device) and (block.unit or block.shape[0] == 1):
                single += [diagonal(state.A)[:1], diagonal(state.G)]
            else:
                traces.append((diagonal(state.A).sum(-1) * diagonal(state.G).sum(-1)).sum())
        if single:  # of diagonals that are not negative the sums are norms, all of which are one call
            norms = torch._foreach_norm(single, 1)
            traces.append((torch.stack(norms[::2]) * torch.stack(norms[1::2])).sum())
        return torch.stack(traces).sum()

    def _climb(self) -> None:
        """Learn, without waiting, which inverses failed: they are named once and may need float64."""
        while self._failures and self._failures[0][1].known(self.step, self.distributed):
            blocks, later = self._failures.pop(0)
            failed = [block for block, one in zip(blocks, later.value().tolist(), strict=True) if one]
            for block in failed:
                self.states[block].rung += 1
            if failed:
                names = ", ".join(block.name or "(model)" for block in failed)
                self.warn("inverse", f"no damped inverse of {names}: the last one stays, the next try has more damping")

    def ready(self, block: Block) -> bool:
        """Whether a block has a preconditioner."""
        return block in self.states and bool(self.states[block].solver)

    def directions(self, blocks: Sequence[Block], gradients: Sequence[Tensor]) -> list[Tensor]:
        """Natural gradients (F + damping I)^-1 g, block by block, matrices [K, d_out, d_in]."""
        return self.method.directions(self, list(blocks), list(gradients))

    def quadratic_form(self, directions: Mapping[Block, Sequence[Tensor] | Tensor]) -> Tensor:
        """V^T F V for I directions V, given by blocks as I times [K, d_out, d_in], from this step's rows; [I, I]."""
        first = next(iter(directions.values()))
        form = first[0].new_zeros(len(first), len(first))
        for rows in self.collector.model_rows:
            shared = [(block, *pair) for block, pair in rows.layers.items() if block in directions]
            with rounded_products(self.collector.rounding):
                products = [row_products(a, g, directions[block]) for block, a, g in shared]
            if products:
                s = torch.stack(products).sum(0)
                form = form + s.mT @ s * (rows.weight / self.collector.norm())
        return self.sum_over_ranks([form])[0]

    @property
    def distributed(self) -> bool:
        """Whether several processes share the curvature."""
        return self._capture.process_group is not None

    def sum_over_ranks(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Tensors summed over the processes of `DistributedDataParallel`."""
        return distributed.sum_over_ranks(tensors, self._capture.process_group)

    def mean_over_ranks(self, tensor: Tensor) -> Tensor:
        """A tensor's mean over the processes of `DistributedDataParallel`, which is how those weigh their losses."""
        total, count = self.sum_over_ranks([tensor, torch.ones_like(tensor)])
        return total / count

    def finish(self, finite: Tensor) -> None:
        """Count a step that was made."""
        if self._factors_due and self.collector.weights:
            self._factors_at = self.step
        for state in self.states.values():
            state.age += 1
        self.step += 1
        if (self._factors_due or self._inverses_due) and not at_once(finite.device):
            self._pending.append(Later(finite, self.step))

    # What users look at, save and load.

    def layers(self) -> dict[str, LayerCurvature]:
        """The running factors of every layer that has statistics, by the layer's name in the model."""
        return {block.name: LayerCurvature.of(state) for block, state in self.states.items()}

    def summary(self) -> list[str]:
        """A line for each block."""
        lines = [f"{'layer':32} {'block':16} {'sharing':8} {'A':>12} {'G':>12} {'parameters':>11} {'MiB':>13}"]
        for block in self.blocks:
            sharing = "" if block.unit else "reduce" if block.reduce else "expand"
            start = f"{block.name or '(model)':32} {block.kind:16} {sharing:8}"
            if not block.initialised():
                lines.append(f"{start} known after the first forward")
                continue
            k, d_out, d_in = block.shape
            times = f"{k}x" if k > 1 else ""
            size_a = "1" if block.unit else f"{times}{d_in}{'' if block.diagonal_a else '^2'}"
            size_g = f"{times}{d_out}{'' if block.diagonal_g else '^2'}"
            count = sum(p.numel() for p in block.parameters)
            state = self.states.get(block)
            missing = "no statistics" if self.step else "-"
            held = f"{state.bytes() / 2**20:12.2f}" if state is not None else missing
            lines.append(f"{start} {size_a:>12} {size_g:>12} {count:11,} {held:>13}")
        return lines

    def state_dict(self) -> dict[str, Any]:
        """Plain tensors and numbers, keyed by layer names."""
        scalars = {"damping": self.base_damping, "mean_curvature": self.mean_curvature, "trust": self.trust}
        return {
            "steps": [self.step, self._factors_at, self._inverses_at],
            "scalars": {name: value for name, value in scalars.items() if value is not None},
            "dampings": {block.name: value for block, value in self.dampings.items()},
            "generators": {str(d): g.get_state() for d, g in self.collector.generators.items()},
            "blocks": [block.name for block in self.blocks],
            "layers": {block.name: state.save() for block, state in self.states.items()},
            "kind": self.method.name,
            "method": self.method.save(),
            "later": {  # what the device knows and the host has not acted on
                "finite": [(later.step, later.value()) for later in self._pending],
                "failures": [(later.step, [b.name for b in own], later.value()) for own, later in self._failures],
            },
        }

    def check(self, saved: Any) -> None:
        """Raise ValueError when a state was not saved by this method with these arguments, or not for these layers."""
        if not isinstance(saved, dict) or not saved.keys() >= SAVED:
            raise ValueError("state_dict: it has no curvature; allowed: what state_dict() of the same class gave")
        if saved["kind"] != self.method.name:
            raise ValueError(f"state_dict: it was saved by {saved['kind']}; allowed: by {self.method.name}")
        if [block.name for block in self.blocks] != saved["blocks"]:
            raise ValueError("state_dict: its layers are not those of the model")
        for block in self.blocks:
            layer = saved["layers"].get(block.name)
            if layer and not block.initialised():
                raise ValueError(f"state_dict: layer {block.name!r} has no size yet; allowed: after a first forward")
            if layer and BlockState.shapes(block) != (layer["A"].shape, layer["G"].shape):
                raise ValueError(
                    f"state_dict: factors of layer {block.name!r} have another size; allowed: those of the same model "
                    "with the same max_factor_size"
                )
        self.method.check(saved["method"], saved["layers"])

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        """Continue from `state_dict`, to the very same numbers, with the generators of devices that are here."""
        self.check(saved)
        by_name = {block.name: block for block in self.blocks}
        self.step, self._factors_at, self._inverses_at = saved["steps"]
        device = self.blocks[0].parameters[0].device if self.blocks else torch.device("cpu")
        scalars = {name: value.to(device, copy=True) for name, value in saved["scalars"].items()}
        self.base_damping, self.mean_curvature = scalars.get("damping"), scalars.get("mean_curvature")
        self.trust = scalars.get("trust")
        self.dampings = {by_name[name]: value.to(device, copy=True) for name, value in saved["dampings"].items()}
        self.collector.load_generators(saved["generators"])
        self.states = {}
        for name, state in saved["layers"].items():
            self.states[by_name[name]] = BlockState.of(by_name[name])
            self.states[by_name[name]].load(state, by_name[name].parameters[0].device)
        self.method.load(saved["method"], by_name, device)
        later = saved["later"]
        self._pending = [Later(finite.cpu(), step, device) for step, finite in later["finite"]]
        self._failures = [
            ([by_name[name] for name in names], Later(failures.cpu(), step, device))
            for step, names, failures in later["failures"]
        ]

    def warn(self, key: str, message: str) -> None:
        """Warn once for each key."""
        if key not in self._warned:
            self._warned.add(key)
            warnings.warn(f"{self._owner}: {message}", stacklevel=_level_of_caller())


def all_finite(tensors: list[Tensor]) -> Tensor:
    """Whether every entry of some tensors is finite; 0-dimensional bool."""
    if not tensors:
        return torch.ones((), dtype=torch.bool)
    # A sum is finite only if every entry is; in float16 it may overflow nevertheless. On a CPU sums are several times
    # faster than norms, elsewhere one call for all tensors is.
    tensors = [x.float() if x.dtype == torch.float16 else x for x in tensors]
    joined = worth_joining(tensors[0].device)
    sums = list(torch._foreach_norm(tensors, 1)) if joined else [x.sum() for x in tensors]
    return torch.stack(sums).isfinite().all()


def _level_of_caller() -> int:
    """How far up the first frame lies that is neither this package's nor torch's: the user's line."""
    inside = tuple(os.path.dirname(str(module.__file__)) + os.sep for module in (torch, sys.modules[__package__]))
    frame, level = sys._getframe(1), 1
    while frame.f_back is not None and frame.f_code.co_filename.startswith((*inside, "<", contextlib.__file__)):
        frame, level = frame.f_back, level + 1
    return level


class _Paused:
    def __init__(self, capture: Capture):
        self._capture = capture

    def __enter__(self) -> None:
        self._active, self._capture.active = self._capture.active, False

    def __exit__(self, *error: object) -> None:
        self._capture.active = self._active


def no_phase(name: str) -> AbstractContextManager:
    return nullcontext()


def _call(method: weakref.WeakMethod, batch: Batch) -> bool:
    bound = method()
    return bound is not None and bound(batch)
