"""The trials of a tuning: points of a search space, as many for every optimizer, the shipped setting first."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path
from typing import Any

import pytest

from pipeline.checks import ConfigError
from pipeline.composition import compose
from pipeline.config import load, resolve
from pipeline.search import Dimension, points, space
from pipeline.trials import Choice, all_trials
from pipeline.validation import available

ROOT = Path(__file__).parents[2]
LR = Dimension("lr", "log", (0.001, 1.0))
MOMENTUM = Dimension("momentum", "linear", (0.8, 1.0))
BETAS = Dimension("betas", "choice", choices=([0.9, 0.99], [0.9, 0.999], [0.95, 0.999]))
SHIPPED = {"lr": 0.5, "momentum": 0.9, "betas": [0.9, 0.999]}
OPEN = ("sgd", "adam", "muon", "soap", "kfac", "ekfac", "gkfac")


@pytest.mark.parametrize("grid", [False, True])
@pytest.mark.parametrize("count", [1, 2, 4, 8, 16])
@pytest.mark.parametrize("dimensions", [[LR], [LR, MOMENTUM], [LR, MOMENTUM, BETAS]])
def test_every_space_has_as_many_points_as_asked_and_the_shipped_setting_is_the_first(
    dimensions: list[Dimension], count: int, grid: bool
) -> None:
    found = points(dimensions, SHIPPED, count, "a test", grid=grid)
    assert len(found) == count
    assert found[0] == {dimension.field: SHIPPED[dimension.field] for dimension in dimensions}
    for setting in found[1:]:
        assert 0.001 <= setting["lr"] <= 1.0
        assert 0.8 <= setting.get("momentum", 0.9) <= 1.0
        assert setting.get("betas", [0.9, 0.999]) in BETAS.choices


def test_a_sobol_sequence_is_a_function_of_its_purpose_and_goes_on_where_fewer_trials_ended() -> None:
    dimensions = [LR, MOMENTUM]
    eight = points(dimensions, SHIPPED, 8, "one")
    assert points(dimensions, SHIPPED, 8, "one") == eight
    assert points(dimensions, SHIPPED, 8, "another")[1:] != eight[1:]
    assert points(dimensions, SHIPPED, 16, "one")[:8] == eight


def test_a_shipped_setting_that_is_a_point_of_the_sequence_is_trained_once() -> None:
    before = points([LR], {"lr": 0.05}, 8, "some")
    for chosen in before[1:]:
        again = points([LR], chosen, 8, "some")
        assert again[0] == chosen and len({point["lr"] for point in again}) == 8
        assert [point for point in before[1:] if point != chosen] == again[1:7]


@pytest.mark.parametrize("dimensions", [[LR], [LR, MOMENTUM], [LR, BETAS]])
def test_a_shipped_setting_that_is_a_node_of_the_grid_is_trained_once_and_costs_no_trial(
    dimensions: list[Dimension],
) -> None:
    for chosen in points(dimensions, SHIPPED, 8, "grid", grid=True)[1:]:
        again = points(dimensions, chosen, 8, "grid", grid=True)
        assert again[0] == chosen and len({json.dumps(point) for point in again}) == 8


@pytest.mark.parametrize("dimension", [LR, MOMENTUM])
def test_a_sobol_sequence_has_a_point_in_every_slice_of_a_range_on_its_own_scale(dimension: Dimension) -> None:
    values = [setting[dimension.field] for setting in points([dimension], SHIPPED, 9, "slices")[1:]]
    low, high = dimension.ends
    if dimension.kind == "log":
        shares = [math.log(value / low) / math.log(high / low) for value in values]
    else:
        shares = [(value - low) / (high - low) for value in values]
    assert sorted(int(share * 8) for share in shares) == list(range(8))


def test_choices_are_taken_equally_often() -> None:
    taken = [setting["betas"] for setting in points([LR, BETAS], SHIPPED, 17, "choices")[1:]]
    assert all(5 <= taken.count(choice) <= 6 for choice in BETAS.choices)


def test_a_grid_has_both_ends_and_even_levels_and_whole_grids_are_whole() -> None:
    rates = [setting["lr"] for setting in points([LR], SHIPPED, 5, "grid", grid=True)[1:]]
    assert rates == [0.001, 0.01, 0.1, 1.0]
    whole = points([LR, MOMENTUM], SHIPPED, 7, "grid", grid=True)[1:]
    expected = itertools.product([0.001, 0.0316, 1.0], [0.8, 1.0])
    assert [(setting["lr"], setting["momentum"]) for setting in whole] == list(expected)
    assert len(points([BETAS], SHIPPED, 3, "grid", grid=True)) == 3
    with pytest.raises(ConfigError, match=r"trials: 4 are more than the 3 points of the space"):
        points([BETAS], SHIPPED, 4, "grid", grid=True)


def test_what_is_marked_with_a_number_of_trials_joins_from_there() -> None:
    lines = {"lr": {"log": [0.001, 1.0]}, "momentum": {"linear": [0.8, 0.9], "from": 16}}
    assert [d.field for d in space("sgd", "toy_linear", 8, SHIPPED, lines)] == ["lr"]
    assert [d.field for d in space("sgd", "toy_linear", 16, SHIPPED, lines)] == ["lr", "momentum"]


def test_a_range_may_be_a_mapping_by_benchmark() -> None:
    lines = {"lr": {"log": {"default": [0.001, 1.0], "cifar*": [0.1, 10.0]}}}
    assert [space("sgd", name, 8, SHIPPED, lines)[0].ends for name in ("toy_mlp", "cifar10_cnn")] == [
        (0.001, 1),
        (0.1, 10),
    ]


def test_an_optimizer_without_a_space_is_searched_around_its_learning_rate() -> None:
    [dimension] = space("nadam", "toy_linear", 8, {"lr": 0.03}, None)
    assert (dimension.field, dimension.kind) == ("lr", "log")
    assert dimension.ends == pytest.approx((0.001, 0.9))
    with pytest.raises(ConfigError, match=r"search\.own: has no learning rate to search; write .*search/own\.yaml"):
        space("own", "toy_linear", 8, {"lr": None}, None)


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        ({"lrr": {"log": [1, 2]}}, "search.sgd.lrr: unknown field 'lrr'; nearest: lr"),
        ({"lr": {"logarithmic": [1, 2]}}, "search.sgd.lr: has logarithmic; expected one of log, linear, choice"),
        ({"lr": {"log": [0, 2]}}, "search.sgd.lr.log: 0 is not allowed; expected a number > 0"),
        ({"lr": {"log": [2, 1]}}, "search.sgd.lr.log: [2, 1] is not allowed; expected the lower end first"),
        (
            {"lr": {"linear": [1, 2, 3]}},
            "search.sgd.lr.linear: [1, 2, 3] is not allowed; expected a list of two numbers",
        ),
        ({"lr": {"choice": []}}, "search.sgd.lr.choice: [] is not allowed; expected a list of values"),
        ({"lr": {"log": [1, 2], "from": 0}}, "search.sgd.lr.from: 0 is not allowed; expected an integer >= 1"),
        (
            {"lr": {"log": [1, 2], "from": 9}},
            "search.sgd: nothing is open with 8 trials; expected a field without `from`",
        ),
    ],
)
def test_a_line_of_a_space_that_says_nothing_is_refused(lines: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError) as refused:
        space("sgd", "toy_linear", 8, SHIPPED, lines)
    assert words in str(refused.value)


@pytest.mark.parametrize("count", [8, 16])
def test_every_optimizer_has_the_same_number_of_trials_and_trains_its_shipped_setting_first(count: int) -> None:
    asked = all_trials(Choice(("toy_linear", "digits_cnn"), tuple(available("optimizer")), count, (1000,)), {})
    assert set(asked) == {(b, o) for b in ("toy_linear", "digits_cnn") for o in available("optimizer")}
    params = load(ROOT / "params.yaml")
    freedoms = {}
    for (benchmark, optimizer), of in asked.items():
        assert [trial.number for trial in of] == list(range(1, count + 1))
        assert len({trial.name for trial in of}) == count
        freedoms[optimizer] = len(of[0].values)
        if optimizer in params.optimizers:
            shipped, first = resolve(params, benchmark, optimizer).as_dict(), of[0].run.as_dict()
            assert {k: v for k, v in first.items() if k not in ("seeds", "diagnostics")} == {
                k: v for k, v in shipped.items() if k not in ("seeds", "diagnostics")
            }
    assert {name: n for name, n in freedoms.items() if name != "sgd"} == dict.fromkeys(
        set(freedoms) - {"sgd"}, 2 if count == 8 else 5
    )
    assert freedoms["sgd"] == (1 if count == 8 else 4)


def test_a_trials_overrides_compose_to_what_it_expects_to_train(tmp_path: Path) -> None:
    for pair, of in all_trials(Choice((), OPEN, 16, (1000, 1001), study="tiny"), {}).items():
        compose(tmp_path / "params.yaml", list(of[5].overrides))
        assert resolve(load(tmp_path / "params.yaml"), *pair) == of[5].run
