"""A temporary repository with the files of this working tree and a study of seconds, for commands as users type them.

The one idea: one repository serves all tests. The study is trained once; a test that changes the workspace finds and
leaves it as it was committed, so that any of them can be run alone. Nothing of the user's is touched: neither their Git
and DVC settings, nor this working tree, nor its MLflow store.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

ROOT = Path(__file__).parents[2]
BENCHMARKS = ["toy_linear", "digits_cnn"]
OPTIMIZERS = ["sgd", "kfac"]
SEEDS = [0, 1]
HANGS = 600  # seconds after which a command is taken to hang


@dataclass
class Workspace:
    """A repository and the environment in which its commands run."""

    root: Path
    environment: dict[str, str]

    def call(self, *words: str, **variables: str) -> subprocess.CompletedProcess[str]:
        """Run a command to its end; what it printed is text."""
        environment = {**self.environment, **variables}
        return subprocess.run(
            words, cwd=self.root, env=environment, capture_output=True, text=True, timeout=HANGS, check=False
        )

    def run(self, *words: str, **variables: str) -> str:
        """What a command printed on stdout; it has to succeed."""
        ended = self.call(*words, **variables)
        assert ended.returncode == 0, f"{' '.join(words)}: {ended.returncode}\n{ended.stdout}\n{ended.stderr}"
        return ended.stdout

    def refusal(self, *words: str, **variables: str) -> str:
        """The one line with which a command refuses."""
        ended = self.call(*words, **variables)
        assert ended.returncode != 0, f"{' '.join(words)} was not refused:\n{ended.stdout}"
        lines = ended.stderr.splitlines()
        assert len(lines) == 1, ended.stderr
        return lines[0]

    def files(self, *folders: str) -> dict[str, bytes]:
        """Contents of all files below these folders, but for Python's own byte code."""
        found = (path for folder in folders for path in (self.root / folder).rglob("*"))
        kept = (path for path in found if path.is_file() and path.suffix != ".pyc")
        return {str(path.relative_to(self.root)): path.read_bytes() for path in kept}

    def changes(self) -> str:
        """What Git sees changed since the last commit."""
        return self.run("git", "status", "--porcelain")

    def position(self) -> tuple[str, str]:
        """Branch and commit."""
        return self.run("git", "symbolic-ref", "HEAD"), self.run("git", "rev-parse", "HEAD")

    def restore(self) -> None:
        """Back to what is committed, in Git and in DVC."""
        if not self.changes():
            return
        self.run("git", "checkout", "--quiet", "--", ".")
        self.run("git", "clean", "-dfq")
        shutil.rmtree(self.root / "results")
        self.run("dvc", "checkout", "--quiet", "--force")


def stages_run(printed: str) -> set[str]:
    """The stages that DVC says it ran, not those that were unchanged or came from its cache."""
    return set(re.findall(r"^Running stage '(.+)':$", printed, re.MULTILINE))


def training_stages(*optimizers: str) -> set[str]:
    return {f"train@{benchmark}-{optimizer}" for benchmark in BENCHMARKS for optimizer in optimizers}


def copy_working_tree(target: Path) -> None:
    """The files that Git knows or would know, committed or not."""
    listing = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(listing, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\0")
    for name in names:
        if name and (ROOT / name).is_file():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, target / name)


def new_repository(folder: Path, edit: Callable[[Path], None]) -> Workspace:
    """The repository as it is after cloning, its study changed by `edit`: no data, no results, an empty cache."""
    if not (ROOT / ".git").exists():
        pytest.skip("needs the repository, not a copy of its files")
    root = folder / "repository"
    copy_working_tree(root)
    (root / "dvc.lock").unlink(missing_ok=True)
    edit(root)
    commands = root / ".venv" / "bin"
    write_commands(commands)
    workspace = Workspace(root, isolated_environment(folder / "home", commands))
    workspace.run("python", "-m", "pipeline.composition")
    workspace.run("git", "init", "--quiet", "--initial-branch=main", ".")
    workspace.run("git", "add", ".")
    workspace.run("git", "commit", "--quiet", "--message=The working tree with a small study")
    return workspace


@contextmanager
def yaml_edited(path: Path) -> Iterator[Any]:
    """The content of a YAML file, to be changed in place."""
    yaml = YAML()
    yaml.width = 4096  # a line stays one line, as the commands of the documents have it
    content = yaml.load(path)
    yield content
    yaml.dump(content, path)


def shrink_study(root: Path) -> None:
    """Two benchmarks, two optimizers, two seeds, twenty steps; the other choices stay within reach."""

    def edit(path: Path, change: Any) -> None:
        with yaml_edited(path) as content:
            change(content)

    def shrink_benchmark(content: Any) -> None:
        for fields in content["benchmark"].values():
            fields.update(batch_size=64, steps=20, evaluate_every=5)
        for data in content.get("planted", {}).values():
            data.update(train=256, validation=64, test=64, population=256)

    def shrink_defaults(content: Any) -> None:
        for entry in content["defaults"]:
            for group, chosen in (("benchmark", BENCHMARKS), ("optimizer", OPTIMIZERS)):
                if isinstance(entry, dict) and group in entry:
                    entry[group] = chosen
        content["seeds"] = SEEDS

    conf = root / "pipeline" / "conf"
    for path in (conf / "benchmark").glob("*.yaml"):
        edit(path, shrink_benchmark)
    edit(conf / "config.yaml", shrink_defaults)


def isolated_environment(home: Path, commands: Path) -> dict[str, str]:
    """This process's environment without what would lead a command to the user's repositories, settings or store."""
    inherited = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("GIT_", "DVC_", "MLFLOW_", "MAKE")) and name != "MFLAGS"
    }
    identity = {f"GIT_{role}_{kind}": value for role in ("AUTHOR", "COMMITTER")
                for kind, value in (("NAME", "test"), ("EMAIL", "test@example.org"))}  # fmt: skip
    return {
        **inherited,
        **identity,
        "GIT_CONFIG_GLOBAL": os.devnull,
        "GIT_CONFIG_NOSYSTEM": "1",
        "DVC_NO_ANALYTICS": "true",
        "DVC_GLOBAL_CONFIG_DIR": str(home / "dvc-global"),
        "DVC_SYSTEM_CONFIG_DIR": str(home / "dvc-system"),
        "DVC_SITE_CACHE_DIR": str(home / "dvc-site"),
        "HOME": str(home),
        "OMP_NUM_THREADS": "1",
        "PATH": os.pathsep.join([str(commands), inherited["PATH"]]),
    }


def write_commands(folder: Path) -> None:
    """The environment's commands, led to the interpreter that runs the tests: a .venv as `make` would find it."""
    folder.mkdir(parents=True)
    for name, module in (("python", ""), ("dvc", "-m dvc"), ("mlflow", "-m mlflow")):
        script = folder / name
        script.write_text(f'#!/bin/sh\nexec "{sys.executable}" {module} "$@"\n')
        script.chmod(0o755)
    (folder.parent / ".ready").touch()


@dataclass(frozen=True)
class Study:
    """The trained and committed study, and what the first `make repro` printed."""

    workspace: Workspace
    printed: str
