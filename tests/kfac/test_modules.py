"""Modules as they come: frozen, unused, lazy, parametrized, adapted, and those whose weights no hook can see."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import ground_truth as truth
import layer_truth as layers
import pytest
import torch
from cases import LOSSES, Case, Problem, mlp
from layer_cases import LayerCase, Mean, flat_head, numbers
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm, weight_norm

from kfac import EKFAC, GKFAC, KFAC

DAMPING = 0.03
OPTIMIZERS = pytest.mark.parametrize("optimizer", [KFAC, EKFAC, GKFAC])
TUNING = pytest.mark.parametrize("tuned", [False, True], ids=["fixed", "self-tuning"])
EXACT = pytest.mark.parametrize(
    ("optimizer", "options"), [(KFAC, {"solver": "eigh"}), (EKFAC, {})], ids=["kfac-eigh", "ekfac"]
)
FIXED: dict[str, Any] = {"lr": 0.1, "damping": 0.1, "kl_clip": None, "factor_interval": 1, "inverse_interval": 1}


# Frozen, unused, lazy, parametrized


@OPTIMIZERS
@TUNING
@pytest.mark.parametrize("which", ["0", "2", "4"])
def test_a_frozen_layer_stays_and_leaves_the_others_as_they_are(optimizer: Any, tuned: bool, which: str) -> None:
    problem = Case("net", lambda: mlp(4, 5, 5, 3), LOSSES["ce-mean"], (6, 4)).make()
    problem.model.get_submodule(which).requires_grad_(False)
    used = optimizer(problem.model, loss=problem.criterion, **({} if tuned else FIXED))
    for _ in range(3):
        moves = truth.step(used, problem)
        for name, move in moves.items():
            assert bool(move.any()) != name.startswith(which), name
    assert which not in used.curvature()


@EXACT
def test_frozen_neighbours_do_not_change_a_layer_s_step(optimizer: Any, options: Any) -> None:
    free = Case("net", lambda: mlp(4, 5, 5, 3), LOSSES["ce-mean"], (6, 4)).make()
    frozen = free.copy()
    for name in ("0", "4"):
        frozen.model.get_submodule(name).requires_grad_(False)
    moves = truth.first_step(optimizer, free, damping=DAMPING, **options)
    found = truth.first_step(optimizer, frozen, damping=DAMPING, **options)
    assert truth.relative_error(truth.block_move(found, "2"), truth.block_move(moves, "2")) < 1e-10


class WithUnused(nn.Module):
    """A layer that is never called, and one whose result goes nowhere."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 5), nn.Linear(5, 3)
        self.never, self.dead = nn.Linear(4, 5), nn.Linear(4, 5)

    def forward(self, value: Tensor) -> Tensor:
        self.dead(value)
        return self.last(torch.tanh(self.first(value)))


@OPTIMIZERS
@TUNING
def test_unused_layers_stay_and_change_nothing(optimizer: Any, tuned: bool) -> None:
    problem = LayerCase("unused", WithUnused, numbers(6, 4), LOSSES["ce-mean"]).make()
    clean = problem.copy()
    clean.model.never, clean.model.dead = nn.Identity(), nn.Identity()  # type: ignore[assignment]
    options = {"fisher": "exact", **({} if tuned else FIXED)}
    used, other = (optimizer(p.model, loss=p.criterion, **options) for p in (problem, clean))
    for _ in range(4):
        moves, expected = truth.step(used, problem), truth.step(other, clean)
        for name, move in moves.items():
            if name.startswith(("never", "dead")):
                assert not move.any(), name
            else:
                assert truth.relative_error(move, expected[name]) < 1e-9, name


@OPTIMIZERS
@TUNING
def test_a_layer_that_is_used_only_now_and_then_trains_when_it_is(optimizer: Any, tuned: bool) -> None:
    class Sometimes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.extra, self.last, self.use = nn.Linear(4, 5), nn.Linear(5, 5), nn.Linear(5, 3), False

        def forward(self, value: Tensor) -> Tensor:
            value = torch.tanh(self.first(value))
            return self.last(torch.tanh(self.extra(value)) if self.use else value)

    problem = LayerCase("sometimes", Sometimes, numbers(6, 4), LOSSES["ce-mean"]).make()
    used = optimizer(problem.model, loss=problem.criterion, **({} if tuned else FIXED))
    for count in range(9):
        problem.model.use = count % 3 == 1  # type: ignore[assignment]
        moves = truth.step(used, problem)
        assert all(move.isfinite().all() for move in moves.values())
        assert bool(moves["extra.weight"].any()) == (count % 3 == 1), count


@EXACT
@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_a_lazy_layer_steps_like_its_plain_twin(optimizer: Any, options: Any, kind: str) -> None:
    """The optimizer is made before the first forward, as torch allows."""
    if kind == "linear":
        lazy: nn.Module = nn.Sequential(nn.LazyLinear(5), nn.Tanh(), nn.LazyLinear(3)).double()
        inputs = torch.linspace(-1, 1, 24, dtype=torch.float64).reshape(6, 4).sin()
    else:
        lazy = nn.Sequential(nn.LazyConv2d(4, 2), nn.LazyBatchNorm2d(), nn.Tanh(), nn.Flatten(), nn.LazyLinear(3))
        lazy = lazy.double()
        inputs = (7 * torch.linspace(-1, 1, 90, dtype=torch.float64)).sin().reshape(5, 2, 3, 3)
    criterion = nn.CrossEntropyLoss()
    targets = torch.arange(len(inputs)) % 3
    problem = Problem(lazy, criterion, inputs, targets)
    used = truth.start(optimizer, problem, damping=DAMPING, **options)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        lazy(inputs)
    twin = Problem(copy.deepcopy(lazy), criterion, inputs, targets)
    expected = truth.first_step(optimizer, twin, damping=DAMPING, **options)
    for name, move in truth.step(used, problem).items():
        assert truth.relative_error(move, expected[name]) < 1e-9, name
    assert used.param_groups[0]["lr"] == 1.0
    assert "5" in str(used.summary()) or "4" in str(used.summary())


@OPTIMIZERS
@TUNING
@pytest.mark.parametrize("wrap", [weight_norm, spectral_norm, nn.utils.weight_norm], ids=["new", "spectral", "old"])
def test_a_parametrized_layer_trains_and_its_plain_neighbour_keeps_its_block(
    optimizer: Any, tuned: bool, wrap: Any
) -> None:
    problem = Case("net", lambda: mlp(4, 6, 3), LOSSES["ce-mean"], (12, 4)).make()
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(0)
        wrap(problem.model.get_submodule("0"))
        used = optimizer(problem.model, loss=problem.criterion, **({} if tuned else FIXED))
        held = {id(p) for group in used.param_groups for p in group["params"]}
        assert held == {id(p) for p in problem.model.parameters()}
        start = problem.loss().item()
        for _ in range(15):
            moves = truth.step(used, problem)
            assert all(move.any() and move.isfinite().all() for move in moves.values())
    assert "2" in used.curvature()
    assert problem.loss().item() < start


class Adapted(nn.Module):
    """A frozen layer with a trainable low-rank path beside it, as adapters are written."""

    def __init__(self, base: nn.Linear, rank: int = 2) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.down = nn.Linear(base.in_features, rank, bias=False)
        self.up = nn.Linear(rank, base.out_features, bias=False)

    def forward(self, value: Tensor) -> Tensor:
        return self.base(value) + self.up(self.down(value))


class AdaptedSubclass(nn.Linear):
    """The same by inheritance: its own forward, and layers inside."""

    def __init__(self, inputs: int, outputs: int, rank: int = 2) -> None:
        super().__init__(inputs, outputs)
        self.requires_grad_(False)
        self.down, self.up = nn.Linear(inputs, rank, bias=False), nn.Linear(rank, outputs, bias=False)

    def forward(self, value: Tensor) -> Tensor:
        return super().forward(value) + self.up(self.down(value))


@EXACT
@pytest.mark.parametrize(
    "build", [lambda: Adapted(nn.Linear(4, 5)), lambda: AdaptedSubclass(4, 5)], ids=["wrapped", "subclass"]
)
def test_adapters_get_blocks_and_the_base_stays(optimizer: Any, options: Any, build: Any) -> None:
    case = LayerCase(
        "adapted", lambda: nn.Sequential(build(), nn.Tanh(), nn.Linear(5, 3)), numbers(1, 4), LOSSES["ce-mean"]
    )
    problem = case.make()
    moves = truth.first_step(optimizer, problem.copy(), damping=DAMPING, **options)
    trained = layers.trained(problem.model)
    assert set(trained) == {"0.down", "0.up", "2"}
    for name, module in trained.items():
        assert truth.relative_error(layers.moved(problem, name, moves), layers.newton(problem, module, DAMPING)) < 1e-8
    assert not any(move.any() for name, move in moves.items() if name.startswith("0.base") or name == "0.weight")


# Weights that no hook can see


class Attentive(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
        self.head = nn.Linear(4, 3)

    def forward(self, value: Tensor) -> Tensor:
        return self.head(self.attention(value, value, value, need_weights=False)[0].mean(1))


class Recalling(nn.Module):
    def __init__(self, kind: type[nn.Module]) -> None:
        super().__init__()
        self.memory = kind(4, 5, batch_first=True)  # type: ignore[call-arg]
        self.head = nn.Linear(5, 3)

    def forward(self, value: Tensor) -> Tensor:
        return self.head(self.memory(value)[0][:, -1])


class Both(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
        self.memory = nn.LSTM(4, 5, batch_first=True)
        self.head = nn.Linear(5, 3)

    def forward(self, value: Tensor) -> Tensor:
        return self.head(self.memory(self.attention(value, value, value)[0])[0][:, -1])


BLIND: dict[str, tuple[Callable[[], nn.Module], set[str]]] = {
    "attention": (Attentive, {"attention"}),
    "lstm": (lambda: Recalling(nn.LSTM), {"memory"}),
    "gru": (lambda: Recalling(nn.GRU), {"memory"}),
    "both": (Both, {"attention", "memory"}),
}


@OPTIMIZERS
@TUNING
@pytest.mark.parametrize("name", list(BLIND))
def test_what_no_hook_can_see_goes_to_the_fallback_by_name_with_one_warning(
    optimizer: Any, tuned: bool, name: str
) -> None:
    build, modules = BLIND[name]
    problem = LayerCase(name, build, numbers(6, 3, 4), LOSSES["ce-mean"]).make()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        used = optimizer(problem.model, loss=problem.criterion, **({} if tuned else FIXED))
        start = problem.loss().item()
        for count in range(12):
            moves = truth.step(used, problem)
            assert all(move.any() and move.isfinite().all() for move in moves.values()), count
            if count == 0:
                for key, move in moves.items():
                    if key.split(".")[0] in modules and "k" not in key:  # AdamW's first step is its rate
                        assert move.abs().max() == pytest.approx(1e-3, rel=1e-2), key
    assert problem.loss().item() < start
    about = [str(w.message) for w in caught if optimizer.__name__ in str(w.message)]
    assert len(about) == 1, about
    assert all(module in about[0] for module in modules) and "\n" not in about[0], about
    assert set(used.curvature()) == {"head"}
    text = str(used.summary())
    assert all(module in text for module in modules) and "AdamW" in text


@OPTIMIZERS
def test_a_net_of_plain_layers_warns_of_nothing(optimizer: Any) -> None:
    problem = LayerCase("plain", lambda: flat_head(nn.Conv2d(2, 4, 3), numbers(5, 2, 4, 5)), numbers(5, 2, 4, 5)).make()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        used = optimizer(problem.model, loss=problem.criterion)
        for _ in range(6):
            truth.step(used, problem)


@OPTIMIZERS
def test_a_transformer_layer_of_torch_trains(optimizer: Any) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        encoder = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
        model = nn.Sequential(nn.Embedding(6, 8), encoder, Mean(), nn.Linear(8, 3)).double()
        inputs = torch.randint(6, (12, 4))
    problem = Problem(model, nn.CrossEntropyLoss(), inputs, inputs[:, 0] % 3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        used = optimizer(problem.model, loss=problem.criterion)
        start = problem.loss().item()
        for _ in range(25):
            truth.step(used, problem)
    assert problem.loss().item() < 0.5 * start
    assert {"0", "1.linear1", "1.linear2", "1.norm1", "1.norm2", "3"} <= set(used.curvature())
