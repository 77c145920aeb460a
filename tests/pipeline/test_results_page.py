"""docs/results.md says what the files beside it say, and their figures follow from the runs."""

from __future__ import annotations

import csv
import json
import re
from pathlib import Path
from typing import Any

import pytest

DOCS = Path(__file__).parents[2] / "docs"
STUDIES = sorted(path.name for path in (DOCS / "results").iterdir())
STUDY = pytest.mark.parametrize("study", STUDIES)
CLOCKS = {"steps": "step", "seconds": "seconds"}


def verdicts(study: str) -> dict[str, Any]:
    return json.loads((DOCS / "results" / study / "verdicts.json").read_text(encoding="utf-8"))


def runs(study: str) -> list[dict[str, str]]:
    with (DOCS / "results" / study / "runs.csv").open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def section(study: str) -> str:
    """The part of the page between the study's marks."""
    page = (DOCS / "results.md").read_text(encoding="utf-8")
    found = re.search(rf"<!-- {study} -->\n(.*?)(?=\n<!-- |\Z)", page, re.DOTALL)
    assert found, f"docs/results.md has no part for {study}"
    return found[1]


def times(own: list[dict[str, str]], target: str, clock: str) -> list[float]:
    return sorted(float(run[f"{target}_{CLOCKS[clock]}"]) for run in own if run[f"{target}_reached"] == "True")


@STUDY
def test_the_sentences_are_those_of_the_verdicts(study: str) -> None:
    listed = [line.removeprefix("- ") for line in section(study).splitlines() if line.startswith("- ")]
    assert listed[: len(verdicts(study)["sentences"])] == verdicts(study)["sentences"]


@STUDY
def test_outcomes_follow_from_the_runs(study: str) -> None:
    """How many seeds got there, the median of Kaplan and Meier, and the mean up to the horizon."""
    rows = runs(study)
    outcomes = verdicts(study)["outcomes"]
    assert outcomes
    for outcome in outcomes:
        pair = outcome["benchmark"], outcome["optimizer"]
        own = [run for run in rows if (run["benchmark"], run["optimizer"]) == pair]
        found = times(own, outcome["target"], outcome["clock"])
        assert (len(found), len(own)) == (outcome["reached"], outcome["seeds"]), pair
        place, odd = divmod(len(own), 2)
        if len(found) > place or (odd and len(found) == place + 1):
            median = found[place] if odd else (found[place - 1] + found[place]) / 2
            assert outcome["median"] == pytest.approx(median), pair
        else:
            assert outcome["median"] is None, pair
        horizon = outcome["horizon"]
        capped = [min(time, horizon) for time in found] + [horizon] * (len(own) - len(found))
        assert outcome["restricted_mean"] == pytest.approx(sum(capped) / len(capped)), pair


@STUDY
def test_every_run_of_the_study_is_there(study: str) -> None:
    rows = runs(study)
    seeds = {run["seed"] for run in rows}
    pairs = {(run["benchmark"], run["optimizer"]) for run in rows}
    assert len(rows) == len(seeds) * len(pairs) and not verdicts(study)["missing"]


def test_what_the_page_links_to_is_there() -> None:
    page = (DOCS / "results.md").read_text(encoding="utf-8")
    links = [link.split("#")[0] for link in re.findall(r"\]\(([^)]+)\)", page)]
    assert links and all((DOCS / link).exists() for link in links if link), links
