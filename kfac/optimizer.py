"""The shared step of all Kronecker-factored optimizers: gradient -> natural gradient -> trust region -> update.

A method is a composition: a preconditioner (what a subclass does with the factors, `_refresh` and `_solve`) and a
step rule (rules.py). Everything else is here: statistics come from collect.py inside the user's backward, the step
averages them (factors.py), renews the preconditioner when it is due, and applies the rule; other parameters go to
AdamW (fallback.py).
"""

from __future__ import annotations

import inspect
import math
import warnings
import weakref
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from . import factors
from .capture import Batch, Capture
from .collect import Collector, Rows
from .fallback import FALLBACK_LR, Fallback
from .layers import LinearBlock, find_blocks
from .options import Options, check_options, value_at
from .rules import FixedRule, Plan, Problem, SelfTuningRule
from .skipping import Skipped, seen_broken
from .state import BlockState, LayerCurvature

EARLY_STEPS = 5  # the self-tuning rule renews everything at each of its first steps


class KroneckerOptimizer(torch.optim.Optimizer):
    """Base of `KFAC`, `EKFAC` and `GKFAC`; use those.

    Args:
        model: the network to train; its Linear and Conv2d layers get Kronecker blocks, other parameters AdamW.
        loss: the criterion that the training loop calls and minimises (see kfac.losses).
        lr: None for the self-tuning step; a number for the papers' fixed rule.
        momentum: coefficient of the fixed rule; it averages gradients before they are preconditioned. When self-tuning
            the quadratic model chooses the coefficient in [0, 0.95], and 0 here switches it off.
        damping: absolute lambda, or a callable of the step; None for `relative_damping`.
        relative_damping: lambda in units of the mean curvature per parameter, sum_l tr A_l tr G_l / sum_l numel_l.
            It has no unit, so 0.5 serves all losses, reductions and widths (found on a deep autoencoder, holds on
            classifiers).
        weight_decay: coefficient; decoupled (Loshchilov & Hutter 2019) or, with `decoupled_weight_decay=False`, part of
            the objective: it then enters gradient and damping.
        kl_clip: bound on lr^2 <direction, gradient> of the step really taken (fixed rule); None for no bound.
        max_decrease: largest share of the present loss that a self-tuned step may promise to gain, reached over
            `warmup` steps; 0.3 keeps classifiers from exploding and costs the autoencoder no steps.
        max_growth: largest ratio of the step size to its own running mean; against single batches that show no
            curvature.
        fisher: "exact", "sampled", "empirical", or "auto": exact up to 16 output numbers of an example, sampled beyond.
        fisher_samples: vectors drawn for an example when sampling.
        stat_decay: running average of the factors; None is 0.8 when self-tuning and 0.95 with `lr`.
        factor_interval: steps between updates of the factors (or a callable of the step); None is 5, and 10 with `lr`.
        inverse_interval: steps between inverses; None is 10, and 100 with `lr`.
        preconditioning_dtype: dtype of the two products that precondition, torch.bfloat16 or its name; None keeps the
            parameters' own.
        generator: source of the sampled vectors; None is an own one for each device, seeded 0.

    Attributes:
        stats: what the last step measured, 0-dimensional tensors on the device.
        phase: a callable `phase(name)` that gives a context manager; set it to time "statistics", "inverses" and
            "update".

    Raises:
        ValueError: for an argument that is out of range, naming it.
    """

    keeps_rows = False  # whether rows of the last statistics step are needed after it

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Show every argument in `help` and `inspect.signature`, where a method passes the shared ones on."""
        super().__init_subclass__(**kwargs)
        bases = cls.__mro__[: cls.__mro__.index(KroneckerOptimizer) + 1]
        named: dict[str, inspect.Parameter] = {}
        for init in (vars(base)["__init__"] for base in bases if "__init__" in vars(base)):
            for name, parameter in inspect.signature(init).parameters.items():
                if name != "self" and parameter.kind is not parameter.VAR_KEYWORD:
                    named.setdefault(name, parameter)
        cls.__signature__ = inspect.Signature(list(named.values()))  # type: ignore[attr-defined]

    def __init__(
        self,
        model: nn.Module,
        *,
        loss: nn.Module,
        lr: float | None = None,
        momentum: float = 0.9,
        damping: float | Callable[[int], float] | None = None,
        relative_damping: float = 0.5,
        weight_decay: float = 0.0,
        decoupled_weight_decay: bool = True,
        kl_clip: float | None = 1e-3,
        max_decrease: float = 0.3,
        warmup: int = 20,
        max_growth: float = 2.0,
        fisher: str = "auto",
        fisher_samples: int = 1,
        stat_decay: float | None = None,
        factor_interval: int | Callable[[int], int] | None = None,
        inverse_interval: int | Callable[[int], int] | None = None,
        preconditioning_dtype: torch.dtype | str | None = None,
        generator: torch.Generator | None = None,
    ):
        options = dict(locals())
        check_options({name: options[name] for name in ("model", *Options.__annotations__)})
        tuned = self.self_tuning = lr is None
        self.criterion = loss
        self.damping, self.relative_damping = damping, relative_damping
        self.decoupled_weight_decay = decoupled_weight_decay
        self.stat_decay = stat_decay if stat_decay is not None else 0.8 if tuned else 0.95
        self.factor_interval = factor_interval if factor_interval is not None else 5 if tuned else 10
        self.inverse_interval = inverse_interval if inverse_interval is not None else 10 if tuned else 100
        self.preconditioning_dtype = (
            getattr(torch, preconditioning_dtype) if isinstance(preconditioning_dtype, str) else preconditioning_dtype
        )
        self.stats: dict[str, Tensor] = {}
        self.phase: Callable[[str], AbstractContextManager] = _no_phase

        self._collector = Collector(loss, fisher, fisher_samples, generator, self.keeps_rows)
        floor = self._collector.curvature.floor
        if tuned and floor is None:
            raise ValueError(
                "loss: its floor is None, and the self-tuning step bounds its promise by the loss; "
                "allowed: a loss with a smallest value, or lr=<number>"
            )
        self._rule = SelfTuningRule(max_decrease, warmup, max_growth, floor) if tuned else FixedRule(kl_clip)
        self._fallback = Fallback(weight_decay)
        self.blocks = list(find_blocks(model))
        self._states = {block: BlockState.of(block) for block in self.blocks}
        own = [p for block in self.blocks for p in block.parameters]
        owned = {id(p) for p in own}
        rest = [p for p in model.parameters() if p.requires_grad and id(p) not in owned]
        if not own and not rest:
            raise ValueError("model: it has no parameter that requires a gradient")
        self._names = {id(p): name for name, p in model.named_parameters()}
        defaults = {
            "lr": 1.0 if lr is None else lr,
            "momentum": momentum,
            "weight_decay": weight_decay,
            "first_order": False,
        }
        groups: list[dict[str, Any]] = [{"params": own}] if own else []
        super().__init__(groups + ([self._fallback.group(rest)] if rest else []), defaults)

        self._steps, self._factors_at, self._inverses_at = 0, -1, -1
        self._damping: Tensor | None = None
        self._mean_curvature: Tensor | None = None
        self._warned: set[str] = set()
        self._skipped: Skipped | None = None
        weak = weakref.WeakMethod(self._receive)
        self._capture = Capture(model, loss, self.blocks, lambda batch: _call(weak, batch))
        self._arm()

    # A method is these two, `_directions` where layers are not solved one by one, and what it does with fresh rows.

    def _refresh(self, block: LinearBlock, state: BlockState, damping: Tensor) -> Tensor:
        """Renew `state.solver` from the averages; returns 1 where that failed, else 0 (0-dimensional)."""
        raise TypeError(f"{type(self).__name__} has no preconditioner; allowed: KFAC, EKFAC, GKFAC")

    def _solve(self, block: LinearBlock, state: BlockState, matrix: Tensor) -> Tensor:
        """The preconditioner of one layer times a matrix [K, d_out, d_in]."""
        raise TypeError(f"{type(self).__name__} has no preconditioner; allowed: KFAC, EKFAC, GKFAC")

    def _directions(self, blocks: list[LinearBlock], gradients: list[Tensor]) -> list[Tensor]:
        return [self._solve(b, self._states[b], g) for b, g in zip(blocks, gradients, strict=True)]

    def _after_statistics(self, rows: list[Rows], finite: Tensor) -> None:
        """Called with the weighted rows of a statistics step, once the preconditioner is renewed."""

    # Statistics.

    def _arm(self) -> None:
        """Decide what the coming step has to collect."""
        if self._skipped is not None and self._skipped.known():
            if self._skipped.value():  # what was due then is due again
                self._factors_at = self._inverses_at = -1
            self._skipped = None
        early = self.self_tuning and self._steps < EARLY_STEPS
        self._factors_due = early or self._due(self._factors_at, self.factor_interval)
        self._inverses_due = early or self._due(self._inverses_at, self.inverse_interval)
        self._collector.factors_due, self._collector.model_due = self._factors_due, self.self_tuning
        self._collector.clear()
        self._capture.clear()
        self._capture.active = bool(self.blocks) and (self.self_tuning or self._factors_due)

    def _due(self, last: int, interval: int | Callable[[int], int]) -> bool:
        return last < 0 or self._steps - last >= value_at(interval, self._steps)

    def _receive(self, batch: Batch) -> bool:
        with self.phase("statistics"):
            return self._collector.receive(batch)

    def _check_collected(self) -> None:
        if not self._capture.active:
            return
        collector = self._collector
        if not collector.weights:
            if any(block.weight.grad is not None for block in self.blocks):
                self._warn(
                    "nothing",
                    "statistics were due, but no forward and backward of the model came before this step",
                )
        elif not collector.losses and self.self_tuning:
            raise RuntimeError(
                "loss: the object given was not the one called before this step, and without lr= the step needs its "
                "value; allowed: calling that object in the loop, or lr=<number>"
            )
        elif not collector.losses:
            self._warn("root", "the object given as loss= was not the one called; the model's output serves instead")

    def _update_averages(self, finite: Tensor) -> None:
        for block, (outer_a, count, outer_g) in self._collector.sums.items():
            state = self._states[block]
            new_a, new_g = outer_a / count.clamp_min(1), outer_g / self._collector.norm()
            state.count += finite
            factors.update_average(state.A, new_a, state.count, self.stat_decay, finite)
            factors.update_average(state.G, new_g, state.count, self.stat_decay, finite)
            state.seen = True

    def _renew(self) -> None:
        """The damping and the preconditioners of all layers, from the present averages."""
        seen = [(block, state) for block, state in self._states.items() if state.seen]
        traces = [_trace(state.A).mul(_trace(state.G)).sum() for _, state in seen]
        self._mean_curvature = torch.stack(traces).sum() / sum(math.prod(block.shape) for block, _ in seen)
        if self.damping is None:
            self._damping = self.relative_damping * self._mean_curvature
        else:
            self._damping = torch.full_like(self._mean_curvature, value_at(self.damping, self._steps))
        failed = []
        for block, state in seen:
            failed.append(self._refresh(block, state, self._damping + self._l2(self._group_of(block))))
            state.age = 0
        self.stats["failed_inverses"] = torch.stack(failed).sum()
        self._inverses_at = self._steps

    # The step.

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """One optimization step, from the `.grad` of the parameters and what the backward left.

        Args:
            closure: re-evaluates the model and returns the loss, as in torch.

        Raises:
            RuntimeError: when self-tuning and the criterion given as `loss=` was not the object called.
        """
        value = None
        if closure is not None:
            with torch.enable_grad():
                value = closure()
        self._check_collected()
        blocks = [block for block in self.blocks if block.weight.grad is not None]
        groups = [self._group_of(block) for block in blocks]
        gradients = [self._gradient(block, group) for block, group in zip(blocks, groups, strict=True)]
        others = self._first_order_groups()
        finite = self._all_finite(gradients, others)
        self.stats = {"skipped": 1.0 - finite.float()}
        if seen_broken(finite):
            self._arm()
            return value
        with self.phase("statistics"):
            self._update_averages(finite)
        if self._inverses_due and any(state.seen for state in self._states.values()):
            with self.phase("inverses"):
                self._renew()
        if self._collector.factor_rows:
            with self.phase("statistics"):
                self._after_statistics(self._collector.weighted(self._collector.factor_rows), finite)
        with self.phase("update"):
            self._update(blocks, groups, gradients, others, finite)
        if self._factors_due and self._collector.weights:
            self._factors_at = self._steps
        for state in self._states.values():
            state.age += 1
        self._steps += 1
        if finite.device.type != "cpu":
            self._skipped = Skipped(finite)
        self._arm()
        return value

    def _update(
        self,
        blocks: list[LinearBlock],
        groups: list[dict[str, Any]],
        gradients: list[Tensor],
        others: list[dict[str, Any]],
        finite: Tensor,
    ) -> None:
        collector = self._collector
        usable = [i for i, block in enumerate(blocks) if self._states[block].solver]
        if self.self_tuning and not collector.model_rows:
            usable = []  # no backward came: there is no model to choose a step from
        blocks, groups = [blocks[i] for i in usable], [groups[i] for i in usable]
        gradients = [gradients[i] for i in usable]
        first_order = self._fallback.step(others, self.state, finite)
        buffers = [self.state[b.weight].get("momentum_buffer") for b in blocks]
        buffers = [torch.zeros_like(g) if x is None else x for x, g in zip(buffers, gradients, strict=True)]
        problem = Problem(
            blocks,
            gradients,
            buffers,
            groups,
            lambda gs: self._directions(blocks, gs),
            finite,
            first_order,
            self._damping + self._l2(groups[0]) if blocks and self._damping is not None else finite.new_zeros(()),
            rows=collector.model_rows,
            norm=collector.norm() if collector.weights else None,
            loss=collector.loss() if collector.losses else None,
            step=self._steps,
        )
        if blocks or not self.self_tuning:
            self._apply(problem, self._rule(problem))
        if self._damping is not None and self._mean_curvature is not None:
            self.stats |= {"damping": self._damping, "mean_curvature": self._mean_curvature}

    def _apply(self, problem: Problem, plan: Plan) -> None:
        parameters: list[Tensor] = []
        changes: list[Tensor] = []
        layers = zip(problem.blocks, problem.groups, plan.steps, plan.buffers, plan.rates, strict=True)
        for block, group, step, buffer, rate in layers:
            weights: list[Tensor] = [*block.parameters]
            if group["weight_decay"] and self.decoupled_weight_decay:
                decay = torch.as_tensor(rate * group["weight_decay"], device=step.device, dtype=step.dtype)
                torch._foreach_mul_(weights, torch.where(plan.finite, 1 - decay, 1.0))
            if group["momentum"]:
                self.state[block.weight]["momentum_buffer"] = buffer
            parameters += weights
            changes += block.tensors(step)
        if parameters:
            torch._foreach_add_(parameters, changes)
        if plan.factor is not None:
            self._fallback.scale(plan.factor)
        self.stats |= plan.stats

    def _all_finite(self, gradients: list[Tensor], groups: list[dict[str, Any]]) -> Tensor:
        """Whether all that this step works on is finite: gradients, losses, new statistics."""
        rest = [p.grad for group in groups for p in group["params"] if p.grad is not None]
        # A row that is not finite shows on the diagonal of its own outer product.
        diagonals = [x.diagonal(dim1=-2, dim2=-1) for a, _, g in self._collector.sums.values() for x in (a, g)]
        checked = [*gradients, *rest, *self._collector.losses, *diagonals]
        if not checked:
            return torch.ones((), dtype=torch.bool)
        # A norm is finite only if every entry is, and one call takes them all.
        return torch.stack(torch._foreach_norm(checked, torch.inf)).isfinite().all()

    def _gradient(self, block: LinearBlock, group: dict[str, Any]) -> Tensor:
        assert block.weight.grad is not None
        bias = block.bias
        of_bias = None if bias is None else bias.grad if bias.grad is not None else torch.zeros_like(bias)
        gradient = block.matrix(block.weight.grad, of_bias)
        l2 = self._l2(group)
        return gradient + l2 * block.matrix(block.weight, bias) if l2 else gradient

    def _l2(self, group: dict[str, Any]) -> float:
        """The weight decay that is part of the objective, and so of gradient and damping."""
        return 0.0 if self.decoupled_weight_decay else group["weight_decay"]

    def _group_of(self, block: LinearBlock) -> dict[str, Any]:
        for group in self.param_groups:
            if any(p is block.weight for p in group["params"]):
                return group
        raise RuntimeError(f"param_groups: the weight of layer {block.name!r} is in none of them")

    def _first_order_groups(self) -> list[dict[str, Any]]:
        groups = [group for group in self.param_groups if group["first_order"]]
        seen = {block for block, state in self._states.items() if state.seen or block in self._collector.sums}
        blind = [b for b in self.blocks if b.weight.grad is not None and b not in seen]
        if blind:
            names = ", ".join(block.name for block in blind)
            self._warn(
                "blind",
                f"no statistics arrived for {names}: trained by AdamW (lr {FALLBACK_LR}) until they do",
            )
            scale = self._group_of(blind[0])["lr"] if self.self_tuning else 1.0
            groups.append(self._fallback.group([p for b in blind for p in b.parameters], FALLBACK_LR * scale))
        return groups

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters; those without a Kronecker block are trained by AdamW."""
        parameters = param_group["params"]
        parameters = [parameters] if isinstance(parameters, Tensor) else list(parameters)
        owned = {id(p) for block in self.blocks for p in block.parameters}
        if "first_order" not in param_group and any(id(p) not in owned for p in parameters):
            param_group = {**self._fallback.group(parameters), **param_group}
        super().add_param_group({**param_group, "params": parameters})

    # What users look at, save and load.

    def curvature(self) -> dict[str, LayerCurvature]:
        """The running factors of every layer that has statistics, by the layer's name in the model."""
        return {block.name: LayerCurvature.of(state) for block, state in self._states.items() if state.seen}

    def summary(self) -> str:
        """A table of the layers with their blocks, and of the parameters without one and what trains them."""
        lines = [f"{'layer':32} {'block':8} {'A':>12} {'G':>12} {'parameters':>11} {'factors MiB':>12}"]
        for block in self.blocks:
            k, d_out, d_in = block.shape
            times = f"{k}x" if k > 1 else ""
            count = sum(p.numel() for p in block.parameters)
            lines.append(
                f"{block.name or '(model)':32} {block.kind:8} {f'{times}{d_in}^2':>12} {f'{times}{d_out}^2':>12} "
                f"{count:11,} {self._states[block].bytes() / 2**20:12.2f}"
            )
        for group in self.param_groups:
            if group["first_order"]:
                lines += [
                    f"{self._names.get(id(p), '(added)'):32} {'AdamW':8} {'':12} {'':12} {p.numel():11,}"
                    for p in group["params"]
                ]
        return "\n".join(lines)

    def state_dict(self) -> dict[str, Any]:
        """As in torch, with the curvature beside it: plain tensors and numbers, keyed by layer names."""
        scalars = {"damping": self._damping, "mean_curvature": self._mean_curvature}
        if isinstance(self._rule, SelfTuningRule):
            scalars["alpha_mean"] = self._rule.alpha_mean
        curvature = {
            "steps": [self._steps, self._factors_at, self._inverses_at],
            "scalars": {name: value for name, value in scalars.items() if value is not None},
            "generators": {str(d): g.get_state() for d, g in self._collector.generators.items()},
            "layers": {block.name: state.save() for block, state in self._states.items()},
            "method": self._save_method(),
        }
        return {**super().state_dict(), "curvature": curvature}

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from `state_dict`, to the very same numbers.

        Raises:
            ValueError: when the saved layers are not those of this model.
        """
        curvature = state_dict["curvature"]
        if set(curvature["layers"]) != {block.name for block in self.blocks}:
            raise ValueError("state_dict: its layers are not those of the model")
        super().load_state_dict({k: v for k, v in state_dict.items() if k != "curvature"})
        self._steps, self._factors_at, self._inverses_at = curvature["steps"]
        device = self.param_groups[0]["params"][0].device
        scalars = {name: value.to(device, copy=True) for name, value in curvature["scalars"].items()}
        self._damping, self._mean_curvature = scalars.get("damping"), scalars.get("mean_curvature")
        if isinstance(self._rule, SelfTuningRule):
            self._rule.alpha_mean = scalars.get("alpha_mean")
        for key, generator in curvature["generators"].items():
            self._collector.generator(torch.device(key)).set_state(generator.cpu())
        for block, state in self._states.items():
            state.load(curvature["layers"][block.name], block.weight.device)
        self._load_method(curvature["method"])
        self._arm()

    def _save_method(self) -> dict[str, Any]:
        """What a method keeps beside the layers' states."""
        return {}

    def _load_method(self, saved: dict[str, Any]) -> None:
        pass

    def _warn(self, key: str, message: str) -> None:
        if key not in self._warned:
            self._warned.add(key)
            warnings.warn(f"{type(self).__name__}: {message}", stacklevel=4)


def _no_phase(name: str) -> AbstractContextManager:
    return nullcontext()


def _call(method: weakref.WeakMethod, batch: Batch) -> bool:
    bound = method()
    return bound is not None and bound(batch)


def _trace(matrix: Tensor) -> Tensor:
    return matrix.diagonal(dim1=-2, dim2=-1).sum(-1)
