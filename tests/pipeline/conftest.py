"""Fixtures: a workspace with an empty MLflow store of its own."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from pipeline import tracking


@pytest.fixture(scope="session")
def new_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store as it is made on first use; making it takes seconds, copying it none."""
    folder = tmp_path_factory.mktemp("store")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DVC_ROOT", str(folder))
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        tracking.Store()
    return folder / "mlflow.db"


@pytest.fixture
def root(tmp_path: Path, new_store: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A workspace with an empty store."""
    shutil.copy(new_store, tmp_path / "mlflow.db")
    monkeypatch.setenv("DVC_ROOT", str(tmp_path))
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.chdir(tmp_path)
    return tmp_path
