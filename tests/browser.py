"""A headless Chromium driven through chromedriver by the W3C WebDriver protocol, with the standard library alone."""

from __future__ import annotations

import base64
import json
import os
import shutil
import socket
import subprocess
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

ELEMENT = "element-6066-11e4-a52e-4f735466cecf"
ARGUMENTS = [
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-dev-shm-usage",
    "--disable-background-networking", "--disable-component-update", "--disable-sync", "--hide-scrollbars",
]  # fmt: skip


def missing() -> str:
    """What is not installed, or ""."""
    absent = [name for name in ("chromium", "chromedriver") if shutil.which(name) is None]
    return f"{' and '.join(absent)} not installed" if absent else ""


class Browser:
    """One window; use as a context manager."""

    def __init__(
        self, width: int = 1500, height: int = 1000, dark: bool = False, downloads: Path | None = None
    ) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.driver = subprocess.Popen(
            ["chromedriver", f"--port={self.port}"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        arguments = [*ARGUMENTS, f"--window-size={width},{height}"]
        arguments += ["--blink-settings=preferredColorScheme=0"] if dark else []
        options: dict[str, Any] = {"binary": shutil.which("chromium"), "args": arguments}
        if downloads is not None:
            options["prefs"] = {"download.default_directory": str(downloads), "download.prompt_for_download": False}
        wanted = {"browserName": "chrome", "goog:chromeOptions": options, "goog:loggingPrefs": {"browser": "ALL"}}
        self.session = ""
        try:
            self._wait_for_driver()
            made = self._call("POST", "/session", {"capabilities": {"alwaysMatch": wanted}})
            self.session = f"/session/{made['sessionId']}"
        except BaseException:
            self.driver.kill()
            raise

    def __enter__(self) -> Browser:
        return self

    def __exit__(self, *_: object) -> None:
        try:
            self._call("DELETE", self.session)
        finally:
            self.driver.terminate()
            self.driver.wait(10)

    def _wait_for_driver(self) -> None:
        for _ in range(100):
            try:
                if self._call("GET", "/status")["ready"]:
                    return
            except (urllib.error.URLError, ConnectionError):
                time.sleep(0.1)
        raise RuntimeError("chromedriver does not answer")

    def _call(self, how: str, path: str, body: dict | None = None) -> Any:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(f"http://127.0.0.1:{self.port}{path}", data, method=how)
        request.add_header("Content-Type", "application/json")
        try:
            with urllib.request.urlopen(request, timeout=120) as answer:
                return json.load(answer)["value"]
        except urllib.error.HTTPError as error:
            raise RuntimeError(json.load(error)["value"]["message"]) from None

    def open(self, page: Path) -> None:
        """Load a file."""
        self._call("POST", f"{self.session}/url", {"url": page.resolve().as_uri()})

    def run(self, script: str, *arguments: Any) -> Any:
        """The value a script returns; ``arguments[0]``, ... are given to it."""
        return self._call("POST", f"{self.session}/execute/sync", {"script": script, "args": list(arguments)})

    def wait(self, condition: str, seconds: float = 15.0) -> Any:
        """Run ``return CONDITION`` until it is true; its value. AssertionError when it never is."""
        end = time.monotonic() + seconds
        while True:
            value = self.run(f"return {condition}")
            if value:
                return value
            assert time.monotonic() < end, f"never true: {condition}"
            time.sleep(0.1)

    def ready(self) -> float:
        """Wait for the report; milliseconds from the start of the load until it was drawn."""
        return float(self.wait("document.documentElement.dataset.ready", 60))

    def errors(self) -> list[str]:
        """Errors and warnings of the console since the last call."""
        entries = self._call("POST", f"{self.session}/se/log", {"type": "browser"})
        return [entry["message"] for entry in entries if entry["level"] in ("SEVERE", "WARNING")]

    def click(self, selector: str) -> None:
        """Click an element as a user does."""
        found = self._call("POST", f"{self.session}/element", {"using": "css selector", "value": selector})
        self._call("POST", f"{self.session}/element/{found[ELEMENT]}/click", {})

    def pointer(self, *steps: tuple[str, float, float] | tuple[str]) -> None:
        """Mouse actions at window coordinates: ("move", x, y), ("down",), ("up",)."""
        actions: list[dict[str, Any]] = []
        for kind, *at in steps:
            if kind == "move":
                x, y = (int(round(value)) for value in at)
                actions.append({"type": "pointerMove", "duration": 60, "x": x, "y": y, "origin": "viewport"})
            else:
                actions.append({"type": f"pointer{kind.capitalize()}", "button": 0})
        source = {"type": "pointer", "id": "mouse", "parameters": {"pointerType": "mouse"}, "actions": actions}
        self._call("POST", f"{self.session}/actions", {"actions": [source]})

    def keys(self, text: str) -> None:
        """Type on the keyboard."""
        actions = [{"type": kind, "value": key} for key in text for kind in ("keyDown", "keyUp")]
        self._call("POST", f"{self.session}/actions", {"actions": [{"type": "key", "id": "keys", "actions": actions}]})

    def cpu(self) -> float:
        """CPU seconds that the browser's processes have taken so far (Linux)."""
        parents, used = {}, {}
        for entry in Path("/proc").glob("[0-9]*/stat"):
            try:
                parts = entry.read_text().rpartition(")")[2].split()
            except OSError:
                continue
            parents[int(entry.parent.name)] = int(parts[1])
            used[int(entry.parent.name)] = sum(map(int, parts[11:13])) / os.sysconf("SC_CLK_TCK")
        below = {self.driver.pid}
        for _ in range(8):  # generations
            below |= {pid for pid, parent in parents.items() if parent in below}
        return sum(used[pid] for pid in below - {self.driver.pid} if pid in used)

    def screenshot(self, path: Path) -> None:
        """The window as PNG."""
        path.write_bytes(base64.b64decode(self._call("GET", f"{self.session}/screenshot")))
