"""Claims about bad input: a command refuses it in one line that says what to change, and leaves nothing behind."""

from __future__ import annotations

import re
import shutil
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from repository import Study, Workspace
from ruamel.yaml import YAML

PAIR = ("toy_linear", "sgd")


@pytest.fixture
def copy(study: Study, tmp_path: Path) -> Iterator[Workspace]:
    """The study's parameters and data in a folder of its own, to be damaged, with stages called as DVC calls them."""
    for name in ("kfac", "pipeline"):
        (tmp_path / name).symlink_to(study.workspace.root / name)
    shutil.copy(study.workspace.root / "params.yaml", tmp_path)
    shutil.copytree(study.workspace.root / "data", tmp_path / "data")
    yield Workspace(tmp_path, {**study.workspace.environment, "DVC_ROOT": str(tmp_path)})


def set_parameter(workspace: Workspace, field: str, value: Any) -> None:
    yaml = YAML()
    path = workspace.root / "params.yaml"
    content = yaml.load(path)
    *parents, name = field.split(".")
    place = content
    for parent in parents:
        place = place[parent]
    place[name] = value
    yaml.dump(content, path)


@pytest.mark.parametrize(
    ("choice", "words"),
    [
        ("--queue -S optimizer=ekfacc", ["optimizer", "'ekfacc'", "nearest: ekfac", "valid: adam, "]),
        ("-S benchmark=[digits_cn]", ["benchmark", "'digits_cn'", "nearest: digits_cnn", "toy_mlp"]),
        ("-S study=tin", ["study", "'tin'", "nearest: tiny"]),
        ("-S optimizer.sgd.momentun=0.5", ["optimizer.sgd.momentun", "nearest: momentum"]),
        ("--temp -S optimizer.sgd.lr=fast", ["optimizer.sgd.lr: 'fast'", "a number > 0"]),
        ("-S optimizer.sgd.momentum=1.5", ["optimizer.sgd.momentum: 1.5", "< 1"]),
        ("-S optimizer.sgd._target_=torch.optim.SDG", ["optimizer.sgd._target_: 'torch.optim.SDG'", "nearest: SGD"]),
    ],
)
def test_a_bad_choice_is_refused_before_anything_is_trained_queued_or_written(
    workspace: Workspace, choice: str, words: list[str]
) -> None:
    before = workspace.files("results", "report", "data")
    line = workspace.refusal("dvc", "exp", "run", *choice.split())
    for word in words:
        assert word in line
    assert workspace.changes() == "" and workspace.files("results", "report", "data") == before
    assert not list((workspace.root / ".git" / "refs" / "exps").glob("celery/*"))


@pytest.mark.parametrize(
    "command",
    [("prepare", "digits_cnn"), ("toy", "toy_linear"), ("train", *PAIR), ("aggregate",)],
    ids=lambda words: words[0],
)
@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("optimizer.sgd.lr", "fast", ["optimizer.sgd.lr: 'fast'", "a number > 0"]),
        ("optimizer.kfac.dampin", 0.1, ["optimizer.kfac.dampin", "nearest: damping"]),
    ],
)
def test_what_params_yaml_alone_decides_is_refused_without_torch_or_mlflow(
    copy: Workspace, command: tuple[str, ...], field: str, value: Any, words: list[str]
) -> None:
    set_parameter(copy, field, value)
    ended = copy.call("python", "-X", "importtime", "-m", f"pipeline.{command[0]}", *command[1:])
    imports, said = [], []
    for line in ended.stderr.splitlines():
        (imports if line.startswith("import time:") else said).append(line)
    assert ended.returncode == 2 and len(said) == 1 and said[0].startswith("error: ")
    for word in words:
        assert word in said[0]
    assert len(imports) > 10
    assert not [line for line in imports if re.search(r"\| +(torch|mlflow|matplotlib|sklearn)\b", line)]
    assert not (copy.root / "results").exists() and not (copy.root / "report").exists()


def truncate_data(copy: Workspace) -> None:
    file = copy.root / "data" / PAIR[0] / "tensors.pt"
    file.write_bytes(file.read_bytes()[:-100])


def remove_data(copy: Workspace) -> None:
    (copy.root / "data" / PAIR[0] / "tensors.pt").unlink()


def put_a_file_where_records_go(copy: Workspace) -> None:
    (copy.root / "results").mkdir()
    (copy.root / "results" / PAIR[0]).write_text("in the way")


def name_a_function_as_optimizer(copy: Workspace) -> None:
    set_parameter(copy, "optimizer.sgd", {"_target_": "own.tools.Tool"})
    (copy.root / "own").mkdir()
    (copy.root / "own" / "tools.py").write_text("class Base:\n    pass\nTool = type('Tool', (Base,), {})\n")


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (truncate_data, ["data/toy_linear/tensors.pt", "truncated", "dvc repro"]),
        (remove_data, ["data/toy_linear/tensors.pt", "missing", "dvc repro"]),
        (put_a_file_where_records_go, ["results/toy_linear/sgd", "cannot write"]),
        (name_a_function_as_optimizer, ["optimizer.sgd._target_", "'own.tools.Tool'", "torch.optim.Optimizer"]),
    ],
)
def test_training_refuses_what_is_damaged_before_the_first_step(
    copy: Workspace, damage: Callable[[Workspace], None], words: list[str]
) -> None:
    damage(copy)
    before = copy.files(".")
    line = copy.refusal("python", "-m", "pipeline.train", *PAIR)
    assert line.startswith("error: ")
    for word in words:
        assert word in line
    assert copy.files(".") == before


def test_training_refuses_a_server_that_does_not_answer(copy: Workspace) -> None:
    with socket.socket() as port:
        port.bind(("127.0.0.1", 0))  # taken, and nobody listens
        address = f"http://127.0.0.1:{port.getsockname()[1]}"
        before = copy.files(".")
        line = copy.refusal("python", "-m", "pipeline.train", *PAIR, MLFLOW_TRACKING_URI=address)
    assert line.startswith("error: MLFLOW_TRACKING_URI: ") and address in line and "allowed: " in line
    locks = {name for name in copy.files("checkpoints") if name.endswith(".lock")}
    assert {name: content for name, content in copy.files(".").items() if name not in locks} == before


def test_the_report_refuses_results_without_records(copy: Workspace) -> None:
    (copy.root / "results" / PAIR[0] / PAIR[1] / "seed-0").mkdir(parents=True)
    line = copy.refusal("python", "-m", "pipeline.aggregate")
    assert "results/toy_linear/sgd/seed-0" in line and "dvc repro train@toy_linear-sgd" in line
    assert not (copy.root / "report").exists()


def test_a_report_that_cannot_be_written_is_refused(study: Study, copy: Workspace) -> None:
    (copy.root / "results").symlink_to(study.workspace.root / "results")
    (copy.root / "report").write_text("in the way")
    line = copy.refusal("python", "-m", "pipeline.aggregate")
    assert line.startswith("error: report: ")
    assert (copy.root / "report").read_text() == "in the way"


def test_rebuilding_from_nothing_is_refused(copy: Workspace) -> None:
    assert "no run records" in copy.refusal("python", "-m", "pipeline.tracking", "rebuild")
    assert not list(copy.root.glob("mlflow.db*"))


def test_a_stage_that_refuses_leaves_the_other_results_and_all_come_back(workspace: Workspace) -> None:
    before, others = workspace.files("results"), workspace.files("results/toy_linear/kfac", "results/digits_cnn")
    set_parameter(workspace, "optimizer.sgd.lr", "fast")
    ended = workspace.call("dvc", "repro")
    assert ended.returncode != 0
    assert "error: optimizer.sgd.lr: 'fast' is not allowed; expected a number > 0" in ended.stderr
    assert workspace.files("results/toy_linear/kfac", "results/digits_cnn") == others
    assert not workspace.files("results/toy_linear/sgd")
    workspace.restore()
    assert workspace.files("results") == before
