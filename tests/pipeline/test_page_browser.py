"""The page in a browser: it draws, sorts, switches its theme and says nothing on the console, wide and narrow."""

from __future__ import annotations

from pathlib import Path

import chromium
import pytest
import synthetic_records as synthetic

from pipeline import aggregate

pytestmark = [pytest.mark.slow, pytest.mark.skipif(bool(chromium.MISSING), reason=chromium.MISSING)]

EMPTY = """[...document.querySelectorAll("[data-chart]")].filter(
    (place) => place.dataset.drawn && !place.querySelector(".main-svg .trace, .main-svg .bars .point"))"""


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("study")
    chosen = synthetic.params()
    synthetic.write_study(folder / "results", chosen, diverged=(("toy_mlp", "kfac", 2),))
    aggregate.aggregate(chosen, folder / "results", folder / "report")
    return f"file://{folder / 'report' / 'index.html'}"


@pytest.mark.parametrize(("width", "dark"), [(1400, False), (390, True)])
def test_every_chart_is_drawn_within_the_width_and_the_console_is_silent(
    tmp_path: Path, address: str, width: int, dark: bool
) -> None:
    with chromium.page(tmp_path / "browser", width, dark=dark) as page:
        page.open(address)
        assert page.run("return innerWidth") == width
        assert page.run("return dark()") is dark
        page.run("for (const block of document.querySelectorAll('details')) block.open = true")
        count = page.run("return document.querySelectorAll('[data-chart]').length")
        assert count > 4 * 6
        for place in range(count):
            page.run(f"document.querySelectorAll('[data-chart]')[{place}].scrollIntoView()")
            page.wait(f"document.querySelectorAll('[data-chart]')[{place}].dataset.drawn")
        assert page.run(f"return {EMPTY}.map((place) => place.dataset.chart)") == []
        assert page.run("return document.documentElement.scrollWidth") <= width
        widths = "[...document.querySelectorAll('.main-svg')].map((svg) => svg.getBoundingClientRect().width)"
        assert max(page.run(f"return {widths}")) <= width
        assert page.console() == []


def test_charts_out_of_sight_are_not_drawn(tmp_path: Path, address: str) -> None:
    with chromium.page(tmp_path / "browser", 1400) as page:
        page.open(address)
        page.run("document.querySelector('[data-chart]').scrollIntoView()")
        page.wait("document.querySelectorAll('[data-drawn]').length > 0")
        assert (
            page.run("return document.querySelector('[data-chart=digits_cnn-loss-steps]').dataset.drawn ?? null")
            is None
        )
        page.run("location.hash = 'digits_cnn'")  # opens it
        page.wait("document.querySelector('[data-chart=digits_cnn-loss-steps]').dataset.drawn")


def test_the_theme_switch_sorting_and_the_choice_of_optimizers_work(tmp_path: Path, address: str) -> None:
    with chromium.page(tmp_path / "browser", 1400) as page:
        page.open(address)
        ground = "return getComputedStyle(document.body).backgroundColor"
        light = page.run(ground)
        page.run("document.getElementById('theme').click()")
        assert page.run(ground) != light

        page.run("document.querySelector('.matrix thead th:nth-child(2)').click()")
        rows = "[...document.querySelector('.matrix').tBodies[0].rows]"
        column = f"return {rows}.map((row) => row.cells[1].dataset.sort)"
        up = [float(value) for value in page.run(column)]
        page.run("document.querySelector('.matrix thead th:nth-child(2)').click()")
        assert up == sorted(up) and len(set(up)) > 1
        assert [float(value) for value in page.run(column)] == up[::-1]

        chart = "document.querySelector('[data-chart=toy_linear-loss-steps]')"
        page.run(f"{chart}.scrollIntoView()")
        page.wait(f"{chart}.dataset.drawn")
        before = page.run(f"return {chart}.data.length")
        page.run("document.querySelector('.chip[data-optimizer=kfac]').click()")
        page.wait(f"{chart}.data.length < {before}")
        assert page.run(f"return {chart}.data.some((trace) => trace.legendgroup === 'kfac')") is False
        assert page.console() == []
