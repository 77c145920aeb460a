"""Claims about what a tuning writes into pipeline/conf: chosen settings, and wider ranges."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from ruamel.yaml import YAML

from pipeline import settings, trials, tune
from pipeline.composition import compose
from pipeline.config import load, resolve
from pipeline.search import Dimension
from pipeline.trials import Choice, all_trials
from pipeline.validation import available

ROOT = Path(__file__).parents[2]
LR = Dimension("lr", "log", (0.001, 1.0))


@pytest.fixture
def conf(tmp_path: Path) -> Path:
    shutil.copytree(ROOT / "pipeline" / "conf", tmp_path / "conf")
    return tmp_path / "conf"


@pytest.mark.parametrize("optimizer", available("optimizer"))
def test_a_written_setting_holds_for_its_benchmark_alone_and_comments_stay(conf: Path, optimizer: str) -> None:
    file, yaml = conf / "optimizer" / f"{optimizer}.yaml", YAML(typ="safe", pure=True)
    before, text = yaml.load(file), file.read_text()
    name = "relative_damping" if "kfac" in optimizer else "lr"
    fields = {
        (optimizer, name): (0.0123, None),
        (optimizer, "training", "schedule"): ("cosine", None),
        (optimizer, "eps"): (1e-6, 1e-8),
    }
    assert settings.write(file, "toy_mlp", fields)
    after = yaml.load(file)
    old = before[optimizer][name]
    others = {k: v for k, v in old.items() if k != "toy_mlp"} if isinstance(old, dict) else {"default": old}
    assert after[optimizer][name] == others | {"toy_mlp": 0.0123}
    assert after[optimizer]["training"]["schedule"] == {"default": None, "toy_mlp": "cosine"}
    old = before[optimizer].get("eps", 1e-8)
    others = {k: v for k, v in old.items() if k != "toy_mlp"} if isinstance(old, dict) else {"default": old}
    assert after[optimizer]["eps"] == others | {"toy_mlp": 1e-6}
    touched = (name, "eps", "training")
    assert {k: v for k, v in after[optimizer].items() if k not in touched} == {
        k: v for k, v in before[optimizer].items() if k not in touched
    }
    comments = [line.partition("#")[2].strip() for line in text.splitlines() if "#" in line]
    assert all(comment in file.read_text() for comment in comments)
    assert max(map(len, file.read_text().splitlines())) <= 130
    assert not settings.write(file, "toy_mlp", fields)


def test_what_was_written_is_what_a_run_resolves_to(conf: Path, tmp_path: Path) -> None:
    file = conf / "optimizer" / "adam.yaml"
    settings.write(file, "digits_cnn", {("adam", "betas"): ([0.95, 0.98], None), ("adam", "lr"): (0.02, None)})
    values = YAML(typ="safe", pure=True).load(file)["adam"]
    compose(tmp_path / "before.yaml", ["optimizer=adam"])
    params = load(tmp_path / "before.yaml")
    after = type(params)(**{**vars(params), "optimizers": {"adam": values}})
    assert resolve(after, "digits_cnn", "adam").options["betas"] == [0.95, 0.98]
    for name in ("toy_linear", "digits_autoencoder"):
        assert resolve(after, name, "adam") == resolve(params, name, "adam")


@pytest.mark.parametrize(
    ("dimension", "side", "ends"),
    [
        (LR, "high", (0.001, 31.6)),
        (LR, "low", (3.16e-05, 1.0)),
        (Dimension("max_decrease", "log", (0.1, 0.9)), "high", (0.1, 1.0)),
        (Dimension("max_decrease", "log", (0.1, 1.0)), "high", (0.1, 1.0)),
        (Dimension("momentum", "linear", (0.8, 0.98)), "high", (0.8, 0.99)),
        (Dimension("momentum", "linear", (0.2, 0.8)), "low", (0.0, 0.8)),
        (Dimension("rest.lr", "log", (0.001, 0.1)), "high", (0.001, 1.0)),
    ],
)
def test_a_range_widens_by_half_of_itself_as_far_as_its_values_are_allowed(
    dimension: Dimension, side: str, ends: tuple[float, float]
) -> None:
    assert tune._allowed(dimension.field, dimension.ends, dimension.widened(side)) == pytest.approx(ends, rel=0.01)


def test_ranges_widen_where_the_last_tuning_ended_at_an_edge_and_only_once(
    conf: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(tune, "CONF", conf)
    monkeypatch.setattr(trials, "SEARCH", conf / "search")
    choice = Choice(("toy_linear", "toy_mlp"), ("sgd",), 2, (1000,))
    best = {"values": {"lr": 2.9}, "edge": ["lr: high"]}
    before = {("toy_linear", "sgd"): {"ranges": {"lr": [0.003, 3.0]}, "trials": [best], "chosen": best["values"]}}
    assert tune.widen(all_trials(choice, {}), before, dry=True)
    assert all_trials(choice, {})["toy_linear", "sgd"][0].space[0].ends == (0.003, 3.0)
    assert tune.widen(all_trials(choice, {}), before, dry=False)
    assert "search.sgd.lr of toy_linear: [0.003, 3.0] is now [0.003, 94.9]" in capsys.readouterr().out
    asked = all_trials(choice, {})
    assert asked["toy_linear", "sgd"][0].space[0].ends == (0.003, 94.9)
    assert asked["toy_mlp", "sgd"][0].space[0].ends == (0.003, 3.0)
    assert not tune.widen(asked, before, dry=False)
