"""The pictures: which there are, that they are reproducible, and that they show every seed."""

from __future__ import annotations

from pathlib import Path

import pytest
import synthetic_records as synthetic
from matplotlib.colors import to_hex

from pipeline import aggregate, figures, looks, statistics, verdicts
from pipeline.curves import Study
from pipeline.evidence import Evidence

PAIR = ("sgd", "kfac")


def study(folder: Path, *, benchmarks: tuple[str, ...] = ("digits_cnn",), **how: object) -> Study:
    chosen = synthetic.params(benchmarks, PAIR)
    return aggregate.collect(chosen, synthetic.write_study(folder, chosen, **how))  # type: ignore[arg-type]


def drawn(records: Study, folder: Path, evidence: Evidence | None = None) -> list[Path]:
    chosen = synthetic.params(tuple(records), PAIR)
    return figures.draw(records, folder, verdicts.judge(records, chosen), evidence or Evidence())


def test_a_figure_a_benchmark_and_five_for_the_study(tmp_path: Path) -> None:
    made = drawn(study(tmp_path, benchmarks=("toy_mlp", "digits_cnn")), tmp_path / "figures")
    assert {path.name for path in made} == {
        "summary.svg",
        "loss_toy_mlp.svg",
        "loss_digits_cnn.svg",
        "step_cost.svg",
        "curvature.svg",
        "profiles.svg",
        "speedups.svg",
    }
    assert all(path.stat().st_size > 1000 for path in made)


def test_the_same_records_give_the_same_bytes_without_a_date(tmp_path: Path) -> None:
    records = study(tmp_path)
    first, second = (drawn(records, tmp_path / name) for name in ("first", "second"))
    for one, other in zip(first, second, strict=True):
        assert one.read_bytes() == other.read_bytes()
        assert "<dc:date>" not in one.read_text(encoding="utf-8")


def test_no_curvature_figure_without_diagnostics(tmp_path: Path) -> None:
    records = study(tmp_path, curvature=False)
    assert figures.curvature(records) is None
    assert "curvature.svg" not in {path.name for path in drawn(records, tmp_path / "figures")}


def test_every_seed_is_drawn_on_both_clocks_with_its_median_and_target(tmp_path: Path) -> None:
    figure = figures.loss("digits_cnn", study(tmp_path)["digits_cnn"])
    for axis in figure.axes:
        for optimizer in PAIR:
            own = [line for line in axis.lines if line.get_color() == looks.on_light(optimizer)]
            curves = [line for line in own if line.get_linestyle() == "-"]
            assert len(curves) == len(synthetic.SEEDS) + 1
            assert len({line.get_linewidth() for line in curves}) == 2
        for target in (0.2, 0.05):
            assert any(set(line.get_ydata()) == {target} for line in axis.lines)
        assert axis.get_yscale() == "log"


def test_more_than_five_seeds_are_a_band_around_their_median(tmp_path: Path) -> None:
    chosen = synthetic.params(("digits_cnn",), PAIR, tuple(range(6)))
    records = aggregate.collect(chosen, synthetic.write_study(tmp_path, chosen))
    for axis in figures.loss("digits_cnn", records["digits_cnn"]).axes:
        for optimizer in PAIR:
            own = [line for line in axis.lines if line.get_color() == looks.on_light(optimizer)]
            assert len(own) == 1
            band = next(b for b in axis.collections if to_hex(b.get_facecolor()[0][:3]) == looks.on_light(optimizer))
            (x, y), corners = own[0].get_xydata()[3], band.get_paths()[0].vertices
            low, *_, high = sorted(height for place, height in corners if place == pytest.approx(x))
            assert low < y < high


def test_runs_that_do_not_finish_are_shown_and_explained(tmp_path: Path) -> None:
    lost = tuple(("digits_cnn", "kfac", seed) for seed in synthetic.SEEDS)
    records = study(tmp_path, diverged=lost)
    for figure in (figures.summary(records), figures.loss("digits_cnn", records["digits_cnn"])):
        crosses = [line for line in figure.axes[0].lines if line.get_marker() == "x"]
        assert len(crosses) == len(lost)
        assert "diverged or failed" in [text.get_text() for text in figure.legends[0].get_texts()]


@pytest.mark.parametrize(
    ("low", "high"), [(0.26, 0.7), (98, 151), (0.97, 1.06), (1e-4, 20), (1e-12, 1e3), (30, 400), (0.6999, 0.7001)]
)
def test_a_log_axis_has_a_few_labels_within_its_limits(low: float, high: float) -> None:
    ticks = looks.ticks(low, high)
    assert 2 <= len(ticks) <= 8
    assert all(low <= tick <= high for tick in ticks)


def test_the_phases_of_a_step_add_up_to_its_cost(tmp_path: Path) -> None:
    records = study(tmp_path)
    axis = figures.step_cost(records).axes[0]
    for place, optimizer in enumerate(PAIR):
        runs = records["digits_cnn"][optimizer]
        cost = statistics.pair([run.summary for run in runs], 200)["milliseconds_per_step_median"]
        bars = [bar for bar in axis.patches if abs(bar.get_y() + bar.get_height() / 2 - place) < 0.1]
        assert sum(bar.get_width() for bar in bars) == pytest.approx(cost)


def test_a_benchmark_whose_target_nobody_reached_is_drawn(tmp_path: Path) -> None:
    lost = tuple(("digits_cnn", name, seed) for name in PAIR for seed in synthetic.SEEDS)
    steps, seconds = figures.summary(study(tmp_path, diverged=lost)).axes
    assert len(steps.lines) == len(seconds.lines) == len(lost)
