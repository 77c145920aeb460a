"""Fixtures: one temporary repository for all end-to-end tests, fresh, and with its study trained."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from repository import Study, Workspace, new_repository, shrink_study


@pytest.fixture(scope="session")
def fresh(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Workspace]:
    """The repository as it is after cloning: no data, no results, an empty cache."""
    workspace = new_repository(tmp_path_factory.mktemp("end_to_end"), shrink_study)
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
