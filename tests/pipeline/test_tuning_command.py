"""Claims about the command line of tuning: bad options end in one line, a dry run changes nothing."""

from __future__ import annotations

import resource
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["--optimizers", "sgdd"], "error: optimizers: unknown optimizer 'sgdd'; nearest: sgd; valid: adam, "),
        (["--benchmarks", "toy_linear,toy"], "error: benchmarks: unknown benchmark 'toy'; "),
        (["--study", "tin"], "error: study: unknown study 'tin'; nearest: tiny; "),
        (["--trials", "0"], "error: trials: 0 is not allowed; expected an integer >= 1"),
        (["--trials", "many"], "error: trials: 'many' is not allowed; expected an integer >= 1"),
        (["--workers", "0"], "error: workers: 0 is not allowed; expected an integer >= 1"),
        (["--seeds", "1"], "error: seeds: 1 is one of the comparison's, [0, 1, 2]; expected others"),
        (
            ["--seeds", "1000,1000"],
            "error: seeds: [1000, 1000] is not allowed; expected a list of one or more different ",
        ),
        (["--engine", "slurm"], "error: engine: 'slurm' is not allowed; expected one of dvc, ray"),
        (["--gpu-share", "0"], "error: gpu-share: 0 is not allowed; expected a number > 0"),
        (["--set", "optimizer=sgd"], "error: set: 'optimizer=sgd' is not allowed; expected KEY=VALUE"),
        (["--trails", "8"], "error: unrecognized arguments: --trails 8; `python -m pipeline.tune --help` lists"),
    ],
)
def test_a_bad_option_is_refused_in_one_line_before_anything_is_imported(words: list[str], line: str) -> None:
    command = [sys.executable, "-X", "importtime", "-m", "pipeline.tune", *words]
    begin = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    said = [each for each in ended.stderr.splitlines() if not each.startswith("import time:")]
    assert ended.returncode == 2 and len(said) == 1 and said[0].startswith(line), ended.stderr[-2000:]
    imported = {each.rpartition("|")[2].strip() for each in ended.stderr.splitlines()}
    assert not imported & {"torch", "mlflow", "dvc.repo", "ray", "scipy.stats"}
    assert resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - begin < 1  # of the processor: others run beside


@pytest.mark.parametrize(
    "words", [["--set", "precision=fp64"], ["--set", "devise=cpu"], ["--study", "tiny", "--benchmarks", "toy_mlp"]]
)
def test_what_only_composition_can_tell_is_refused_in_one_line_too(words: list[str]) -> None:
    command = [sys.executable, "-m", "pipeline.tune", "--trials", "2", "--dry-run", *words]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert ended.returncode == 2 and len(ended.stderr.splitlines()) == 1 and ended.stderr.startswith("error: ")


def test_a_dry_run_shows_the_points_and_changes_nothing() -> None:
    status = ["git", "status", "--porcelain"]
    before = subprocess.run(status, cwd=ROOT, capture_output=True, text=True, check=False).stdout
    command = [
        sys.executable,
        "-m",
        "pipeline.tune",
        "--dry-run",
        "--study",
        "tiny",
        "--optimizers",
        "sgd,kfac",
        "--trials",
        "3",
    ]
    shown = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
    assert len(shown) == 2 * 2 * 3 + 2
    assert shown[0] == "toy_linear sgd trial 1: lr 0.04"
    assert shown[-2].startswith("12 trials of 4 pairs, 12 to train")
    assert shown[-1].startswith("about ") and " min with 1 at a time" in shown[-1]
    assert subprocess.run(status, cwd=ROOT, capture_output=True, text=True, check=False).stdout == before
