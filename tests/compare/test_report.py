"""Reports of comparisons in headless Chromium: all of them fits, can be read and can be sorted."""

from __future__ import annotations

import base64
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
from browser import WIDTHS, Browser, complaints
from typer.testing import CliRunner

from glazoo.compare.commands.compare import compare
from glazoo.compare.figures import ENOUGH, _cost, _line
from glazoo.plotting import Axes, panels


def accuracies(count: int) -> list[float]:
    return [0.5 + 0.01 * i for i in range(count)]


def test_few_seeds_are_dots_and_more_an_interval() -> None:
    few, enough = (_line("gla", [(4, accuracies(n)), (8, accuracies(n))]) for n in (2, ENOUGH))
    assert few.low is few.high is None
    assert list(few.dots) == [(4, 50), (4, 51), (8, 50), (8, 51)]
    assert enough.low is not None
    assert not enough.dots
    assert not _line("gla", [(4, [0.5])]).dots  # one seed is the line itself


def test_costs_have_an_interval_in_both_directions() -> None:
    class Row:
        label = "gla"
        results: Any

    def row(count: int) -> Any:
        made = Row()
        made.results = [
            {"accuracy": a, "tokens_per_second": 1000 * (i + 1)}
            for i, a in enumerate(accuracies(count))
        ]
        return made

    few, enough = _cost(row(3)), _cost(row(ENOUGH))
    assert list(few.dots) == [(1, 50), (2, 51), (3, 52)]
    assert enough.low is not None
    assert (enough.x_low, enough.x_high) == ([1], [ENOUGH])
    axes = [Axes("cost", "speed", "accuracy (%)", [line]) for line in (few, enough)]
    picture = panels(axes, kind="svg")
    assert picture.startswith(b"<?xml")
    # The same data gives the same file.
    assert picture == panels(axes, kind="svg")


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A report with all that one may have: a control, conversions, several rates, two states."""
    out = tmp_path_factory.mktemp("report")
    app = typer.Typer(pretty_exceptions_enable=False)
    app.command()(compare)
    options = (
        "--convert --task records --load 3 --length 24 --vocab 32 --steps 2 --further-steps 2 "
        "--batch 2 --width 16 --heads 2 --state 512 --state 1024 --jobs 2 --seeds 2 "
        "--rates 0.01,0.02 --plasticity-rate 1,10"
    )
    arguments = ["gated_deltanet", *options.split(), "--out", str(out)]
    done = CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return out / "report.html"


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    browser = Browser(tmp_path_factory.mktemp("profile"))
    yield browser
    browser.close()


TABLES = "[...document.querySelectorAll('table.table')]"


@pytest.mark.slow
def test_a_report_fits_is_silent_and_can_be_sorted(report: Path, browser: Browser) -> None:
    for width in WIDTHS:
        browser.resize(width)
        browser.open(report.as_uri())
        assert not browser.overflow()
        assert not list(complaints(browser))
        assert browser.value("[...document.images].every(x => x.naturalWidth > 0)")
        # The first two columns are in sight without scrolling: the name, and what it is about.
        right = "t.rows[1].cells[1].getBoundingClientRect().right"
        rights = browser.value(f"{TABLES}.map(t => {right})")
        assert len(rights) > 3
        assert max(rights) <= width
        # Numbers with their intervals stay in one line.
        style = "getComputedStyle(t.rows[1].cells[1]).whiteSpace"
        assert set(browser.value(f"{TABLES}.map(t => {style})")) == {"nowrap"}
    browser.resize(WIDTHS[0])
    whole = f"{TABLES}.map(t => t.offsetWidth <= t.parentElement.clientWidth)"
    assert all(browser.value(whole))

    heads = browser.value(f"{TABLES}.map(t => [...t.rows[0].cells].map(x => x.innerText))")
    assert [h[1] for h in heads[:2]] == [
        "difference to the source trained on (points)",
        "accuracy (%)",
    ]
    cells = f"[...{TABLES}[1].tBodies[0].rows].map(r => r.cells[1].innerText)"
    for order in (True, False):
        browser.value(f"{TABLES}[1].rows[0].cells[1].querySelector('button').click()")
        found = [float(x.split()[0]) for x in browser.value(cells)]
        assert len(found) == 6
        assert found == sorted(found, reverse=order)
    text = report.read_text("utf-8")
    pictures = re.findall(r'src="data:image/svg\+xml;base64,([^"]+)"', text)
    assert len(pictures) >= 4
    assert all(b"<svg" in base64.b64decode(p) for p in pictures)
