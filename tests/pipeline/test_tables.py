"""The comparison as text: numbers, and the table for a paper."""

from __future__ import annotations

from pathlib import Path

import pytest
import synthetic_records as synthetic

from pipeline import aggregate, tables


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, tables.DASH),
        (float("inf"), tables.DASH),
        (0.0, "0"),
        (0.30123, "0.301"),
        (12.34, "12.3"),
        (1234.5, "1234"),
        (0.00123, "0.00123"),
        (0.000123, "1.2e-04"),
        (-2.5, "-2.50"),
    ],
)
def test_numbers_keep_three_digits(value: float | None, text: str) -> None:
    assert tables.number(value) == text


def test_the_latex_table_has_a_line_a_pair_escaped_with_the_best_in_bold(tmp_path: Path) -> None:
    chosen = synthetic.params(("toy_mlp", "digits_cnn"), ("sgd", "kfac"))
    lost = tuple(("toy_mlp", "sgd", seed) for seed in synthetic.SEEDS)
    results = synthetic.write_study(tmp_path, chosen, diverged=(*lost, ("digits_cnn", "kfac", 2)))
    rows = aggregate.tabulate(aggregate.collect(chosen, results))
    lines = tables.latex(rows).splitlines()
    body = [line for line in lines if line.endswith(r"\\")][1:]
    assert [line.split(" & ")[0].strip() for line in body] == [r"toy\_mlp", "", r"digits\_cnn", ""]
    assert all(line.count("&") == 5 for line in body)
    assert "diverged" in body[0] and r"\textbf" not in body[0]
    assert r"$\infty$" in body[3] and body[3].count(r"\textbf") == 2
    assert lines[1].startswith(r"\begin{tabular}") and lines[-1] == r"\end{tabular}"
    assert lines.count(r"\midrule") == 2
