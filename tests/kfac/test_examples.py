"""What the documentation shows runs: the code blocks of docs/library.md in order, and the scripts in examples/."""

import functools
import os
import re
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
GUIDE = ROOT / "docs" / "library.md"
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))


def blocks(text: str) -> list[tuple[int, str]]:
    """The Python blocks of a Markdown text, each with the number of its first line."""
    fenced = re.finditer(r"^```python\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    return [(text.count("\n", 0, match.start(1)) + 1, match.group(1)) for match in fenced]


def run(script: Path, *arguments: str) -> str:
    """A script's output, in a process of its own with one thread, from the repository's own `kfac`."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "error::UserWarning", str(script), *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, f"{script.name} {' '.join(arguments)}\n{done.stderr[-3000:]}"
    return done.stdout


def test_the_code_blocks_of_the_guide_run_in_order_without_a_warning(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    # What the guide claims of a compiled model holds for any backend; this one needs no C compiler and no minute.
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    found = blocks(GUIDE.read_text())
    assert len(found) > 10
    names: dict = {"__name__": "guide"}
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        warnings.simplefilter("error", UserWarning)
        warnings.filterwarnings("ignore", "KFAC: without a curvature block: 1.value")  # the guide announces this one
        torch.manual_seed(0)
        for line, code in found:
            # Empty lines before it, so that a traceback names the guide's own lines.
            exec(compile("\n" * (line - 1) + code, str(GUIDE), "exec"), names)


def test_links_of_the_guide_lead_somewhere():
    prose = re.sub(r"^```.*?^```$", "", GUIDE.read_text(), flags=re.DOTALL | re.MULTILINE)
    headings = re.findall(r"^#+ (.*)$", prose, re.MULTILINE)
    anchors = {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}
    links = re.findall(r"\]\(([^)]+)\)", prose)
    assert len(links) > 10
    for link in links:
        path, _, anchor = link.partition("#")
        assert (GUIDE.parent / path).exists() if path else anchor in anchors, link


def test_the_loop_in_the_readme_runs():
    (code,) = [code for _, code in blocks((ROOT / "README.md").read_text())]
    with torch.random.fork_rng(devices=[]):
        exec(compile(code, "README.md", "exec"), {})


@pytest.mark.parametrize("script", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_runs_at_small_size(script):
    assert "loss" in run(script, "--small")


@pytest.mark.slow
def test_the_classifier_resumes_to_the_same_numbers(tmp_path):
    straight = run(ROOT / "examples" / "classifier.py", "--steps", "6")
    run(ROOT / "examples" / "classifier.py", "--steps", "3", "--save", str(tmp_path / "run.pt"))
    resumed = run(ROOT / "examples" / "classifier.py", "--steps", "6", "--resume", str(tmp_path / "run.pt"))
    assert straight.splitlines()[-1] == resumed.splitlines()[-1]
