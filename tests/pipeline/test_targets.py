"""Claims about reaching a target: the first of two evaluations in a row at or below it, within the seconds."""

from typing import Any

import pytest

from pipeline.targets import crossing, target_keys


def history(*losses: float | None) -> list[dict[str, Any]]:
    """An evaluation every ten steps, a second each."""
    return [{"step": 10 * k, "training_seconds": float(k), "loss": loss} for k, loss in enumerate(losses)]


@pytest.mark.parametrize(
    ("losses", "found"),
    [
        ((3, 1, 0.5, 0.4), (10, 1.0)),  # at or below counts, and the time is that of the first of the two
        ((3, 1, 2, 0.9, 0.8), (30, 3.0)),  # a single evaluation below it may be luck
        ((3, 1, 0.9, 4, 5), (10, 1.0)),  # later ones do not take it back
        ((3, 2, 1), None),  # the last has none to confirm it
        ((1, 1), (0, 0.0)),
        ((3, None, 1, 1), (20, 2.0)),
        ((3, float("nan"), 2), None),
        ((), None),
    ],
)
def test_a_target_is_reached_at_the_first_evaluation_that_the_next_one_confirms(losses: Any, found: Any) -> None:
    assert crossing(history(*losses), "loss", 1.0) == found


@pytest.mark.parametrize(("seconds", "found"), [(None, (20, 2.0)), (2.0, (20, 2.0)), (1.9, None)])
def test_an_evaluation_after_the_seconds_of_the_budget_confirms_but_does_not_reach(seconds: Any, found: Any) -> None:
    assert crossing(history(3, 2, 1, 1), "loss", 1.0, seconds) == found


def test_the_summary_has_four_keys_a_target() -> None:
    keys = target_keys(history(3, 1, 1), "loss", {"easy": 1.0, "hard": 0.5}, None)
    assert keys == {
        **{"easy_target": 1.0, "easy_reached": True, "easy_step": 10, "easy_seconds": 1.0},
        **{"hard_target": 0.5, "hard_reached": False, "hard_step": None, "hard_seconds": None},
    }
