"""Every page of the built site in headless Chromium, as wide as a laptop and as a telephone."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from browser import WIDTHS, Browser, complaints

ROOT = Path(__file__).parents[2]
SITE = ROOT / "build" / "docs" / "site"
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    browser = Browser(tmp_path_factory.mktemp("profile"))
    yield browser
    browser.close()


@pytest.fixture(scope="module")
def pages() -> list[Path]:
    """The built site, for one test: another process would build it at the same time."""
    made = subprocess.run(["make", "docs"], cwd=ROOT, capture_output=True, text=True)
    assert made.returncode == 0, made.stdout + made.stderr
    return sorted(SITE.rglob("*.html"))


def test_pages_fit_load_nothing_from_elsewhere_and_are_silent(
    browser: Browser, pages: list[Path], server: str
) -> None:
    wrong = []
    for width in WIDTHS:
        browser.resize(width)
        for page in pages:
            where = page.relative_to(SITE).as_posix()
            browser.open(f"{server}/{where}")
            if over := browser.overflow():
                wrong.append(f"{where} at {width}: {over}")
            wrong += [f"{where} at {width}: {x}" for x in complaints(browser)]
    assert not wrong, "\n".join(wrong)
    browser.open(f"{server}/variants/gated_deltanet.html")
    drawn = "[...document.querySelectorAll('.formulas math')].map(x => x.getBoundingClientRect())"
    assert browser.value(f"{drawn}.filter(x => x.width > 50 && x.height > 20).length") >= 1
    browser.open(f"{server}/explore.html")
    assert browser.value("glazooExplore.result().runs.length") == 2
    assert browser.value("document.querySelectorAll('.gx canvas').length") >= 4
    assert "Kimi Delta Attention" in (SITE / "search.json").read_text("utf-8")


def test_what_is_wrong_with_a_page_is_seen(browser: Browser) -> None:
    wide = "<div style='width: 5000px'>.</div><script>console.error('no')</script>"
    browser.open(f"data:text/html,{wide}<img src='http://127.0.0.2:9/a.png'>")
    assert browser.value("document.documentElement.scrollWidth") >= 5000
    found = "\n".join(complaints(browser))
    assert "asked for http://127.0.0.2:9/a.png" in found
    assert '"no"' in found


@pytest.fixture(scope="module")
def server(pages: list[Path]) -> Iterator[str]:
    command = [sys.executable, "-u", "-m", "http.server", "0", "--bind", "127.0.0.1"]
    process = subprocess.Popen(
        command, cwd=SITE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    assert process.stdout is not None
    port = process.stdout.readline().split(" port ")[1].split()[0]
    yield f"http://127.0.0.1:{port}"
    process.terminate()
    process.wait()
    process.stdout.close()
