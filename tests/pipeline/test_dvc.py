"""Claims about dvc.yaml: its stages are the chosen ones, its files exist, and what decides numbers is a dependency."""

import ast
import configparser
import subprocess
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

from pipeline import evidence

ROOT = Path(__file__).parents[2]

# What a stage imports without its numbers depending on it: refusals, going on after a kill to the same numbers, and the
# view of the records in MLflow.
DECIDES_NOTHING = {
    *("__init__", "checks", "signatures", "validation", "config", "checkpoint", "interruption", "tracking", "store"),
}
# Of what pipeline/data.py imports: where images come from; training compares them with the manifest's checksum.
ORIGIN = {"imagesets", "imagefiles", "imagestore", "download"}
CONCERNS_ANOTHER = {"prepare": {"augmentation"}, "toy": {"augmentation"} | ORIGIN, "train": ORIGIN, "aggregate": set()}


@pytest.fixture(scope="module")
def stages() -> dict[str, Any]:
    return YAML(typ="safe", pure=True).load(ROOT / "dvc.yaml")["stages"]


def imported(module: str, seen: set[str]) -> set[str]:
    """Names of the modules of pipeline that `module` imports, directly or not, at the top or inside functions."""
    path = ROOT / "pipeline" / f"{module}.py"
    if module in seen or not path.is_file():
        return seen
    seen.add(module)
    for node in ast.walk(ast.parse(path.read_text())):
        names: list[str] = []
        if isinstance(node, ast.ImportFrom) and node.module == "pipeline":
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("pipeline."):
            names = [str(node.module).split(".")[1]]
        for name in names:
            if name in DECIDES_NOTHING:
                continue
            imported(name, seen)
    return seen


@pytest.mark.parametrize("stage", ["prepare", "toy", "train", "aggregate"])
def test_every_module_that_decides_a_stages_numbers_is_its_dependency(stages: dict[str, Any], stage: str) -> None:
    needed = {f"pipeline/{module}.py" for module in imported(stage, set()) - CONCERNS_ANOTHER[stage]}
    assert needed <= set(stages[stage]["deps"])


def test_a_change_of_library_or_networks_trains_again(stages: dict[str, Any]) -> None:
    assert {"kfac", "pipeline/models", "pipeline/config.py"} <= set(stages["train"]["deps"])


def test_what_the_report_shows_beside_the_records_makes_it_stale(
    stages: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    looked_for: list[str] = []
    monkeypatch.setattr(evidence, "_read", lambda path, _: looked_for.append(str(path.relative_to(ROOT))))
    evidence.read(ROOT, ["toy_mlp"], ["kfac"])
    assert "tuning/toy_mlp/kfac.json" in looked_for
    for name in looked_for:  # manifests of data stand for what the records are of
        assert name.startswith("data/") or any(Path(name).is_relative_to(dep) for dep in stages["aggregate"]["deps"])


@pytest.mark.parametrize("stage", ["prepare", "toy", "train", "aggregate"])
def test_every_dependency_in_the_tree_exists(stages: dict[str, Any], stage: str) -> None:
    for path in stages[stage]["deps"]:
        if not path.startswith(("data/", "results")):
            assert (ROOT / path).exists(), path


def test_the_stages_are_the_chosen_pairs_and_their_data() -> None:
    from dvc.repo import Repo

    with Repo(str(ROOT)) as repo:
        names = {stage.addressing for stage in repo.index.stages}
    pairs = {name.removeprefix("train@") for name in names if name.startswith("train@")}
    assert len(pairs) == 20
    assert "digits_cnn-ekfac" in pairs
    assert names - {f"train@{pair}" for pair in pairs} == {
        "prepare@digits_autoencoder",
        "prepare@digits_cnn",
        "toy@toy_linear",
        "toy@toy_mlp",
        "aggregate",
    }


def test_dvc_composes_from_conf_with_the_early_refusal_and_reports_to_nobody() -> None:
    config = configparser.ConfigParser()
    config.read_string("\n".join(line.strip() for line in (ROOT / ".dvc" / "config").read_text().splitlines()))
    assert config["core"]["analytics"] == "false"
    assert config["hydra"]["enabled"] == "true"
    assert (ROOT / config["hydra"]["config_dir"] / "config.yaml").is_file()
    assert (ROOT / config["hydra"]["plugins_path"] / "hydra_plugins").is_dir()


@pytest.mark.parametrize(
    "path",
    [
        "data/toy_mlp/tensors.pt",
        "results/toy_mlp/sgd/seed-0/history.csv",
        "report/index.html",
        "report/report.md",
        "report/figures/loss.svg",
        "report/verdicts.json",
        "mlflow.db",
        "mlflow.db-wal",
        "mlartifacts/1/x",
        ".venv/bin/python",
        "raw/cifar.tar",
        "pipeline/__pycache__/x.pyc",
    ],
)
def test_git_ignores_what_the_pipeline_makes(path: str) -> None:
    assert subprocess.run(["git", "check-ignore", "-q", path], cwd=ROOT, check=False).returncode == 0


@pytest.mark.parametrize("path", ["report/metrics.json", "dvc.lock", "params.yaml"])
def test_git_keeps_what_dvc_compares_revisions_by(path: str) -> None:
    assert subprocess.run(["git", "check-ignore", "-q", path], cwd=ROOT, check=False).returncode == 1
