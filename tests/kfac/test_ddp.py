"""Two processes under DistributedDataParallel: one curvature, one step, and gradients that are none of our business.

All cases run in one pair of processes, started once; each test reads what they left.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import ground_truth as truth
import pytest
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from kfac import EKFAC, GKFAC, KFAC
from kfac.distributed import sum_over_ranks
from kfac.likelihoods import SquaredError

OPTIMIZERS = {"KFAC": KFAC, "EKFAC": EKFAC, "GKFAC": GKFAC}
RULES: dict[str, dict[str, Any]] = {
    "fixed": {"lr": 0.05, "damping": 0.1, "factor_interval": 2, "inverse_interval": 2},
    "self-tuning": {},
}
WRAPPERS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "plain": DistributedDataParallel,
    "find-unused": lambda model: DistributedDataParallel(model, find_unused_parameters=True),
    "static-graph": lambda model: DistributedDataParallel(model, static_graph=True),
    "compiled-outside": lambda model: torch.compile(DistributedDataParallel(model), backend="aot_eager"),
    "compiled-inside": lambda model: DistributedDataParallel(torch.compile(model, backend="aot_eager")),
}
STEPS = 6
BOTH = list(itertools.product(OPTIMIZERS, RULES))
CASES = [(o, r, "plain", "wrapper") for o, r in BOTH] + [
    ("KFAC", rule, wrapper, given)
    for rule, wrapper, given in itertools.product(RULES, WRAPPERS, ("wrapper", "inner"))
    if (wrapper, given) != ("plain", "wrapper")
]


class Squares(nn.MSELoss):
    """Squared error whose "sampled" vectors are the exact ones, so that nothing depends on who draws what."""

    def __init__(self) -> None:
        super().__init__()
        kind = SquaredError(nn.MSELoss())
        self.floor, self.outputs, self.exact, self.empirical = kind.floor, kind.outputs, kind.exact, kind.empirical
        self.terms = kind.terms

    def sampled(self, output: Tensor, target: Tensor, samples: int, generator: torch.Generator) -> Iterator[Tensor]:
        return self.exact(output, target)

    def mask(self, output: Tensor, target: Tensor | None) -> None:
        return None


class Heads(nn.Module):
    """Returns more than the criterion sees, and numbers before it."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6), nn.Tanh())
        self.head = nn.Linear(6, 3)

    def forward(self, value: Tensor) -> Any:
        value = self.trunk(value)
        return {"count": 3, "hidden": value, "none": None, "out": self.head(value)}


def problem() -> tuple[nn.Module, nn.Module, Tensor, Tensor]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Heads().double(), Squares(), torch.randn(8, 4).double(), torch.randn(8, 3).double()


def loss_of(model: nn.Module, criterion: nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
    """The criterion sees a tensor that the wrapper did not return, only something computed from it."""
    return criterion(2 * model(inputs)["out"], targets)


def distributed_run(rank: int, case: tuple[str, str, str, str]) -> dict[str, Any]:
    """Train; gradients beside those of the same wrapper without an optimizer, and the parameters after all steps."""
    optimizer, rule, wrapper, given = case
    model, criterion, inputs, targets = problem()
    alone = WRAPPERS[wrapper](copy.deepcopy(model))
    if given == "inner":
        used = OPTIMIZERS[optimizer](model, loss=criterion, fisher="exact", **RULES[rule])
    ddp = WRAPPERS[wrapper](model)
    if given == "wrapper":
        used = OPTIMIZERS[optimizer](ddp, loss=criterion, fisher="exact", **RULES[rule])
    half = slice(4 * rank, 4 * rank + 4)
    gradients = []
    for _ in range(STEPS):
        with torch.no_grad():
            for target, parameter in zip(alone.parameters(), ddp.parameters(), strict=True):
                target.copy_(parameter)
        alone.zero_grad()
        used.zero_grad()
        loss_of(alone, nn.MSELoss(), inputs[half], targets[half]).backward()
        loss_of(ddp, criterion, inputs[half], targets[half]).backward()
        pairs = zip(ddp.parameters(), alone.parameters(), strict=True)
        gradients.append(all(torch.equal(p.grad, q.grad) for p, q in pairs))
        used.step()
    weights = truth.vector(p.detach() for p in model.parameters())
    return {"gradients": gradients, "weights": weights, "layers": list(used.curvature()), "stats": used.stats}


def uneven(rank: int | None) -> tuple[nn.Module, nn.Module, list[tuple[Tensor, Tensor]]]:
    """The problem with the halves of one rank, or both: what the first half asks for is bad for the second."""
    model, criterion, inputs, targets = problem()
    with torch.no_grad():
        targets[:4] *= 10
        targets[4:] = 2 * model(inputs[4:])["out"] + 1e-3
    halves = [(inputs[i : i + 4], targets[i : i + 4]) for i in (0, 4)]
    return model, criterion, halves if rank is None else [halves[rank]]


def checked_run(rank: int | None, case: tuple[str, str]) -> dict[str, Any]:
    """Train with `adapt_damping=True`, as a rank or alone on both halves; every step's `stats` and own losses."""
    optimizer, rule = case
    model, criterion, halves = uneven(rank)
    used_model = model if rank is None else DistributedDataParallel(model)
    used = OPTIMIZERS[optimizer](used_model, loss=criterion, fisher="exact", adapt_damping=True, **RULES[rule])

    def own_losses() -> Tensor:
        with torch.no_grad():
            return torch.stack([loss_of(model, criterion, *half) for half in halves])

    def closure() -> Tensor:
        used.zero_grad()
        losses = [loss_of(used_model, criterion, *half) / len(halves) for half in halves]
        for loss in losses:
            loss.backward()
        return torch.stack(losses).sum()

    stats, own = [], [own_losses()]
    for _ in range(STEPS):
        used.step(closure)
        stats.append(dict(used.stats))
        own.append(own_losses())
    weights = truth.vector(p.detach() for p in model.parameters())
    return {"weights": weights, "stats": stats, "own": own}


def sampled_run(rank: int, case: tuple[str, str], alone: bool = False) -> dict[str, Any]:
    """Train on sampled vectors of torch's own loss, as one of two ranks or alone on that rank's half."""
    optimizer, rule = case
    model, _, inputs, targets = problem()
    criterion = nn.MSELoss()
    used_model = model if alone else DistributedDataParallel(model)
    used = OPTIMIZERS[optimizer](used_model, loss=criterion, fisher="sampled", **RULES[rule])
    half = slice(4 * rank, 4 * rank + 4)
    factors = []
    for _ in range(STEPS):
        used.zero_grad()
        loss_of(used_model, criterion, inputs[half], targets[half]).backward()
        used.step()
        factors.append({name: [layer.A.clone(), layer.G.clone()] for name, layer in used.curvature().items()})
    weights = truth.vector(p.detach() for p in model.parameters())
    return {"weights": weights, "factors": factors, "stats": used.stats}


def work(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    results: dict[Any, Any] = {"/".join(case): distributed_run(rank, case) for case in CASES}
    results |= {"checked/" + "/".join(case): checked_run(rank, case) for case in BOTH}
    results |= {"sampled/" + "/".join(case): sampled_run(rank, case) for case in BOTH}
    tensors = [torch.full((2, 3), rank + 1.0), torch.tensor(rank), torch.tensor(2.0 * rank), torch.zeros(0)]
    results["sums"] = sum_over_ranks(tensors, torch.distributed.group.WORLD)
    torch.save(results, f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder: Path = tmp_path_factory.mktemp("ranks")
    torch.multiprocessing.spawn(work, (str(folder),), nprocs=2)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(2)]


def single_run(case: tuple[str, str, str, str]) -> Tensor:
    """The two halves as micro-batches of one process."""
    optimizer, rule, _, _ = case
    model, criterion, inputs, targets = problem()
    used = OPTIMIZERS[optimizer](model, loss=criterion, fisher="exact", **RULES[rule])
    for _ in range(STEPS):
        used.zero_grad()
        for half in (slice(0, 4), slice(4, 8)):
            (loss_of(model, criterion, inputs[half], targets[half]) / 2).backward()
        used.step()
    return truth.vector(p.detach() for p in model.parameters())


@pytest.mark.parametrize("case", CASES, ids="/".join)
def test_both_ranks_make_the_step_of_one_process_on_both_halves(ranks: Any, case: tuple[str, str, str, str]) -> None:
    first, second = (rank["/".join(case)] for rank in ranks)
    assert torch.equal(first["weights"], second["weights"])
    assert truth.relative_error(first["weights"], single_run(case)) < 1e-10
    assert first["layers"] == ["trunk.0", "trunk.1", "head"]
    assert all(torch.equal(value, second["stats"][name]) for name, value in first["stats"].items())


@pytest.mark.parametrize("case", CASES, ids="/".join)
def test_gradients_are_those_of_the_wrapper_alone(ranks: Any, case: tuple[str, str, str, str]) -> None:
    for rank in ranks:
        assert rank["/".join(case)]["gradients"] == [True] * STEPS


@pytest.mark.parametrize("case", BOTH, ids="/".join)
def test_ranks_judge_a_step_by_the_loss_of_all(ranks: Any, case: tuple[str, str]) -> None:
    """The second rank's own loss rises at a step that lowers the mean: neither takes it back."""
    first, second = (rank["checked/" + "/".join(case)] for rank in ranks)
    alone = checked_run(None, case)
    assert alone["own"][1][1] > alone["own"][0][1], "either half alone would keep the step: the test shows nothing"
    assert torch.equal(first["weights"], second["weights"])
    assert truth.relative_error(first["weights"], alone["weights"]) < 1e-8
    for one, other, single in zip(first["stats"], second["stats"], alone["stats"], strict=True):
        assert one.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in one.items())
        for name in {"reduction_ratio", "rejected", "damping"} & single.keys():
            assert float(one[name]) == pytest.approx(float(single[name]), rel=1e-6), name
    assert float(first["stats"][0]["rejected"]) == 0


@pytest.mark.parametrize("case", BOTH, ids="/".join)
def test_ranks_share_what_each_sampled(ranks: Any, case: tuple[str, str]) -> None:
    """The factors are the means of what the ranks draw for their own halves, and all ranks make one step of them."""
    first, second = (rank["sampled/" + "/".join(case)] for rank in ranks)
    assert torch.equal(first["weights"], second["weights"])
    assert all(torch.equal(value, second["stats"][name]) for name, value in first["stats"].items())
    for one, other in zip(first["factors"], second["factors"], strict=True):
        for name, pair in one.items():
            assert all(torch.equal(x, y) for x, y in zip(pair, other[name], strict=True)), name
    halves = [sampled_run(rank, case, alone=True)["factors"][0] for rank in range(2)]
    for name, pair in first["factors"][0].items():
        for x, *parts in zip(pair, *(half[name] for half in halves), strict=True):
            assert truth.relative_error(x, torch.stack(parts).mean(0)) < 1e-10, name


def test_sums_over_ranks(ranks: Any) -> None:
    for rank in ranks:
        shaped, whole, number, empty = rank["sums"]
        assert torch.equal(shaped, torch.full((2, 3), 3.0)) and empty.shape == (0,)
        assert int(whole) == 1 and whole.dtype == torch.int64 and float(number) == 2.0
    tensors = [torch.ones(2), torch.tensor(1)]
    assert all(a is b for a, b in zip(sum_over_ranks(tensors, None), tensors, strict=True))
