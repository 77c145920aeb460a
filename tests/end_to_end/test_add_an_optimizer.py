"""Claims about docs/add-an-optimizer.md: its files, written as they stand there, are in the benchmark, and its commands
run.

The document is the test's input: a block that begins with the comment of a path is a file, a bash block is commands.
"""

from __future__ import annotations

import re
import shlex
from itertools import pairwise
from pathlib import Path

import pytest
from repository import BENCHMARKS, ROOT, Workspace, copy_working_tree, new_repository, shrink_study, stages_run

from pipeline.records import read_runs

DOCUMENT = (ROOT / "docs" / "add-an-optimizer.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```$", DOCUMENT, re.MULTILINE | re.DOTALL)


def commands() -> list[str]:
    """The lines of all bash blocks, in their order."""
    return [line for kind, text in BLOCKS if kind == "bash" for line in text.splitlines()]


def write_files(root: Path) -> None:
    for kind, text in BLOCKS:
        named = re.match(r"(?:# @package _global_\n)?# (pipeline/\S+?)(, in (\w+))?\n", text)
        if kind == "bash" or named is None:
            continue
        path, _, mapping = named.groups()
        if mapping is None:
            assert not (root / path).exists(), f"{path} is there already"
            (root / path).write_text(text)
            continue
        source, line = (root / path).read_text(), text.split("\n", 1)[1]
        assert line not in source
        [head] = re.findall(rf"^{mapping}\b.* = {{\n", source, re.MULTILINE)
        (root / path).write_text(source.replace(head, head + line))


def choices(command: str) -> list[str]:
    """What a command sets with -S."""
    words = shlex.split(command)
    return [following for word, following in pairwise(words) if word == "-S"]


def shrunk(root: Path) -> None:
    """The small study, its new benchmark as small."""
    write_files(root)
    shrink_study(root)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    return new_repository(tmp_path_factory.mktemp("added"), shrunk)


def prepare_maxout(workspace: Workspace) -> None:
    """The command that makes one benchmark's file of another's."""
    [copying] = [line for line in commands() if line.startswith("sed ")]
    workspace.run("sh", "-c", copying)


def test_the_readme_shows_the_same_file() -> None:
    shown = next(text for kind, text in BLOCKS if kind == "yaml").split("\n", 1)[1]
    assert shown in (ROOT / "README.md").read_text(encoding="utf-8")


def test_its_optimizer_trains_its_network_on_its_benchmark(tmp_path: Path, small: Workspace) -> None:
    """All commands compose; the class and the network that are written there train together."""
    copy_working_tree(tmp_path)
    write_files(tmp_path)
    here = Workspace(tmp_path, {**small.environment, "DVC_ROOT": str(tmp_path)})
    prepare_maxout(here)
    experiments = [line for line in commands() if line.startswith("dvc ")]
    assert len(experiments) == 6
    here.run("python", "-c", COMPOSE, *map(str, map(choices, experiments)))
    few = ("optimizer=lion", "benchmark=digits_maxout", "seeds=[0]", "benchmark.digits_maxout.steps=10")
    here.run("python", "-m", "pipeline.composition", *few)
    here.run("python", "-m", "pipeline.prepare", "digits_maxout")
    here.run("python", "-m", "pipeline.train", "digits_maxout", "lion")
    [run] = read_runs(tmp_path / "results", "digits_maxout", "lion", [0])
    assert run.summary["status"] == "finished" and run.summary["parameters"] == 64 * 144 + 144 + 48 * 10 + 10
    assert run.history[-1]["train_loss"] < run.history[0]["train_loss"]


COMPOSE = """
import ast, pathlib, sys
from pipeline.composition import compose
for words in sys.argv[1:]:
    compose(pathlib.Path("composed.yaml"), ast.literal_eval(words))
"""


@pytest.mark.slow
def test_every_command_of_the_document_runs(small: Workspace) -> None:
    stages = []
    for command in commands():
        printed = small.run("sh", "-c", command)
        if command.startswith("dvc "):
            ran = {name.removeprefix("train@") for name in stages_run(printed) if name.startswith("train@")}
            stages.append(ran)
    here = [f"{benchmark}-" for benchmark in BENCHMARKS]
    assert stages == [
        {f"{name}nadam" for name in here},
        {f"{name}{optimizer}" for name in here for optimizer in ("sgd", "kfac")},  # nadam's are in the cache
        {f"{name}lion" for name in here},
        {"digits_mlp-sgd", "digits_mlp-kfac"},
        {"digits_mlp-kfac"},  # one seed: another setting
        {"digits_maxout-sgd", "digits_maxout-kfac"},
    ]
    shown = small.run("dvc", "exp", "show")
    for name in ("nadam", "lion", "digits_mlp", "digits_maxout"):
        assert name in shown
