"""Claims about README.md: every target, module and file that it names is there."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest
from repository import ROOT

README = ROOT / "README.md"


@pytest.fixture(scope="module")
def text() -> str:
    return README.read_text(encoding="utf-8")


def test_every_make_target_is_in_the_makefile(text: str) -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = set(re.findall(r"(?:^|`|\$ )make ([a-z-]+)", text, re.MULTILINE))
    assert {"repro", "test"} <= named and named <= targets


def test_every_module_that_is_run_exists(text: str) -> None:
    for module in set(re.findall(r"python -m (pipeline\.\w+)", text)):
        assert importlib.util.find_spec(module) is not None, module


def test_every_choice_is_one_of_the_configuration_or_shown_as_a_file(text: str) -> None:
    for group, names in re.findall(r"-S '?\+?(optimizer|benchmark|study)=\[?([a-z][\w,]*)", text):
        for name in names.split(","):
            file = Path("pipeline", "conf", group, f"{name}.yaml")
            assert (ROOT / file).is_file() or f"\n{name}:\n" in text, f"{group}={name}"


def test_every_file_that_is_linked_exists(text: str) -> None:
    for target in re.findall(r"\]\(([^)#\s]+)\)", text):
        if "://" not in target:
            assert (ROOT / target).exists(), target
