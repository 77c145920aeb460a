"""State, bad batches and bad arguments: what is saved goes on bit for bit, what is broken is skipped or refused."""

from __future__ import annotations

import copy
import io
import math
from typing import Any

import ground_truth as truth
import pytest
import torch
from cases import BY_NAME, Problem
from test_manners import noisy_problem, weights
from torch import nn

from kfac import EKFAC, GKFAC, KFAC

OPTIMIZERS = pytest.mark.parametrize("optimizer", [KFAC, EKFAC, GKFAC])
SETTINGS: dict[str, dict[str, Any]] = {
    "self-tuning": {},
    "self-tuning-sampled": {"fisher": "sampled", "weight_decay": 0.01},
    "fixed": {"lr": 0.05, "damping": 0.1, "factor_interval": 1, "inverse_interval": 3},
    "fixed-relative-sampled": {"lr": 0.05, "fisher": "sampled", "factor_interval": 3, "inverse_interval": 4},
}
EVERY = pytest.mark.parametrize("setting", list(SETTINGS))


def through_a_file(state: Any) -> Any:
    stream = io.BytesIO()
    torch.save(state, stream)
    stream.seek(0)
    return torch.load(stream, weights_only=True)


@OPTIMIZERS
@EVERY
@pytest.mark.parametrize("steps", [1, 4, 7])
def test_saved_and_loaded_training_goes_on_bit_for_bit(optimizer: Any, setting: str, steps: int) -> None:
    def make() -> tuple[Problem, Any]:
        problem = noisy_problem()
        for module in problem.model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        return problem, optimizer(problem.model, loss=problem.criterion, **SETTINGS[setting])

    straight, used = make()
    for count in range(2 * steps):
        if count == steps:
            saved_model = through_a_file(straight.model.state_dict())
            saved = through_a_file(used.state_dict())
        truth.step(used, straight)
    resumed, other = make()
    resumed.model.load_state_dict(saved_model)
    other.load_state_dict(saved)
    for _ in range(steps):
        truth.step(other, resumed)
    assert torch.equal(weights(straight), weights(resumed))
    for name, layer in used.curvature().items():
        assert torch.equal(other.curvature()[name].A, layer.A) and torch.equal(other.curvature()[name].G, layer.G)
        assert other.curvature()[name].age == layer.age
    assert used.stats.keys() == other.stats.keys()
    assert all(torch.equal(value, other.stats[key]) for key, value in used.stats.items())


@OPTIMIZERS
@EVERY
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
def test_training_of_half_precision_parameters_goes_on_bit_for_bit(
    optimizer: Any, setting: str, dtype: torch.dtype
) -> None:
    """Their momentum is kept in single precision."""

    def make() -> tuple[Problem, Any]:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = nn.Sequential(nn.Embedding(7, 5), nn.Linear(5, 6), nn.LayerNorm(6), nn.Tanh(), nn.Linear(6, 3))
            problem = Problem(model.to(dtype), nn.CrossEntropyLoss(), torch.randint(7, (8,)), torch.randint(3, (8,)))
        return problem, optimizer(problem.model, loss=problem.criterion, **SETTINGS[setting])

    straight, used = make()
    for count in range(8):
        if count == 4:
            saved = through_a_file({"model": straight.model.state_dict(), "optimizer": used.state_dict()})
            middle = weights(straight)
        truth.step(used, straight)
    resumed, other = make()
    resumed.model.load_state_dict(saved["model"])
    other.load_state_dict(saved["optimizer"])
    for _ in range(4):
        truth.step(other, resumed)
    assert torch.equal(weights(straight), weights(resumed)) and not torch.equal(weights(straight), middle)
    for p, q in zip(straight.model.parameters(), resumed.model.parameters(), strict=True):
        one, two = (state.get("momentum_buffer") for state in (used.state[p], other.state[q]))
        assert (one is None) == (two is None)
        assert one is None or (one.dtype == two.dtype == torch.float32 and torch.equal(one, two))


@OPTIMIZERS
def test_a_saved_state_does_not_change_when_training_goes_on(optimizer: Any) -> None:
    problem = BY_NAME["mlp-ce-mean"].make()
    used = optimizer(problem.model, loss=problem.criterion)
    for _ in range(3):
        truth.step(used, problem)
    other = problem.copy()
    second = optimizer(other.model, loss=other.criterion)
    second.load_state_dict(used.state_dict())  # straight from memory, as torch allows
    third = problem.copy()
    for _ in range(3):
        truth.step(used, problem)
    reference = weights(problem)
    for _ in range(3):
        truth.step(second, other)
    assert torch.equal(weights(other), reference)
    assert not torch.equal(weights(third), reference)


@OPTIMIZERS
@pytest.mark.parametrize("setting", ["self-tuning-sampled", "fixed-relative-sampled"])
def test_a_generator_of_a_device_that_is_not_here_is_left_out(optimizer: Any, setting: str) -> None:
    """What was saved on a GPU goes on elsewhere, with the draws of that device's own generator."""
    straight = BY_NAME["mlp-ce-mean"].make()
    used = optimizer(straight.model, loss=straight.criterion, **SETTINGS[setting])
    for _ in range(3):
        truth.step(used, straight)
    resumed = straight.copy()
    other = optimizer(resumed.model, loss=resumed.criterion, **SETTINGS[setting])
    saved = through_a_file(used.state_dict())
    saved["curvature"]["generators"] = {f"cuda:{torch.cuda.device_count()}": torch.zeros(16, dtype=torch.uint8)}
    other.load_state_dict(saved)
    used._curvature.collector.generators[torch.device("cpu")].manual_seed(0)  # where a new one begins
    for _ in range(3):
        truth.step(used, straight)
        truth.step(other, resumed)
    assert torch.equal(weights(straight), weights(resumed))


def module_damping(step: int) -> float:
    return 0.1 + 0.01 * step


@OPTIMIZERS
@pytest.mark.parametrize("kind", ["lambda", "function of a module"])
def test_a_damping_function_of_a_group_is_not_saved_and_stays_as_it_is_given(optimizer: Any, kind: str) -> None:
    def make() -> tuple[Problem, Any]:
        problem = BY_NAME["mlp-ce-mean"].make()
        damping = module_damping if kind == "function of a module" else lambda step: module_damping(step)
        group = {"params": list(problem.model.get_submodule("2").parameters()), "damping": damping}
        return problem, optimizer(problem.model, loss=problem.criterion, groups=[group], **SETTINGS["fixed"])

    straight, used = make()
    for count in range(6):
        if count == 3:
            saved = through_a_file({"model": straight.model.state_dict(), "optimizer": used.state_dict()})
            assert [group["damping"] for group in saved["optimizer"]["param_groups"]] == [None, None]
        truth.step(used, straight)
    assert callable(used.param_groups[1]["damping"]), "saving took it away"
    resumed, other = make()
    own = other.param_groups[1]["damping"]
    resumed.model.load_state_dict(saved["model"])
    other.load_state_dict(saved["optimizer"])
    assert other.param_groups[0]["damping"] is None and other.param_groups[1]["damping"] is own
    for _ in range(3):
        truth.step(other, resumed)
    assert torch.equal(weights(straight), weights(resumed))


@OPTIMIZERS
def test_a_damping_of_a_group_that_is_a_number_is_loaded(optimizer: Any) -> None:
    problem, other = (BY_NAME["mlp-ce-mean"].make() for _ in range(2))
    group = {"params": list(problem.model.get_submodule("2").parameters()), "damping": 0.7}
    saved = optimizer(problem.model, loss=problem.criterion, groups=[group]).state_dict()
    group = {"params": list(other.model.get_submodule("2").parameters()), "damping": module_damping}
    loaded = optimizer(other.model, loss=other.criterion, groups=[group])
    loaded.load_state_dict(through_a_file(saved))
    assert [group["damping"] for group in loaded.param_groups] == [None, 0.7]


@OPTIMIZERS
def test_state_of_another_model_is_refused_in_one_line(optimizer: Any) -> None:
    problem, other = BY_NAME["mlp-ce-mean"].make(), BY_NAME["convnet-plain"].make()
    saved = optimizer(problem.model, loss=problem.criterion).state_dict()
    with pytest.raises(ValueError) as caught:
        optimizer(other.model, loss=other.criterion).load_state_dict(saved)
    assert "\n" not in str(caught.value)


def equal(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor):
        return isinstance(other, torch.Tensor) and one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(equal(value, other[key]) for key, value in one.items())
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(equal(x, y) for x, y in zip(one, other, strict=True))
    return one == other


def wider() -> Problem:
    problem = BY_NAME["mlp-ce-mean"].make()
    problem.model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).double()
    return problem


NET, WIDER = BY_NAME["mlp-ce-mean"].make, wider
FIXED, TUNED = SETTINGS["fixed"], SETTINGS["self-tuning"]
SPACE: dict[str, Any] = {"coarse_space": "constant"}
Made = tuple[Any, dict[str, Any], Any]  # an optimizer, its options, its problem
MISMATCHES: dict[str, tuple[Made, Made, list[str]]] = {
    # name: (what was saved, what is to load it, words of the line)
    "cholesky into eigh": ((KFAC, TUNED, NET), (KFAC, {"solver": "eigh"}, NET), ["values", "solver"]),
    "eigh into cholesky": ((KFAC, {"solver": "eigh"}, NET), (KFAC, TUNED, NET), ["inverse_a", "solver"]),
    "two-level cholesky into eigh": ((GKFAC, FIXED, NET), (GKFAC, {**FIXED, "solver": "eigh"}, NET), ["values"]),
    "krylov into spectral": ((GKFAC, FIXED, NET), (GKFAC, {**FIXED, "coarse_space": "spectral"}, NET), ["leading"]),
    "exact into kronecker": (
        (GKFAC, {**FIXED, **SPACE}, NET), (GKFAC, {**FIXED, **SPACE, "coarse_fisher": "kronecker"}, NET),
        ["coarse_fisher"],
    ),
    "K-FAC into E-KFAC": ((KFAC, TUNED, NET), (EKFAC, TUNED, NET), ["K-FAC", "E-KFAC"]),
    "fixed into self-tuning": ((KFAC, FIXED, NET), (KFAC, TUNED, NET), ["without lr"]),
    "fixed without a clip into self-tuning": ((KFAC, {**FIXED, "kl_clip": None}, NET), (KFAC, {}, NET), ["without lr"]),
    "self-tuning into fixed": ((EKFAC, TUNED, NET), (EKFAC, FIXED, NET), ["lr=<number>"]),
    "another width": ((KFAC, TUNED, WIDER), (KFAC, TUNED, NET), ["'0'", "size"]),
    "diagonals": ((EKFAC, {"max_factor_size": 4}, NET), (EKFAC, TUNED, NET), ["'0'", "max_factor_size"]),
}  # fmt: skip


def started(made: Made) -> tuple[Problem, Any]:
    optimizer, options, make = made
    problem = make()
    used = optimizer(problem.model, loss=problem.criterion, **options)
    for _ in range(3):
        truth.step(used, problem)
    return problem, used


@pytest.mark.parametrize("name", list(MISMATCHES))
def test_state_of_other_arguments_is_refused_in_one_line_before_anything_changes(name: str) -> None:
    saved, loading, words = MISMATCHES[name]
    state = through_a_file(started(saved)[1].state_dict())
    refused_and_unchanged(loading, state, words)


@OPTIMIZERS
@pytest.mark.parametrize("missing", ["rule", "curvature", "group", *("steps", "scalars", "generators", "layers")])
def test_a_state_that_lacks_a_part_is_refused_in_one_line_before_anything_changes(optimizer: Any, missing: str) -> None:
    state = through_a_file(started((optimizer, TUNED, NET))[1].state_dict())
    if missing == "group":
        state["param_groups"] = []
    else:
        del (state if missing in state else state["curvature"])[missing]
    refused_and_unchanged((optimizer, TUNED, NET), state, [])


@OPTIMIZERS
@pytest.mark.parametrize("options", [TUNED, {"lr": 0.1}], ids=["self-tuning", "fixed"])
def test_a_state_from_before_the_first_step_is_loaded(optimizer: Any, options: dict[str, Any]) -> None:
    problem, twin = NET(), NET()
    used, other = (optimizer(p.model, loss=p.criterion, **options) for p in (problem, twin))
    state = through_a_file(used.state_dict())
    state["rule"] = {}
    other.load_state_dict(state)
    for one, at in ((used, problem), (other, twin)):
        truth.step(one, at)
    assert torch.equal(weights(problem), weights(twin))


def refused_and_unchanged(loading: Made, state: Any, words: list[str]) -> None:
    (problem, used), (twin, other) = started(loading), started(loading)
    before = copy.deepcopy(used.state_dict())
    with pytest.raises(ValueError, match=r"state.dict") as caught:
        used.load_state_dict(state)
    message = str(caught.value)
    assert "\n" not in message and all(word in message for word in words), message
    assert equal(used.state_dict(), before)
    for _ in range(3):
        truth.step(used, problem)
        truth.step(other, twin)
    assert torch.equal(weights(problem), weights(twin)), "training went on otherwise than without the attempt"


# Bad batches


@OPTIMIZERS
@EVERY
@pytest.mark.parametrize("where", ["inputs", "one input", "one target", "gradient"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("good_steps", [0, 3])
def test_a_batch_that_is_not_finite_is_a_skipped_step(
    optimizer: Any, setting: str, where: str, value: float, good_steps: int
) -> None:
    problem = BY_NAME["mlp-bce-mean"].make()
    used = optimizer(problem.model, loss=problem.criterion, **SETTINGS[setting])
    for _ in range(good_steps):
        truth.step(used, problem)
    twin = BY_NAME["mlp-bce-mean"].make()
    unbroken = optimizer(twin.model, loss=twin.criterion, **SETTINGS[setting])
    for _ in range(good_steps + 1):
        truth.step(unbroken, twin)
    before = weights(problem)
    factors = {name: (layer.A.clone(), layer.G.clone()) for name, layer in used.curvature().items()}
    good, keep, targets = problem.inputs.clone(), problem.inputs.clone(), problem.targets
    if where == "inputs":
        problem.inputs = torch.full_like(good, value)
    elif where == "one input":
        problem.inputs = keep
        problem.inputs[2, 1] = value
    elif where == "one target":  # the curvature of this loss does not see it
        problem.targets = targets.clone()
        problem.targets[2, 1] = value
    used.zero_grad()
    problem.loss().backward()
    if where == "gradient":
        parameter = problem.model.get_parameter("0.weight")
        assert parameter.grad is not None
        parameter.grad[0, 0] = value
    used.step()
    assert torch.equal(weights(problem), before)
    assert float(used.stats["skipped"]) == 1
    for name, (a, g) in factors.items():
        assert torch.equal(used.curvature()[name].A, a) and torch.equal(used.curvature()[name].G, g)
        assert not torch.equal(unbroken.curvature()[name].G, g), "no statistics were due: the test shows nothing"
    problem.inputs, problem.targets = good, targets
    start = problem.loss().item()
    for _ in range(12):
        truth.step(used, problem)
        assert weights(problem).isfinite().all() and float(used.stats["skipped"]) == 0
    assert problem.loss().item() < start


@OPTIMIZERS
def test_a_skipped_step_leaves_momentum_and_the_fallback_as_they_were(optimizer: Any) -> None:
    """Training with one broken batch in between goes on as training without it."""
    clean, broken = (noisy_problem() for _ in range(2))
    for problem in (clean, broken):
        for module in problem.model.modules():
            if isinstance(module, nn.Dropout | nn.BatchNorm2d):
                module.eval()
    options = {"lr": 0.05, "damping": 0.1, "factor_interval": 1, "inverse_interval": 1, "fisher": "exact"}
    first, second = (optimizer(p.model, loss=p.criterion, **options) for p in (clean, broken))
    for count in range(6):
        truth.step(first, clean)
        if count == 3:
            good = broken.inputs
            broken.inputs = good * math.nan
            truth.step(second, broken)
            broken.inputs = good
        truth.step(second, broken)
        assert truth.relative_error(weights(broken), weights(clean)) < 1e-6, count


@OPTIMIZERS
@pytest.mark.parametrize("setting", ["self-tuning", "fixed"])
@pytest.mark.parametrize(
    "kind", ["zero inputs", "constant inputs", "huge inputs", "tiny inputs", "batch of one", "sure"]
)
def test_degenerate_batches_do_not_break_training(optimizer: Any, setting: str, kind: str) -> None:
    problem = BY_NAME["mlp-ce-mean"].make()
    with torch.no_grad():
        match kind:
            case "zero inputs":
                problem.inputs.zero_()
            case "constant inputs":
                problem.inputs.fill_(1.0)
            case "huge inputs":
                problem.inputs.mul_(1e6)
            case "tiny inputs":
                problem.inputs.mul_(1e-8)
            case "batch of one":
                problem.inputs, problem.targets = problem.inputs[:1], problem.targets[:1]
            case "sure":
                problem.targets = problem.model(problem.inputs).argmax(1)
                problem.model.get_parameter("2.weight").mul_(500)
                problem.model.get_parameter("2.bias").mul_(500)
    start = problem.loss().item()
    used = optimizer(problem.model, loss=problem.criterion, **SETTINGS[setting])
    for _ in range(15):
        truth.step(used, problem)
        assert weights(problem).isfinite().all()
    assert problem.loss().item() <= 2 * start + 0.1


# Bad arguments


BAD: list[tuple[Any, str, Any]] = [
    *[(KFAC, "lr", value) for value in (-0.1, math.nan, "0.1", math.inf)],
    *[(KFAC, "momentum", value) for value in (-0.1, 1.0, "fast")],
    *[(KFAC, "damping", value) for value in (-1.0, 0.0, math.nan, "big")],
    *[(KFAC, "relative_damping", value) for value in (-1.0, 0.0, None)],
    *[(KFAC, "weight_decay", value) for value in (-1.0, math.nan)],
    (KFAC, "decoupled_weight_decay", "yes"),
    *[(KFAC, "kl_clip", value) for value in (-1e-3, 0.0, "none")],
    *[(KFAC, "max_decrease", value) for value in (0.0, -0.3, 1.5)],
    *[(KFAC, "warmup", value) for value in (-1, 2.5)],
    *[(KFAC, "max_growth", value) for value in (0.5, -1.0)],
    *[(KFAC, "fisher", value) for value in ("true", "Exact", 3, None)],
    *[(KFAC, "fisher_samples", value) for value in (0, -1, 1.5)],
    *[(KFAC, "stat_decay", value) for value in (-0.1, 1.5)],
    *[(KFAC, "factor_interval", value) for value in (0, -1, 2.5)],
    *[(KFAC, "inverse_interval", value) for value in (0, -1, 2.5, "often")],
    *[(KFAC, "solver", value) for value in ("symeig", "Cholesky", None)],
    (KFAC, "preconditioning_dtype", "bfloat17"),
    (KFAC, "generator", 3),
    *[(EKFAC, "scale_interval", value) for value in (0, -2, 1.5)],
    *[(GKFAC, "coarse_space", value) for value in ("krylow", 2)],
    *[(GKFAC, "combination", value) for value in ("multiplied", None)],
    *[(GKFAC, "coarse_fisher", value) for value in ("kroneker", None)],
]


@pytest.mark.parametrize(("optimizer", "argument", "value"), BAD, ids=lambda v: getattr(v, "__name__", repr(v)))
def test_a_bad_argument_is_refused_in_one_line_with_its_name_its_value_and_what_is_allowed(
    optimizer: Any, argument: str, value: Any
) -> None:
    problem = BY_NAME["mlp-ce-mean"].make()
    with pytest.raises(ValueError) as caught:
        optimizer(problem.model, loss=problem.criterion, **{argument: value})
    message = str(caught.value)
    assert "\n" not in message
    assert argument in message and repr(value) in message
    assert len(message) > len(argument) + len(repr(value)) + 10  # something about what is allowed
    assert not problem.model._forward_hooks, "a refused optimizer left its hooks"


@OPTIMIZERS
@pytest.mark.parametrize(
    "loss",
    [nn.L1Loss(), nn.CrossEntropyLoss(reduction="none"), torch.nn.functional.cross_entropy, "ce", None],
    ids=["l1", "reduction-none", "functional", "name", "none"],
)
def test_a_loss_without_known_curvature_is_refused_in_one_line(optimizer: Any, loss: Any) -> None:
    with pytest.raises((ValueError, TypeError)) as caught:
        optimizer(BY_NAME["mlp-ce-mean"].make().model, loss=loss)
    assert "loss" in str(caught.value) and "\n" not in str(caught.value)


@OPTIMIZERS
@pytest.mark.parametrize("model", [nn.Tanh(), [], None], ids=repr)
def test_what_is_no_model_or_has_nothing_to_train_is_refused_in_one_line(optimizer: Any, model: Any) -> None:
    with pytest.raises((ValueError, TypeError)) as caught:
        optimizer(model, loss=nn.MSELoss())
    assert "model" in str(caught.value) and "\n" not in str(caught.value)


def test_parameters_in_place_of_the_model_are_refused_in_one_line() -> None:
    problem = BY_NAME["mlp-ce-mean"].make()
    with pytest.raises((ValueError, TypeError)) as caught:
        KFAC(problem.model.parameters(), loss=problem.criterion)  # type: ignore[arg-type]
    assert "model" in str(caught.value) and "\n" not in str(caught.value)


def test_an_unknown_argument_is_refused() -> None:
    problem = BY_NAME["mlp-ce-mean"].make()
    for optimizer in (KFAC, EKFAC, GKFAC):
        with pytest.raises(TypeError, match="TInv"):
            optimizer(problem.model, loss=problem.criterion, TInv=10)


@OPTIMIZERS
@pytest.mark.parametrize("setting", ["self-tuning", "fixed"])
@pytest.mark.parametrize("joined", [False, True], ids=["one-by-one", "joined"])
def test_a_step_that_the_host_does_not_see_to_be_broken_changes_nothing_either(
    optimizer: Any, setting: str, joined: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a GPU the host does not look, and every change is undone on the device."""
    monkeypatch.setattr("kfac.optimizer.seen_broken", lambda finite: False)
    if joined:
        monkeypatch.setattr("kfac.parts.ONE_BY_ONE", set())
    problem = noisy_problem()
    used = optimizer(problem.model, loss=problem.criterion, **SETTINGS[setting])
    for _ in range(6):
        truth.step(used, problem)
    before = weights(problem)
    factors = {name: (layer.A.clone(), layer.G.clone()) for name, layer in used.curvature().items()}
    buffers = [s["momentum_buffer"].clone() for s in used.state.values() if "momentum_buffer" in s]
    good = problem.inputs
    problem.inputs = good * math.nan
    truth.step(used, problem)
    problem.inputs = good
    assert torch.equal(weights(problem), before) and float(used.stats["skipped"]) == 1
    for name, (a, g) in factors.items():
        assert torch.equal(used.curvature()[name].A, a) and torch.equal(used.curvature()[name].G, g)
    after = [s["momentum_buffer"] for s in used.state.values() if "momentum_buffer" in s]
    assert buffers and all(torch.equal(x, y) for x, y in zip(buffers, after, strict=True))
    for _ in range(10):
        truth.step(used, problem)
        assert weights(problem).isfinite().all()
