"""A headless Chromium driven through chromedriver's W3C WebDriver interface, plain JSON over HTTP."""

from __future__ import annotations

import base64
import contextlib
import json
import shutil
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
CHROMEDRIVER = shutil.which("chromedriver")
FLAGS = (
    "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--hide-scrollbars",
    "--disable-background-networking", "--disable-component-update", "--disable-sync", "--disable-dev-shm-usage",
)  # fmt: skip


class Browser:
    """One window, 1200 pixels wide unless told otherwise."""

    def __init__(self, session: str) -> None:
        self._session = session

    def open(self, path: Path) -> None:
        self._post("url", url=path.as_uri())

    def script(self, code: str, *arguments: Any) -> Any:
        """What a function with this body returns."""
        return self._post("execute/sync", script=code, args=list(arguments))

    def wait_for(self, code: str, timeout_s: float = 20.0) -> Any:
        """The first true value of an expression.

        Raises:
            TimeoutError: it stayed false.
        """
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            if value := self.script(f"return {code};"):
                return value
            time.sleep(0.05)
        raise TimeoutError(f"{code} stayed false for {timeout_s} s")

    def move(self, x: float, y: float) -> None:
        """The pointer, to a place in the window."""
        self._pointer({"type": "pointerMove", "duration": 50, "x": round(x), "y": round(y)})

    def drag(self, start: tuple[float, float], stop: tuple[float, float]) -> None:
        self._pointer(
            {"type": "pointerMove", "duration": 0, "x": round(start[0]), "y": round(start[1])},
            {"type": "pointerDown", "button": 0},
            {"type": "pointerMove", "duration": 200, "x": round(stop[0]), "y": round(stop[1])},
            {"type": "pointerUp", "button": 0},
        )

    def press(self, *keys: str) -> None:
        """Keys, one after another; they are WebDriver's codes or single characters."""
        actions = [{"type": kind, "value": key} for key in keys for kind in ("keyDown", "keyUp")]
        self._post("actions", actions=[{"type": "key", "id": "keys", "actions": actions}])

    def devtools(self, command: str, **parameters: Any) -> Any:
        """A command of Chromium's own protocol, such as Page.printToPDF."""
        return self._post("goog/cdp/execute", cmd=command, params=parameters)

    def log(self, kind: str) -> list[dict[str, Any]]:
        """Entries since the last call: "browser" is the console, "performance" holds the network's events."""
        entries: list[dict[str, Any]] = self._post("se/log", type=kind)
        return entries

    def screenshot(self) -> bytes:
        return base64.b64decode(_request("GET", f"{self._session}/screenshot"))

    def _pointer(self, *actions: dict[str, Any]) -> None:
        mouse = {"type": "pointer", "id": "mouse", "parameters": {"pointerType": "mouse"}, "actions": list(actions)}
        self._post("actions", actions=[mouse])

    def _post(self, command: str, **body: Any) -> Any:
        return _request("POST", f"{self._session}/{command}", body)


@contextlib.contextmanager
def open_browser(width: int = 1200, height: int = 900) -> Iterator[Browser]:
    """A browser of its own, closed afterwards."""
    assert CHROMIUM is not None
    assert CHROMEDRIVER is not None
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    driver = subprocess.Popen([CHROMEDRIVER, f"--port={port}", "--silent"])
    url = f"http://127.0.0.1:{port}"
    try:
        _wait_until_ready(url, driver)
        wishes = {
            "goog:chromeOptions": {"binary": CHROMIUM, "args": [*FLAGS, f"--window-size={width},{height}"]},
            "goog:loggingPrefs": {"browser": "ALL", "performance": "ALL"},
        }
        answer = _request("POST", f"{url}/session", {"capabilities": {"alwaysMatch": wishes}})
        session = f"{url}/session/{answer['sessionId']}"
        try:
            yield Browser(session)
        finally:
            _request("DELETE", session)
    finally:
        driver.terminate()
        driver.wait(timeout=30)


def _wait_until_ready(url: str, driver: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline and driver.poll() is None:
        with contextlib.suppress(OSError):
            if _request("GET", f"{url}/status")["ready"]:
                return
        time.sleep(0.1)
    raise RuntimeError("chromedriver didn't start")


def _request(method: str, url: str, body: dict[str, Any] | None = None) -> Any:
    data = json.dumps(body).encode() if body is not None else None
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"}, method=method)
    try:
        with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=60) as answer:
            return json.load(answer)["value"]
    except urllib.error.HTTPError as error:
        raise RuntimeError(f"{method} {url.rpartition('/')[2]}: {json.load(error)['value']['message']}") from error
