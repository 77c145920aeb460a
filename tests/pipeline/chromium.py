"""A page in headless Chromium, through chromedriver (the WebDriver protocol, JSON over HTTP on loopback)."""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

BROWSER, DRIVER = (shutil.which(name) for name in ("chromium", "chromedriver"))
MISSING = "" if BROWSER and DRIVER else "needs chromium and chromedriver on the PATH"
_FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync", "--hide-scrollbars", "--force-color-profile=srgb",
)  # fmt: skip


class Page:
    """An open page: `run` a script in it, read what the browser's `console` said, take a `screenshot`."""

    def __init__(self, session: str) -> None:
        self._session = session

    def open(self, address: str) -> None:
        _ask(f"{self._session}/url", {"url": address})

    def run(self, script: str) -> Any:
        return _ask(f"{self._session}/execute/sync", {"script": script, "args": []})

    def wait(self, condition: str, seconds: float = 60) -> None:
        """Until the JavaScript expression is true."""
        end = time.monotonic() + seconds
        while not self.run(f"return Boolean({condition})"):
            assert time.monotonic() < end, f"never true within {seconds} s: {condition}"
            time.sleep(0.1)

    def console(self) -> list[str]:
        """Errors and warnings since the last call."""
        said = _ask(f"{self._session}/se/log", {"type": "browser"})
        return [entry["message"] for entry in said if entry["level"] in ("SEVERE", "WARNING")]

    def screenshot(self, path: Path) -> None:
        import base64

        path.write_bytes(base64.b64decode(_ask(f"{self._session}/screenshot")))


@contextmanager
def page(folder: Path, width: int, height: int = 900, dark: bool = False) -> Iterator[Page]:
    """A window of this size [CSS pixels]; `folder` is for the browser's own files."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    base = f"http://127.0.0.1:{port}"
    driver = subprocess.Popen([str(DRIVER), f"--port={port}"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        _until_up(base, driver)
        options = {
            "binary": BROWSER,
            "args": [*_FLAGS, f"--user-data-dir={folder}"],
            "mobileEmulation": {"deviceMetrics": {"width": width, "height": height, "pixelRatio": 1, "mobile": False}},
        }
        wanted = {"goog:chromeOptions": options, "goog:loggingPrefs": {"browser": "ALL"}}
        session = f"{base}/session/{_ask(f'{base}/session', {'capabilities': {'alwaysMatch': wanted}})['sessionId']}"
        scheme = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
        media = {"cmd": "Emulation.setEmulatedMedia", "params": {"features": scheme}}
        try:
            _ask(f"{session}/goog/cdp/execute", media)
            yield Page(session)
        finally:
            urllib.request.urlopen(urllib.request.Request(session, method="DELETE"), timeout=60).close()
    finally:
        driver.terminate()
        driver.wait(30)


def _until_up(base: str, driver: subprocess.Popen[bytes]) -> None:
    end = time.monotonic() + 60
    while True:
        assert driver.poll() is None and time.monotonic() < end, "chromedriver did not start"
        try:
            if _ask(f"{base}/status")["ready"]:
                return
        except OSError:
            time.sleep(0.1)


def _ask(address: str, question: dict[str, Any] | None = None) -> Any:
    data = None if question is None else json.dumps(question).encode()
    request = urllib.request.Request(address, data, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=120) as answer:
        return json.load(answer)["value"]
