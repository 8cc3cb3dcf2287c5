"""A real browser for tests of pages, spoken to by the WebDriver protocol."""

from __future__ import annotations

import base64
import json
import shutil
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ARGUMENTS = (
    *("headless", "no-sandbox", "disable-gpu", "disable-quic", "no-first-run"),
    *("disable-background-networking", "disable-component-update", "disable-sync"),
    "disable-dev-shm-usage",
)
SECONDS = 120.0
"""How long anything may take: the machine may be busy."""


def missing() -> str:
    """Which program is not on this machine; empty where all are."""
    wanted = ("chromium", "chromedriver")
    return ", ".join(name for name in wanted if shutil.which(name) is None)


class Browser:
    """A window of a certain width."""

    def __init__(self, address: str) -> None:
        self.address = address

    def __call__(self, command: str, **values: Any) -> Any:
        """Send a command of the session; what it answers."""
        return _post(f"{self.address}/{command}", values)

    def open(self, page: Path) -> None:
        self("url", url=page.as_uri())

    def value(self, script: str) -> Any:
        """What JavaScript returns."""
        return self("execute/sync", script=script, args=[])

    def wait(self, condition: str) -> None:
        """Until JavaScript gives true."""
        end = time.monotonic() + SECONDS
        while not self.value(f"return Boolean({condition})"):
            assert time.monotonic() < end, f"{condition} did not come true"
            time.sleep(0.1)

    def complaints(self) -> list[str]:
        """Warnings and errors in the console since the last call."""
        found = self("se/log", type="browser")
        return [f"{one['level']} {one['message']}" for one in found if one["level"] != "INFO"]

    def pdf(self) -> bytes:
        return base64.b64decode(self("print", background=True))


@contextmanager
def browser(profile: Path, width: int, height: int = 900) -> Iterator[Browser]:
    """A browser with an empty profile.

    Args:
        profile: an empty folder.
        width: of the window, in CSS pixels.
        height: of the same.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    driver = subprocess.Popen(
        ["chromedriver", f"--port={port}"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    base = f"http://127.0.0.1:{port}/session"
    try:
        metrics = {"width": width, "height": height, "pixelRatio": 1.0, "touch": width < 600}
        chrome = {
            "args": [*ARGUMENTS, f"user-data-dir={profile}"],
            "binary": shutil.which("chromium"),
            "mobileEmulation": {"deviceMetrics": metrics},
        }
        wanted = {"goog:chromeOptions": chrome, "goog:loggingPrefs": {"browser": "ALL"}}
        session = _begin(base, {"capabilities": {"alwaysMatch": wanted}})
        address = f"{base}/{session['sessionId']}"
        try:
            yield Browser(address)
        finally:
            urllib.request.urlopen(
                urllib.request.Request(address, method="DELETE"), timeout=SECONDS
            ).close()
    finally:
        driver.terminate()
        driver.wait()


def _begin(address: str, values: dict[str, Any]) -> Any:
    """A session, once the driver listens."""
    end = time.monotonic() + SECONDS
    while True:
        try:
            return _post(address, values)
        except urllib.error.HTTPError as error:
            raise AssertionError(error.read().decode()) from error
        except urllib.error.URLError:
            assert time.monotonic() < end
            time.sleep(0.1)


def _post(address: str, values: dict[str, Any]) -> Any:
    body = json.dumps(values).encode()
    request = urllib.request.Request(address, body, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=SECONDS) as answer:
        return json.load(answer)["value"]
