"""The shared step of all Kronecker-factored optimizers: gradient -> natural gradient -> trust region -> update.

A method is a composition: a preconditioner (method.py, kept up to date by curvature.py) and a step rule (rules.py).
Parameters without a block go to AdamW (fallback.py).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from . import compiling, losses
from . import groups as param_groups
from .curvature import Curvature
from .fallback import FALLBACK_LR, Fallback
from .later import seen_broken
from .layers import Block
from .levenberg import LevenbergMarquardt
from .method import Method
from .options import Options, check_options, gradual
from .parts import Parts, trained, worth_joining
from .rules import FixedRule, Plan, Problem, SelfTuningRule
from .state import LayerCurvature

EARLY_STEPS = 5  # the self-tuning rule renews everything at each of its first steps


class KroneckerOptimizer(torch.optim.Optimizer):
    """Base of `KFAC`, `EKFAC` and `GKFAC`; use those.

    Args:
        model: the network to train; its layers get curvature blocks (`summary` lists them), other parameters AdamW.
            A `DistributedDataParallel` wrapper averages statistics over its ranks; a compiled model runs eagerly
            where statistics are due.
        loss: the criterion that the training loop calls and minimises (see kfac.losses).
        lr: None for the self-tuning step; a number for the papers' fixed rule.
        momentum: coefficient of the fixed rule; it averages gradients before they are preconditioned. When self-tuning
            the quadratic model chooses one coefficient in [0.3, 0.95] ([0, 0.95] for `GKFAC`) for all groups but
            those where 0 switches it off.
        damping: absolute lambda, or a callable of the step; None for `relative_damping`. A group may have its own.
        relative_damping: lambda in units of the mean curvature per parameter, sum_l tr A_l tr G_l / sum_l numel_l, a
            number or a callable of the step. It has no unit, so 0.5 serves all losses, reductions and widths (found on
            a deep autoencoder, holds on classifiers).
        weight_decay: coefficient; decoupled (Loshchilov & Hutter 2019) or, with `decoupled_weight_decay=False`, part of
            the objective: it then enters gradient and damping. Always decoupled where AdamW trains.
        kl_clip: bound on lr^2 <direction, gradient> of the step really taken (fixed rule); None for no bound.
        max_decrease: largest share of the present loss that a self-tuned step may promise to gain, reached over
            `warmup` steps; 0.3 keeps classifiers from exploding.
        max_growth: largest ratio of the step size to its own running mean; against single batches that show no
            curvature.
        fisher: "exact", "sampled" (vectors drawn at random, the same in expectation), "empirical", or "auto": exact up
            to 16 output numbers of an example, sampled beyond.
            Sampled factors of a large batch are of a part of it: so much that the running averages hold 2,500 examples
            (125 of a batch with `stat_decay=0.95`). Where rows of all exact vectors would fill 512 MiB, those that
            E-KFAC and two-level K-FAC keep are of one vector for each example, with the same curvature in expectation.
        fisher_samples: vectors drawn for an example when sampling.
        stat_decay: running average of the factors; None is 0.8 when self-tuning and 0.95 with `lr`.
        factor_interval: steps between updates of the factors, or a callable of the step; None is 5, and with `lr` 10,
            reached gradually (`kfac.options.gradual`): from some initialisations curvature grows a thousandfold within
            ten steps.
        inverse_interval: steps between inverses, likewise; None is 10, and with `lr` 100, reached gradually.
        preconditioning_dtype: dtype of the two products that precondition, torch.bfloat16 or its name; None keeps the
            parameters' own. With bfloat16 a CPU may also round to it what it multiplies for sampled statistics.
        generator: source of the sampled vectors; None is an own one for each device, seeded 0. Where the model is on
            another device than the generator, that device's own one begins with the generator's seed.
        groups: parameter groups as in torch, dicts with "params" and any of "lr", "momentum", "weight_decay",
            "damping"; "first_order": True gives a group to AdamW. Parameters in none are in a default group. A layer
            moves by its weight's group; of a bias in another one only the weight decay is that group's.
        sharing: how factors treat weights that are shared over positions (pixels, tokens): "expand" takes positions
            as examples, "reduce" sums them first (arXiv 2311.00636); or a dict from layer names (globs) to these.
        max_factor_size: a side of a layer larger than this keeps only the diagonal of its factor; 8192 keeps a factor
            below 256 MiB.
        adapt_damping: Levenberg-Marquardt: every 5 steps the closure is evaluated again after the step, damping falls
            where the quadratic model predicted well and rises where it did not, and a step that raised the loss is
            taken back (arXiv 1503.05671, section 6.5). Needs `step(closure)`.

    Attributes:
        stats: what the last step measured, 0-dimensional tensors on the device.
        phase: a callable `phase(name)` that gives a context manager; set it to time "statistics", "inverses" and
            "update".

    Raises:
        ValueError: for an argument that is out of range, naming it.
    """

    _method: Method

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
        relative_damping: float | Callable[[int], float] = 0.5,
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
        groups: Sequence[dict[str, Any]] | None = None,
        sharing: str | Mapping[str, str] = "expand",
        max_factor_size: int = 8192,
        adapt_damping: bool = False,
    ):
        options = dict(locals())
        check_options({name: options[name] for name in ("model", *Options.__annotations__)})
        tuned = self.self_tuning = lr is None
        self.decoupled_weight_decay = decoupled_weight_decay
        given = [dict(group) for group in groups or ()]
        self._curvature = Curvature(
            model,
            loss,
            self._method,
            damping=damping,
            relative_damping=relative_damping,
            fisher=fisher,
            fisher_samples=fisher_samples,
            stat_decay=stat_decay if stat_decay is not None else 0.8 if tuned else 0.95,
            factor_interval=factor_interval if factor_interval is not None else 5 if tuned else partial(gradual, 10),
            inverse_interval=inverse_interval
            if inverse_interval is not None
            else 10
            if tuned
            else partial(gradual, 100),
            generator=generator,
            sharing=sharing,
            max_factor_size=max_factor_size,
            first_order=param_groups.first_order_ids(given),
            instead=f"AdamW (lr {FALLBACK_LR}) trains them",
            early_steps=EARLY_STEPS if tuned else 0,
            owner=type(self).__name__,
        )
        if tuned and not losses.has_floor(self._curvature.collector.curvature):
            raise ValueError(
                "loss: its floor is None, and the self-tuning step bounds its promise by the loss; "
                "allowed: a loss with a smallest value, or lr=<number>"
            )
        self._rule = (
            SelfTuningRule(max_decrease, warmup, max_growth, self._method.least_momentum)
            if tuned
            else FixedRule(kl_clip)
        )
        self._levenberg = LevenbergMarquardt(model, self._curvature) if adapt_damping else None
        self._fallback = Fallback(weight_decay)
        split = param_groups.split(given, self.blocks, model, self._fallback)
        if not split:
            raise ValueError("model: it has no parameter that requires a gradient")
        named = compiling.unwrapped(model).named_parameters()
        self._names = {id(p): compiling.plain_name(name) for name, p in named}
        defaults = {
            "lr": 1.0 if lr is None else lr,
            "momentum": momentum,
            "weight_decay": weight_decay,
            "damping": None,
            "first_order": False,
        }
        super().__init__(split, defaults)
        self._arm()

    @property
    def blocks(self) -> list[Block]:
        """The layers that have a curvature block."""
        return self._curvature.blocks

    @property
    def stats(self) -> dict[str, Tensor]:
        """What the last step measured, 0-dimensional tensors on the device."""
        return self._curvature.stats

    @property
    def phase(self) -> Callable[[str], AbstractContextManager]:
        """A callable `phase(name)` that gives a context manager, for timing."""
        return self._curvature.phase

    @phase.setter
    def phase(self, phase: Callable[[str], AbstractContextManager]) -> None:
        self._curvature.phase = phase

    def _arm(self) -> None:
        checked = self._levenberg is not None and self._levenberg.due()
        self._curvature.arm(model_due=self.self_tuning or checked, exactly=checked)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """As in torch; statistics that came with the gradients go with them."""
        super().zero_grad(set_to_none)
        self._curvature.drop()

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """One optimization step, from the `.grad` of the parameters and what the backward left.

        Args:
            closure: re-evaluates the model and returns the loss, as in torch.

        Raises:
            RuntimeError: when self-tuning and the criterion given as `loss=` was not the object called.
            ValueError: with `adapt_damping=True` and no closure.
        """
        value = None
        if self._levenberg is not None:
            self._levenberg.start(closure)
        if closure is not None:
            with torch.enable_grad():
                value = closure()
        with self._curvature.unmixed():
            return self._step(closure, value)

    def _step(self, closure: Callable[[], Any] | None, value: Any) -> Any:
        curvature = self._curvature
        curvature.gather(needs_loss=self.self_tuning)
        group_of = {id(p): group for group in self.param_groups for p in group["params"]}
        blocks = [block for block in self.blocks if block.has_gradient()]
        groups = [self._group_of(block, group_of) for block in blocks]
        gradients = [self._gradients(block, group_of) for block in blocks]
        others = self._first_order_groups(group_of)
        rest = [p.grad for group in others for p in group["params"] if p.grad is not None]
        finite = curvature.finite([*(g for layer in gradients for g in layer if g is not None), *rest])
        if seen_broken(finite):
            broken = {name: torch.full_like(value, torch.nan) for name, value in curvature.stats.items()}
            curvature.stats = broken | {"skipped": 1.0 - finite.float()}
            self._arm()
            return value
        owners = {b: group_of[id(b.parameters[0])] for b in self.blocks if id(b.parameters[0]) in group_of}
        curvature.update(finite, {block: (group["damping"], self._l2(group)) for block, group in owners.items()})
        with curvature.phase("update"):
            if self._levenberg is None or not self._levenberg.due():
                self._update(blocks, groups, gradients, others, finite, group_of)
            else:
                self._levenberg.before(value, self.param_groups, self.state)
                steps = self._update(blocks, groups, gradients, others, finite, group_of)
                self._levenberg.judge(closure, value, steps, self.state)
        curvature.finish(finite)
        self._arm()
        return value

    def _update(
        self,
        blocks: list[Block],
        groups: list[dict[str, Any]],
        gradients: list[list[Tensor | None]],
        others: list[dict[str, Any]],
        finite: Tensor,
        group_of: dict[int, dict[str, Any]],
    ) -> dict[Block, Tensor]:
        """Move all parameters; returns the steps of the blocks."""
        curvature, collector = self._curvature, self._curvature.collector
        usable = [i for i, block in enumerate(blocks) if curvature.ready(block)]
        if self.self_tuning and not collector.model_rows:
            usable = []  # no backward came: there is no model to choose a step from
        blocks, groups = [blocks[i] for i in usable], [groups[i] for i in usable]
        gradients = [gradients[i] for i in usable]
        first_order = self._fallback.step(others, self.state, finite)
        parts = Parts(blocks, groups, joined=worth_joining(finite.device))

        def solve(vector: list[Tensor]) -> list[Tensor]:
            directions = curvature.directions(blocks, parts.split(vector))
            return parts.join([trained(block, own) for block, own in zip(blocks, directions, strict=True)])

        problem = Problem(
            parts,
            gradients,
            parts.join([self._buffer(block) for block in blocks]),
            solve,
            finite,
            first_order,
            [curvature.dampings[blocks[i]] for i in parts.first],
            form=lambda vectors: curvature.quadratic_form(
                dict(zip(blocks, zip(*map(parts.split, vectors), strict=True), strict=True))
            ),
            loss=collector.loss() if collector.losses else None,
            room=collector.room() if collector.losses else None,
            step=curvature.step,
        )
        if not blocks and self.self_tuning:
            self._fallback.settle(self.state, finite, None)
            return {}
        plan = self._rule(problem)
        steps = parts.split(plan.steps)
        self._apply(problem, plan, steps, group_of)
        return dict(zip(blocks, steps, strict=True))

    def _buffer(self, block: Block) -> Tensor:
        """The momentum of a block, zeros at first."""
        parameter = block.parameters[0]
        buffer = self.state[parameter].get("momentum_buffer")
        if buffer is None:
            return torch.zeros(block.shape, dtype=block.dtype, device=parameter.device)
        return trained(block, buffer)

    def _part_from(self, moved: list[Block]) -> None:
        """Copy the momentum of layers that took no part: a view of all layers' would keep those in memory."""
        for block in set(self.blocks).difference(moved):
            state = self.state.get(block.parameters[0], {})
            buffer = state.get("momentum_buffer")
            if buffer is not None and buffer.untyped_storage().nbytes() > buffer.nbytes:
                state["momentum_buffer"] = buffer.clone()

    def _apply(self, problem: Problem, plan: Plan, steps: list[Tensor], group_of: dict[int, dict[str, Any]]) -> None:
        parts = problem.parts
        if self.decoupled_weight_decay:
            self._decay(parts, plan, group_of)
        for block, buffer, part in zip(parts.blocks, parts.split(plan.buffers), parts.of, strict=True):
            for parameter in block.parameters:
                self._fallback.forget(parameter, self.state)
            if parts.groups[part]["momentum"]:
                self.state[block.parameters[0]]["momentum_buffer"] = buffer
            else:
                self.state.get(block.parameters[0], {}).pop("momentum_buffer", None)
        if parts.joined:
            self._part_from(parts.blocks)
        pairs = [
            (parameter, change)
            for block, step in zip(parts.blocks, steps, strict=True)
            for parameter, change in zip(block.parameters, block.tensors(step), strict=True)
            if parameter.grad is not None
        ]
        if pairs:
            torch._foreach_add_(*map(list, zip(*pairs, strict=True)))
        self._fallback.settle(self.state, plan.finite, plan.factor)
        self._curvature.stats |= plan.stats | {"skipped": 1.0 - plan.finite.float()}

    def _decay(self, parts: Parts, plan: Plan, group_of: dict[int, dict[str, Any]]) -> None:
        """Decoupled weight decay, at the rate of each part."""
        decayed: list[dict[float, list[Tensor]]] = [{} for _ in plan.rates]
        for block, part in zip(parts.blocks, parts.of, strict=True):
            for parameter in block.parameters:
                if parameter.grad is not None and (decay := group_of[id(parameter)]["weight_decay"]):
                    decayed[part].setdefault(decay, []).append(parameter)
        for step, rate, by_decay in zip(plan.steps, plan.rates, decayed, strict=True):
            for decay, parameters in by_decay.items():
                keep = step.new_ones(()) - rate * decay  # a number made on the device: no copy to wait for
                torch._foreach_mul_(parameters, torch.where(plan.finite, keep, 1.0))

    def _gradients(self, block: Block, group_of: dict[int, dict[str, Any]]) -> list[Tensor | None]:
        """Of the block's parameters, with the weight decay that is part of the objective."""
        gradients: list[Tensor | None] = []
        for parameter in block.parameters:
            gradient = parameter.grad
            if gradient is not None and (l2 := self._l2(group_of[id(parameter)])):
                gradient = gradient + l2 * parameter
            gradients.append(gradient)
        return gradients

    def _l2(self, group: dict[str, Any]) -> float:
        """The weight decay that is part of the objective, and so of gradient and damping."""
        return 0.0 if self.decoupled_weight_decay else group["weight_decay"]

    def _group_of(self, block: Block, group_of: dict[int, dict[str, Any]]) -> dict[str, Any]:
        for parameter in block.parameters:
            if id(parameter) not in group_of:
                raise RuntimeError(f"param_groups: {self._names[id(parameter)]!r} of a layer is in none of them")
        return group_of[id(block.parameters[0])]

    def _first_order_groups(self, group_of: dict[int, dict[str, Any]]) -> list[dict[str, Any]]:
        groups = [group for group in self.param_groups if group["first_order"]]
        blind = [b for b in self.blocks if b.has_gradient() and not self._curvature.knows(b)]
        if blind:
            names = ", ".join(block.name for block in blind)
            self._curvature.warn("blind", f"no statistics arrived for {names}: trained by AdamW until they do")
        settings: dict[tuple[float, float], list[Tensor]] = {}
        for block in blind:
            lr = self._group_of(block, group_of)["lr"]
            rate = FALLBACK_LR * (lr / (self.defaults["lr"] or lr or 1.0))  # goes with the schedule, 0 is 0
            for parameter in block.parameters:
                settings.setdefault((rate, group_of[id(parameter)]["weight_decay"]), []).append(parameter)
        for (rate, decay), parameters in settings.items():
            groups.append({**self._fallback.group(parameters, rate), "weight_decay": decay})
        return groups

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters; those without a block are trained by AdamW.

        Raises:
            ValueError: for a key that a group cannot have, or `first_order=False` with a parameter that has no block.
        """
        owned = {id(p) for block in self.blocks for p in block.parameters}
        super().add_param_group(param_groups.added(dict(param_group), self._names, owned, self._fallback))

    # What users look at, save and load.

    def curvature(self) -> dict[str, LayerCurvature]:
        """The running factors of every layer that has statistics, by the layer's name in the model."""
        return self._curvature.layers()

    def summary(self) -> str:
        """A table of the layers with their blocks, and of the parameters without one and what trains them."""
        lines = self._curvature.summary()
        for group in self.param_groups:
            for p in group["params"] if group["first_order"] else []:
                size = "?" if nn.parameter.is_lazy(p) else f"{p.numel():,}"
                lines.append(f"{self._names.get(id(p), '(added)'):32} {'AdamW':16} {'':8} {'':12} {'':12} {size:>11}")
        return "\n".join(lines)

    def __reduce_ex__(self, protocol: Any) -> Any:
        name = type(self).__name__
        raise TypeError(
            f"{name}: its hooks belong to one model, so it has no copy or pickle; allowed: its state_dict()"
        )

    def state_dict(self) -> dict[str, Any]:
        """As in torch, with the curvature beside it: plain tensors and numbers, all of which the hooks see.

        Curvature is keyed by the layers' names. Momentum and AdamW's state are keyed by numbers, as in torch, and the
        groups' `param_names` say whose. A group's `damping` that is a callable is saved as None.
        """
        first = self.register_state_dict_post_hook(lambda _, state: self._complete(state), prepend=True)
        try:
            return super().state_dict()
        finally:
            first.remove()

    def _complete(self, state_dict: dict[str, Any]) -> None:
        """Put into a state what torch does not know of, and take out what a file cannot hold."""
        for group in state_dict["param_groups"]:
            if callable(group["damping"]):
                group["damping"] = None
        state_dict |= {"curvature": self._curvature.state_dict(), "rule": self._rule.save()}

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from `state_dict`, to the very same numbers. Groups keep a `damping` that is a callable.

        Generators of sampled vectors belong to a device: after a move to another one vectors come from that one's own
        generator, as it is, and those of devices that are not here are left out.

        Raises:
            ValueError: when the saved layers are not those of this model, or were saved by another method, solver or
                step rule; nothing is changed then.
        """
        dampings = [group["damping"] for group in self.param_groups]
        given: dict[str, Any] = {}

        def begin(_: Any, state: dict[str, Any]) -> None:
            self._curvature.check(state.get("curvature"))
            rule = state.get("rule")
            if rule is None or not rule.keys() <= self._rule.save().keys():
                allowed = "one saved without lr" if self.self_tuning else "one saved with lr=<number>"
                raise ValueError(f"state_dict: it is of another step rule; allowed: {allowed}")
            given.update(state)

        def end(_: Any) -> None:
            for group, damping in zip(self.param_groups, dampings, strict=True):
                if group["damping"] is None and callable(damping):
                    group["damping"] = damping
            self._load_momentum(given)
            self._curvature.load_state_dict(given["curvature"])
            self._rule.load(given["rule"], self.param_groups[0]["params"][0].device)
            self._arm()

        # Around torch's own part, inside the hooks of others: those may bring the state and see what became of it.
        last = self.register_load_state_dict_pre_hook(begin)
        first = self.register_load_state_dict_post_hook(end, prepend=True)
        try:
            super().load_state_dict(state_dict)
        finally:
            last.remove()
            first.remove()

    def _load_momentum(self, saved: dict[str, Any]) -> None:
        """Load momentum in the dtype of the blocks: torch loads it in that of the parameters, even a half one."""
        numbers = [number for group in saved["param_groups"] for number in group["params"]]
        parameters = [parameter for group in self.param_groups for parameter in group["params"]]
        number_of = dict(zip(parameters, numbers, strict=True))
        for block in self.blocks:
            parameter = block.parameters[0]
            if "momentum_buffer" in self.state.get(parameter, {}):
                buffer = saved["state"][number_of[parameter]]["momentum_buffer"]
                self.state[parameter]["momentum_buffer"] = buffer.to(parameter.device, block.dtype, copy=True)
