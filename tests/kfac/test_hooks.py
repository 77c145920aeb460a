"""The hooks that every optimizer of torch has: around a step, around saving and loading."""

from __future__ import annotations

import copy
from typing import Any

import ground_truth as truth
import pytest
import torch
from cases import BY_NAME, Problem
from torch import Tensor

from kfac import EKFAC, GKFAC, KFAC

OPTIMIZERS = pytest.mark.parametrize("optimizer", [KFAC, EKFAC, GKFAC])
RULES = pytest.mark.parametrize("options", [{}, {"lr": 0.05, "damping": 0.1}], ids=["self-tuning", "fixed"])


def trained(optimizer: Any, options: dict[str, Any], steps: int = 3) -> tuple[Problem, Any]:
    problem = BY_NAME["mlp-ce-mean"].make()
    used = optimizer(problem.model, loss=problem.criterion, **options)
    for _ in range(steps):
        truth.step(used, problem)
    return problem, used


def weights(problem: Problem) -> Tensor:
    return truth.vector(p.detach().clone() for p in problem.model.parameters())


@OPTIMIZERS
@RULES
def test_step_hooks_are_called_once_a_step_before_and_after_it_and_change_nothing(optimizer: Any, options: Any) -> None:
    (plain, bare), (problem, used) = trained(optimizer, options), trained(optimizer, options)
    calls: list[tuple[str, Any, Tensor]] = []
    handles = [
        used.register_step_pre_hook(lambda owner, args, kwargs: calls.append(("pre", owner, weights(problem)))),
        used.register_step_post_hook(lambda owner, args, kwargs: calls.append(("post", owner, weights(problem)))),
    ]
    before = weights(problem)
    truth.step(used, problem)
    assert [name for name, *_ in calls] == ["pre", "post"] and all(owner is used for _, owner, _ in calls)
    assert torch.equal(calls[0][2], before) and torch.equal(calls[1][2], weights(problem))
    for handle in handles:
        handle.remove()
    truth.step(used, problem)
    assert len(calls) == 2
    for _ in range(2):
        truth.step(bare, plain)
    assert torch.equal(weights(plain), weights(problem))


@OPTIMIZERS
@RULES
def test_a_step_hook_may_change_gradients_and_the_closure(optimizer: Any, options: Any) -> None:
    """A hook that clips is a loop that clips; one that gives a closure has it called."""
    (plain, bare), (problem, used) = trained(optimizer, options), trained(optimizer, options)

    def clip(model: Any) -> None:
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.01)

    handle = used.register_step_pre_hook(lambda owner, args, kwargs: clip(problem.model))
    truth.step(used, problem)
    handle.remove()
    bare.zero_grad()
    plain.loss().backward()
    clip(plain.model)
    bare.step()
    assert torch.equal(weights(plain), weights(problem))

    def closure() -> Tensor:
        used.zero_grad()
        loss = problem.loss()
        loss.backward()
        return loss

    used.register_step_pre_hook(lambda owner, args, kwargs: ((owner, closure), {}))
    assert float(used.step()) == pytest.approx(plain.loss().item(), rel=1e-12)
    truth.step(bare, plain)
    assert torch.equal(weights(plain), weights(problem))


@OPTIMIZERS
@RULES
def test_hooks_of_state_dict_see_all_of_it_and_may_replace_it(optimizer: Any, options: Any) -> None:
    _, used = trained(optimizer, options)
    plain = used.state_dict()
    assert {"state", "param_groups", "curvature", "rule"} <= plain.keys()
    seen: list[Any] = []

    def before(owner: Any) -> None:
        owner.param_groups[0]["lr"] = 0.125

    def after(owner: Any, state: dict[str, Any]) -> dict[str, Any]:
        seen.append((owner, set(state), state["param_groups"][0]["lr"]))
        return {"inside": state}

    used.register_state_dict_pre_hook(before)
    used.register_state_dict_post_hook(after)
    saved = used.state_dict()
    assert seen == [(used, set(plain), 0.125)]
    assert saved.keys() == {"inside"} and saved["inside"].keys() == plain.keys()


@OPTIMIZERS
@RULES
def test_hooks_of_load_state_dict_see_all_of_it_before_and_the_loaded_optimizer_after(
    optimizer: Any, options: Any
) -> None:
    straight, used = trained(optimizer, options)
    given = {"inside": used.state_dict()}
    kept = copy.deepcopy(given)
    resumed = straight.copy()
    other = optimizer(resumed.model, loss=resumed.criterion, **options)
    seen: list[Any] = []

    def before(owner: Any, state: dict[str, Any]) -> dict[str, Any]:
        seen.append(("pre", owner is other, set(state)))
        return state["inside"]

    def after(owner: Any) -> None:
        layers = owner.curvature()
        same = all(torch.equal(layers[name].A, layer.A) for name, layer in used.curvature().items())
        seen.append(("post", owner is other, same and len(layers) > 0))

    handles = [other.register_load_state_dict_pre_hook(before), other.register_load_state_dict_post_hook(after)]
    other.load_state_dict(given)
    assert seen == [("pre", True, {"inside"}), ("post", True, True)]
    assert given.keys() == kept.keys() and given["inside"].keys() == kept["inside"].keys()
    for handle in handles:
        handle.remove()
    for _ in range(3):
        truth.step(used, straight)
        truth.step(other, resumed)
    assert torch.equal(weights(straight), weights(resumed))
    other.load_state_dict(used.state_dict())
    assert len(seen) == 2


@OPTIMIZERS
def test_saving_and_loading_leave_no_hook_behind(optimizer: Any) -> None:
    _, used = trained(optimizer, {})
    used.load_state_dict(used.state_dict())
    with pytest.raises(ValueError, match="state_dict"):
        used.load_state_dict({})
    assert not any(len(value) for name, value in vars(used).items() if name.endswith("_hooks"))
