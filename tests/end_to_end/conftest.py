"""Fixtures: one temporary repository for all end-to-end tests, fresh, and with its study trained."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from repository import ROOT, Study, Workspace, copy_working_tree, isolated_environment, shrink_study, write_commands


@pytest.fixture(scope="session")
def fresh(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Workspace]:
    """The repository as it is after cloning: no data, no results, an empty cache."""
    if not (ROOT / ".git").exists():
        pytest.skip("needs the repository, not a copy of its files")
    root = tmp_path_factory.mktemp("end_to_end") / "repository"
    home = tmp_path_factory.mktemp("home")
    copy_working_tree(root)
    (root / "dvc.lock").unlink(missing_ok=True)
    shrink_study(root)
    commands = root / ".venv" / "bin"
    write_commands(commands)
    workspace = Workspace(root, isolated_environment(home, commands))
    workspace.run("python", "-m", "pipeline.composition")
    workspace.run("git", "init", "--quiet", "--initial-branch=main", ".")
    workspace.run("git", "add", ".")
    workspace.run("git", "commit", "--quiet", "--message=The working tree with a small study")
    yield workspace
    workspace.call("dvc", "queue", "stop", "--kill")


@pytest.fixture(scope="session")
def study(fresh: Workspace) -> Study:
    printed = fresh.run("make", "repro")
    fresh.run("git", "add", ".")
    fresh.run("git", "commit", "--quiet", "--message=The study")
    return Study(fresh, printed)


@pytest.fixture
def workspace(study: Study) -> Iterator[Workspace]:
    """The trained study, which the test may change."""
    yield study.workspace
    study.workspace.restore()
