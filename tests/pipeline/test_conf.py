"""Claims about pipeline/conf: what it composes to, and that a bad choice never gets past composition."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.composition import compose
from pipeline.config import Params, load, resolve
from pipeline.validation import available

ROOT = Path(__file__).parents[2]
DEFAULT_BENCHMARKS = ["toy_linear", "toy_mlp", "digits_autoencoder", "digits_cnn"]
DEFAULT_OPTIMIZERS = ["sgd", "adam", "kfac", "ekfac", "gkfac"]


def composed(tmp_path: Path, *overrides: str) -> Params:
    compose(tmp_path / "params.yaml", list(overrides))
    return load(tmp_path / "params.yaml")


def test_params_yaml_is_the_composition_of_conf(tmp_path: Path) -> None:
    compose(tmp_path / "params.yaml")
    fresh = (tmp_path / "params.yaml").read_text()
    assert (ROOT / "params.yaml").read_text() == fresh, "run `python -m pipeline.composition` and commit params.yaml"


def test_the_default_study_is_four_benchmarks_five_optimizers_three_seeds() -> None:
    params = load(ROOT / "params.yaml")
    assert list(params.benchmarks) == DEFAULT_BENCHMARKS
    assert list(params.optimizers) == DEFAULT_OPTIMIZERS
    assert params.seeds == [0, 1, 2]


def test_every_optimizer_lists_the_same_options_of_the_training_loop(tmp_path: Path) -> None:
    params = composed(tmp_path, "optimizer=[" + ",".join(available("optimizer")) + "]")
    assert set(params.optimizers) == set(available("optimizer"))
    options = {tuple(sorted(fields["training"])) for fields in params.optimizers.values()}
    assert options == {("averaging", "batch_size", "evaluate_every", "schedule", "warmup")}


@pytest.mark.parametrize("benchmark", available("benchmark"))
def test_a_benchmark_brings_its_data_and_no_others(tmp_path: Path, benchmark: str) -> None:
    params = composed(tmp_path, f"benchmark={benchmark}", "optimizer=sgd")
    assert list(params.benchmarks) == [benchmark]
    assert [*params.images, *params.planted] == [benchmark]


@pytest.mark.parametrize("study", available("study"))
def test_every_study_composes_and_the_command_line_wins_over_it(tmp_path: Path, study: str) -> None:
    params = composed(tmp_path, f"study={study}", "seeds=[7]", "optimizer=ekfac")
    assert params.seeds == [7]
    assert list(params.optimizers) == ["ekfac"]
    assert params.study == study


def test_the_tiny_study_overrides_the_values_of_its_benchmarks(tmp_path: Path) -> None:
    params = composed(tmp_path, "study=tiny")
    assert all(fields["steps"] <= 50 for fields in params.benchmarks.values())
    assert len(params.seeds) == 1


def test_one_optimizer_more_joins_by_a_plus(tmp_path: Path) -> None:
    assert list(composed(tmp_path, "+optimizer=adamw").optimizers) == [*DEFAULT_OPTIMIZERS, "adamw"]


def test_a_number_on_the_command_line_replaces_the_whole_mapping_by_benchmark(tmp_path: Path) -> None:
    params = composed(tmp_path, "optimizer.sgd.lr=0.03")
    assert params.optimizers["sgd"]["lr"] == 0.03
    assert {resolve(params, name, "sgd").options["lr"] for name in params.benchmarks} == {0.03}


def test_one_benchmarks_value_can_be_set_within_a_mapping(tmp_path: Path) -> None:
    params = composed(tmp_path, "++optimizer.sgd.lr.digits_cnn=0.29")
    assert resolve(params, "digits_cnn", "sgd").options["lr"] == 0.29
    committed = load(ROOT / "params.yaml")
    for other in set(committed.benchmarks) - {"digits_cnn"}:
        assert resolve(params, other, "sgd") == resolve(committed, other, "sgd")


def test_values_of_the_data_are_within_reach(tmp_path: Path) -> None:
    assert composed(tmp_path, "images.digits_cnn.validation=0.2").images["digits_cnn"]["validation"] == 0.2


def test_the_kronecker_optimizers_tune_themselves_by_default() -> None:
    params = load(ROOT / "params.yaml")
    for name in ("kfac", "ekfac", "gkfac"):
        assert params.optimizers[name]["lr"] is None


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("optimizer.sgd.lr=abc", ["optimizer.sgd.lr: 'abc' is not allowed; expected a number > 0"]),
        ("seeds=3", ["seeds: 3 is not allowed"]),
        ("+optimizer.kfac.dampin=3", ["optimizer.kfac.dampin: unknown", "nearest: damping"]),
        ("optimizer.kfac.dampin=3", ["optimizer.kfac.dampin: unknown", "nearest: damping"]),
        ("optimiser.kfac.damping=3", ["optimiser: unknown", "nearest: optimizer"]),
        ("+optimizer.sgd.lr.toy_mpl=3", ["optimizer.sgd.lr.toy_mpl: unknown benchmark", "nearest: toy_mlp"]),
        ("optimizer.sgd._target_=torch.optim.SGDD", ["optimizer.sgd._target_: ", "nearest: SGD"]),
        ("optimizer=ekfacc", ["optimizer: unknown optimizer 'ekfacc'", "nearest: ekfac", "valid: adam, "]),
        ("optimizer=[sgd,ekfacc]", ["optimizer: unknown optimizer 'ekfacc'", "nearest: ekfac", "valid: adam, "]),
        ("benchmark=digits", ["benchmark: unknown benchmark 'digits'", "valid: cifar100_alexnet, ", " digits_cnn, "]),
        ("study=tin", ["study: unknown study 'tin'", "nearest: tiny"]),
        ("optimiser=ekfac", ["optimiser: unknown", "nearest: optimizer"]),
        ("optimizer=[ekfac", ["'[ekfac'"]),
    ],
)
def test_a_bad_choice_is_refused_at_composition_in_one_line(override: str, words: list[str]) -> None:
    before = (ROOT / "params.yaml").read_bytes()
    command = [sys.executable, "-m", "pipeline.composition", override]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert ended.returncode == 2
    assert ended.stderr.startswith("error: ") and len(ended.stderr.splitlines()) == 1, ended.stderr
    for word in words:
        assert word in ended.stderr
    assert (ROOT / "params.yaml").read_bytes() == before


@pytest.mark.parametrize(("text", "word"), [("sgd: {lr: [", "sgd.yaml"), ("sgd: {lr: '${nowhere}'}", "nowhere")])
def test_a_broken_file_is_refused_at_composition_in_one_line(text: str, word: str, tmp_path: Path) -> None:
    shutil.copytree(ROOT / "pipeline", tmp_path / "pipeline", ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "pipeline" / "conf" / "optimizer" / "sgd.yaml").write_text(text)
    command = [sys.executable, "-m", "pipeline.composition"]
    ended = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert ended.returncode == 2
    assert ended.stderr.startswith("error: ") and len(ended.stderr.splitlines()) == 1, ended.stderr
    assert word in ended.stderr and not (tmp_path / "params.yaml").exists()
