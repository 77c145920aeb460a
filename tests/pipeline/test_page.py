"""The page: what it says, that it loads nothing, and that what diverged or is missing is on it."""

from __future__ import annotations

import base64
import csv
import gzip
import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import synthetic_records as synthetic

from pipeline import aggregate
from pipeline.checks import ConfigError
from pipeline.config import Params
from pipeline.tables import TIMES

BENCHMARKS, OPTIMIZERS = ("toy_mlp", "digits_cnn"), ("sgd", "adam", "kfac")
LOST = ("toy_mlp", "kfac", 2)
VOID = {"meta", "link", "input", "img", "br", "wbr", "hr"}
LOADS = {"src", "srcset", "poster", "data", "action", "formaction"}  # attributes whose address is fetched
ADDRESS = "http://127.0.0.1:5000/#/experiments/1/runs/abc"
PIXEL = base64.b64decode(
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
)
SIMULATED = {"what": "interval of the ratio, t", "seeds": 5, "promised": "0.95", "measured": 0.9415}
TRIALS: dict[str, Any] = {
    "benchmark": "toy_mlp",
    "optimizer": "kfac",
    "trials": [
        {"values": {"lr": 0.1}, "seconds_to_target": 2.5, "best_loss": 0.1, "diverged": False, "edge": []},
        {"values": {"lr": 0.7}, "seconds_to_target": 1.25, "best_loss": 0.1, "diverged": False, "edge": ["lr"]},
        {"values": {"lr": 9.0}, "seconds_to_target": 0.5, "best_loss": None, "diverged": True, "edge": []},
        {"values": {"lr": 0.9}, "seconds_to_target": 1.0, "best_loss": 0.1, "diverged": False, "edge": []},
    ],
    "chosen": {"lr": 0.7},
    "won_by_first": False,
    "budget_curve": [{"trials": 1, "expected": 2.0}, {"trials": 2, "expected": 1.5}, {"trials": 3, "expected": 1.25}],
    "date": "2026-11-26",
}


class Page(HTMLParser):
    """Elements in order, texts, tables as lists of rows of cells; refuses what is not closed in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.tables: list[list[list[str]]] = []
        self.scripts: dict[str, str] = {}
        self._open: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.feed(text)
        self.close()
        assert not self._open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert len({name for name, _ in attrs}) == len(attrs), f"an attribute of {tag} is there twice"
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self._open.append((tag, dict(attrs)))
        if tag == "table":
            self.tables.append([])
        if tag == "tr":
            self.tables[-1].append([])
        if tag in ("td", "th"):
            self.tables[-1][-1].append("")

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop()[0] == tag, f"</{tag}> closes nothing at {self.getpos()}"

    def handle_data(self, data: str) -> None:
        tags = [tag for tag, _ in self._open]
        if tags and tags[-1] in ("script", "style"):
            self.scripts[self._open[-1][1].get("id") or tags[-1]] = data
            return
        self.words.append(data)
        if "td" in tags or ("th" in tags and self.tables):
            self.tables[-1][-1][-1] += data

    @property
    def text(self) -> str:
        return " ".join("".join(self.words).split())

    def rows(self, *headers: str) -> list[list[str]]:
        """The rows of the table that begins with these headers, without whitespace around cells."""
        table = next(t for t in self.tables if tuple(t[0][: len(headers)]) == headers)
        return [[" ".join(cell.split()) for cell in row] for row in table[1:]]


@pytest.fixture(scope="module")
def chosen() -> Params:
    return synthetic.params(BENCHMARKS, OPTIMIZERS)


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory, chosen: Params) -> Path:
    """A report on a study with a run that diverged, reconstructions, tuning trials and a manifest."""
    root = tmp_path_factory.mktemp("repository")
    synthetic.write_study(root / "results", chosen, diverged=(LOST,))
    (root / "results" / "digits_cnn" / "adam" / "seed-0" / "reconstructions.png").write_bytes(PIXEL)
    (root / "tuning" / "toy_mlp").mkdir(parents=True)
    (root / "tuning" / "toy_mlp" / "kfac.json").write_text(json.dumps(TRIALS))
    (root / "data" / "toy_mlp").mkdir(parents=True)
    manifest = {"sha256": "0123456789abcdef", "examples": {"train": 4711, "validation": 12, "test": 13}}
    (root / "data" / "toy_mlp" / "manifest.json").write_text(json.dumps(manifest))
    (root / "benchmarks" / "results").mkdir(parents=True)
    (root / "benchmarks" / "results" / "coverage.json").write_text(json.dumps({"rows": [SIMULATED]}))
    aggregate.aggregate(chosen, root / "results", root / "report", lambda _: {("toy_mlp", "sgd", 1): ADDRESS})
    return root / "report"


@pytest.fixture(scope="module")
def page(report: Path) -> Page:
    return Page((report / "index.html").read_text(encoding="utf-8"))


def test_it_is_one_well_formed_file_without_an_address_to_load(page: Page, report: Path) -> None:
    ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    for tag, attributes in page.elements:
        loaded = [value or "" for name, value in attributes.items() if name in LOADS]
        loaded += [attributes.get("href") or ""] if tag == "link" else []
        assert all(address.startswith("data:") for address in loaded), (tag, attributes)
        links = [attributes.get("href") or "#"] if tag == "a" else []
        assert all(link.startswith("#") or link == ADDRESS or (report / link).exists() for link in links), links
    assert "@import" not in page.scripts["style"] and "url(" not in page.scripts["style"]
    assert "http" not in page.scripts["style"] + page.scripts["script"]


def test_links_within_the_page_lead_somewhere(page: Page) -> None:
    ids = {attributes.get("id") for _, attributes in page.elements}
    links = [str(attributes["href"]) for tag, attributes in page.elements if tag == "a"]
    assert {link[1:] for link in links if link.startswith("#")} <= ids
    assert set(BENCHMARKS) <= ids


def test_it_has_every_sentence_of_the_verdicts_the_first_before_all_tables(page: Page, report: Path) -> None:
    sentences = json.loads((report / "verdicts.json").read_text())["sentences"]
    assert sentences
    for sentence in sentences:
        assert sentence in page.text
    assert page.text.index(sentences[0]) < page.text.index("Optimizer steps to the hard target")


def test_three_seeds_give_no_verdict(page: Page) -> None:
    assert "no verdict: 3 seeds" in page.text.lower()


def test_every_run_has_its_row(page: Page) -> None:
    rows = page.rows("benchmark", "optimizer", "seed", "ended", "steps", "training seconds")
    expected = [[b, o, str(s)] for b in BENCHMARKS for o in OPTIMIZERS for s in synthetic.SEEDS]
    assert [row[:3] for row in rows] == expected
    assert [row[:4] for row in rows if row[3] != "finished"] == [["toy_mlp", "kfac", "2", "diverged"]]


def test_a_run_that_mlflow_has_leads_there(page: Page) -> None:
    assert [attributes["href"] for tag, attributes in page.elements if tag == "a"].count(ADDRESS) == 1
    assert "A seed's number leads to its run in MLflow" in page.text


def test_what_diverged_stands_with_its_reason_and_a_target_that_was_missed_too(page: Page) -> None:
    rows = page.rows("benchmark", "optimizer", "seed", "ended", "after steps", "message")
    assert rows == [["toy_mlp", "kfac", "2", "diverged", "40", "training loss is not finite"]]
    missed = page.rows("benchmark", "optimizer", "target", "seeds that missed it")
    assert ["toy_mlp", "kfac", "hard", "1 of 3"] in missed
    assert "No tuning trials are recorded for 2 benchmarks" in page.text
    assert "toy_mlp: sgd, adam" in page.text


def test_at_a_glance_are_the_medians_and_how_far_from_the_best(page: Page, report: Path) -> None:
    outcomes = json.loads((report / "verdicts.json").read_text())["outcomes"]
    own = {
        each["optimizer"]: each["median"]
        for each in outcomes
        if (each["benchmark"], each["target"], each["clock"]) == ("digits_cnn", "hard", "steps")
    }
    assert own["sgd"] is None and own["kfac"] < own["adam"]
    cells = dict(zip(OPTIMIZERS, page.rows("benchmark", *OPTIMIZERS)[1][1:], strict=True))
    assert cells["sgd"].startswith(">200")
    assert cells["kfac"] == f"{own['kfac']:g}best"
    assert cells["adam"].startswith(f"{own['adam']:g}{own['adam'] / own['kfac']:.2g}")


def test_every_place_of_a_chart_has_one_with_data(page: Page) -> None:
    charts = json.loads(page.scripts["charts"])
    places = [attributes["data-chart"] for _, attributes in page.elements if "data-chart" in attributes]
    assert sorted(map(str, places)) == sorted(charts)
    palette = json.loads(page.scripts["palette"])
    for name, chart in charts.items():
        assert chart["data"], name
        assert {trace["legendgroup"] for trace in chart["data"]} <= set(palette), name
        assert all(len(trace["x"]) == len(trace["y"]) > 0 for trace in chart["data"]), name
    expected = {"profile-steps", "profile-seconds", "speedup-steps", "speedup-seconds", "cost", "tuning-toy_mlp"}
    per_benchmark = ("loss-steps", "loss-seconds", "seeds-steps", "seeds-seconds", "phases", "curvature-cosine_natural")
    assert expected | {f"{b}-{chart}" for b in BENCHMARKS for chart in per_benchmark} <= set(charts)


def test_the_chart_library_is_inside(page: Page) -> None:
    library = gzip.decompress(base64.b64decode(page.scripts["plotly"])).decode()
    assert "Plotly" in library and re.search(r"plotly\.js v\d", library[:200])


def test_tuning_reconstructions_and_provenance_are_there(page: Page, report: Path) -> None:
    assert page.rows("optimizer", "trials", "reached", "diverged", "best, seconds") == [
        ["kfac", "4", "3", "1", "1.25", "no", "lr 0.7", "lr", "2026-11-26"]
    ]
    assert "chosen by the share of its seeds that reach the benchmark's hard target" in page.text
    assert "test data never" in page.text and "chosen on validation data" not in page.text
    images = [str(attributes["src"]) for tag, attributes in page.elements if tag == "img"]
    assert images == [f"data:image/png;base64,{base64.b64encode(PIXEL).decode()}"]
    assert page.rows("data", "train / validation / test") == [["toy_mlp", "4711 / 12 / 13", "0123456789ab"]]
    assert page.rows("what", "seeds", "promised") == [["interval of the ratio, t", "5", "0.95", "0.942"]]
    assert any(row == ["torch", "2.14.1"] for table in page.tables for row in table)
    with (report / "tuning.csv").open() as file:
        trials = list(csv.DictReader(file))
    assert [json.loads(row["values"]) for row in trials] == [each["values"] for each in TRIALS["trials"]]
    assert [row["trial"] for row in trials if row["chosen"] == "True"] == ["2"]
    text = (report / "report.md").read_text()
    assert "figures/tuning.svg" in text and "sha256 0123456789abcdef" in text


def test_the_files_beside_it_hold_what_the_page_shows(report: Path) -> None:
    runs = (report / "runs.csv").read_text().splitlines()
    assert len(runs) == 1 + len(BENCHMARKS) * len(OPTIMIZERS) * len(synthetic.SEEDS)
    curves = (report / "curves.csv").read_text().splitlines()
    assert curves[0] == "benchmark,optimizer,quantity,clock,at,median,low,high,seeds,confidence"
    assert {tuple(line.split(",")[:2]) for line in curves[1:]} == {(b, o) for b in BENCHMARKS for o in OPTIMIZERS}
    assert any(",inf," in line for line in curves if line.startswith("toy_mlp,kfac"))
    judged = json.loads((report / "verdicts.json").read_text())["comparisons"]
    with (report / "comparisons.csv").open() as file:
        comparisons = list(csv.DictReader(file))
    assert [row["sentence"] for row in comparisons] == [each["sentence"] for each in judged]
    assert [float(row["ratio_low"]) for row in comparisons if row["ratio_low"]] == [
        each["ratio"]["low"] for each in judged if each["ratio"]
    ]
    with (report / "outcomes.csv").open() as file:
        outcomes = list(csv.DictReader(file))
    figures = json.loads((report / "verdicts.json").read_text())
    assert [float(row["restricted_mean"]) for row in outcomes] == [x["restricted_mean"] for x in figures["outcomes"]]
    assert [row["median_low"] for row in outcomes] == [
        str(each["interval"]["low"]) if each["interval"] else "" for each in figures["outcomes"]
    ]
    with (report / "profiles.csv").open() as file:
        profiles = list(csv.DictReader(file))
    assert [float(row["share"]) for row in profiles] == [x for each in figures["profiles"] for x in each["share"]]
    with (report / "curvature.csv").open() as file:
        diagnostics = list(csv.DictReader(file))
    assert {(row["benchmark"], row["seed"]) for row in diagnostics} == {
        (benchmark, str(seed)) for benchmark in BENCHMARKS for seed in synthetic.SEEDS
    }


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Page:
    """The page of a study without SGD, in which all reach the target, one under a name with markup."""
    root = tmp_path_factory.mktemp("other")
    chosen = synthetic.params(("digits_autoencoder",), ("adam", "kfac"))
    chosen = replace(chosen, optimizers={**chosen.optimizers, "<b>&": chosen.optimizers["adam"]})
    aggregate.aggregate(chosen, synthetic.write_study(root / "results", chosen), root / "report")
    return Page((root / "report" / "index.html").read_text(encoding="utf-8"))


def test_a_name_with_markup_stays_a_name(other: Page) -> None:
    runs = other.rows("benchmark", "optimizer", "seed", "ended")
    assert ["digits_autoencoder", "<b>&", "0", "finished"] in [row[:4] for row in runs]
    assert "<b>&" in json.loads(other.scripts["palette"])


def test_seconds_are_steps_times_the_cost_of_a_step(other: Page) -> None:
    rows = other.rows("benchmark", "optimizer", "fewer steps", "dearer step", "faster in seconds")
    assert [row[1] for row in rows] == ["kfac", "<b>&"]
    for row in rows:
        steps, cost, seconds = (float(cell.rstrip(TIMES)) for cell in row[2:5])
        assert seconds == pytest.approx(steps / cost, rel=0.15)  # of medians, rounded
    assert other.rows("optimizer", "fewer steps", "dearer step")[0][:4] == ["kfac", *rows[0][2:5]]


@pytest.mark.parametrize(
    ("content", "complaint"),
    [("{", "cannot be read"), ("[]", "holds no mapping"), ('{"benchmark": "toy_mlp"}', "key 'optimizer' missing")],
)
def test_tuning_trials_that_cannot_be_read_are_one_line_and_nothing_is_written(
    tmp_path: Path, chosen: Params, content: str, complaint: str
) -> None:
    results = synthetic.write_study(tmp_path / "results", chosen)
    (tmp_path / "tuning" / "toy_mlp").mkdir(parents=True)
    (tmp_path / "tuning" / "toy_mlp" / "sgd.json").write_text(content)
    with pytest.raises(ConfigError, match=complaint) as refusal:
        aggregate.aggregate(chosen, results, tmp_path / "report")
    assert str(refusal.value).startswith(str(tmp_path / "tuning" / "toy_mlp" / "sgd.json"))
    assert not (tmp_path / "report").exists()
