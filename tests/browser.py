"""Headless Chromium, for tests of pages: what is on them, what they say and ask for."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

WIDTHS = (1200, 420)
"""As wide as a laptop and as a telephone."""
# Chromium's own connections are none of the pages'.
SWITCHES = [
    *("--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-quic"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
    "--remote-debugging-pipe",
]


class Browser:
    """Chromium, spoken to over two pipes: messages in JSON, each ended by a zero byte."""

    def __init__(self, profile: Path) -> None:
        chromium = os.environ.get("CHROMIUM") or shutil.which("chromium")
        if not chromium:
            pytest.skip("needs chromium on the PATH, or the path of one in CHROMIUM")
        their_in, self.out = os.pipe()
        self.inn, their_out = os.pipe()

        def place() -> None:
            # Chromium reads from 3 and writes to 4; copies first, as either may be taken.
            a, b = os.dup(their_in), os.dup(their_out)
            os.dup2(a, 3)
            os.dup2(b, 4)

        self.process = subprocess.Popen(
            [chromium, *SWITCHES, f"--user-data-dir={profile}"],
            preexec_fn=place,
            close_fds=False,
            stderr=subprocess.DEVNULL,
        )
        os.close(their_in)
        os.close(their_out)
        self.rest, self.count = b"", 0
        self.events: list[dict[str, Any]] = []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self.session = None
        self.session = self.call("Target.attachToTarget", targetId=target, flatten=True)[
            "sessionId"
        ]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    session: str | None = None

    def read(self) -> dict[str, Any]:
        """Return the next message."""
        while b"\0" not in self.rest:
            part = os.read(self.inn, 1 << 16)
            assert part, "Chromium has ended"
            self.rest += part
        message, _, self.rest = self.rest.partition(b"\0")
        parsed: dict[str, Any] = json.loads(message)
        return parsed

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        """Call a method and return its result; events on the way are kept."""
        self.count += 1
        message: dict[str, Any] = {"id": self.count, "method": method, "params": params}
        if self.session:
            message["sessionId"] = self.session
        os.write(self.out, json.dumps(message).encode() + b"\0")
        while True:
            answer = self.read()
            if answer.get("id") == self.count:
                assert "error" not in answer, answer
                result: dict[str, Any] = answer["result"]
                return result
            self.events.append(answer)

    def open(self, url: str) -> None:
        """Open a page and wait until it is loaded."""
        self.events.clear()
        self.call("Page.navigate", url=url)
        while not any(e.get("method") == "Page.loadEventFired" for e in self.events):
            self.events.append(self.read())

    def resize(self, width: int) -> None:
        """Make the window so wide."""
        self.call(
            "Emulation.setDeviceMetricsOverride",
            width=width, height=900, deviceScaleFactor=1, mobile=False,
        )  # fmt: skip

    def overflow(self) -> str:
        """Say by how much the page is wider than the window, if it is."""
        wide, window = self.value(
            "[document.documentElement.scrollWidth, document.documentElement.clientWidth]"
        )
        return f"{wide} > {window}" if wide > window else ""

    def value(self, expression: str) -> Any:
        """Return what an expression gives on the page."""
        found = self.call("Runtime.evaluate", expression=expression, returnByValue=True)
        return found["result"].get("value")

    def close(self) -> None:
        """End the browser."""
        self.process.terminate()
        self.process.wait()
        os.close(self.out)
        os.close(self.inn)


def complaints(browser: Browser) -> Iterator[str]:
    """What the page said on its console, and what it asked of other servers."""
    for event in browser.events:
        kind, params = event.get("method"), event.get("params", {})
        if kind == "Runtime.exceptionThrown":
            yield json.dumps(params["exceptionDetails"])[:300]
        elif kind == "Runtime.consoleAPICalled" and params["type"] in ("error", "warning"):
            yield json.dumps(params["args"])[:300]
        elif kind == "Log.entryAdded" and params["entry"]["level"] in ("error", "warning"):
            yield json.dumps(params["entry"])[:300]
        elif kind == "Network.requestWillBeSent":
            url = params["request"]["url"]
            if not url.startswith(("file:", "data:", "blob:", "http://127.0.0.1:")):
                yield f"asked for {url}"
