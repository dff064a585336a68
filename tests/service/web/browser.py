"""A headless Chromium driven through its DevTools protocol.

with open_browser(tmp_path) as page:
    page.open(url)
    page.wait_for("document.title === 'done'")
"""

import base64
import contextlib
import json
import os
import shutil
import signal
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from websockets.sync.client import ClientConnection, connect

_FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--remote-debugging-port=0",
    "--window-size=1280,1400",
)
_KEY_CODES = {"ArrowLeft": 37, "ArrowUp": 38, "ArrowRight": 39, "ArrowDown": 40, "Tab": 9}


class Page:
    """A tab, and what happened in it."""

    def __init__(self, connection: ClientConnection) -> None:
        self._connection = connection
        self._last_id = 0
        self.complaints: list[str] = []
        self.requests: list[str] = []
        for domain in ("Page", "Runtime", "Network", "Log", "DOM"):
            self.call(f"{domain}.enable")

    def call(self, method: str, seconds: float = 30.0, **parameters: Any) -> dict[str, Any]:
        """A command's result; events that come meanwhile are noted."""
        self._last_id += 1
        command = {"id": self._last_id, "method": method, "params": parameters}
        self._connection.send(json.dumps(command))
        deadline = time.monotonic() + seconds
        while True:
            message = json.loads(self._connection.recv(max(0.0, deadline - time.monotonic())))
            if message.get("id") == self._last_id:
                assert "error" not in message, f"{method}: {message['error']}"
                result: dict[str, Any] = message["result"]
                return result
            self._note(message)

    def _note(self, event: dict[str, Any]) -> None:
        method, parameters = event.get("method"), event.get("params", {})
        if method == "Network.requestWillBeSent":
            self.requests.append(parameters["request"]["url"])
        elif method == "Runtime.exceptionThrown":
            details = parameters["exceptionDetails"]
            thrown = details.get("exception", {}).get("description", "")
            self.complaints.append(f"{details['text']} {thrown}")
        elif method == "Runtime.consoleAPICalled" and parameters["type"] in ("error", "warning"):
            self.complaints.append(str([item.get("value") for item in parameters["args"]]))
        elif method == "Log.entryAdded" and parameters["entry"]["level"] in ("error", "warning"):
            entry = parameters["entry"]
            self.complaints.append(f"{entry['text']} {entry.get('url', '')}")

    def open(self, url: str) -> None:
        """Load a page; what happened in the last one is forgotten."""
        self.call("Page.navigate", url="about:blank")
        self.complaints.clear()
        self.requests.clear()
        self.call("Page.navigate", url=url)
        self.wait_for(f"document.readyState === 'complete' && location.href === {json.dumps(url)}")

    def evaluate(self, expression: str) -> Any:
        """The value of a JavaScript expression, awaited if it is a promise."""
        result = self.call(
            "Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True
        )
        assert "exceptionDetails" not in result, result["exceptionDetails"]
        return result["result"].get("value")

    def wait_for(self, condition: str, seconds: float = 30.0) -> None:
        """Return once a JavaScript expression is true."""
        deadline = time.monotonic() + seconds
        while not self.evaluate(f"Boolean({condition})"):
            assert time.monotonic() < deadline, f"not true in time: {condition}; {self.complaints}"
            time.sleep(0.05)

    def text(self, selector: str) -> str:
        """What an element says."""
        text: str = self.evaluate(f"document.querySelector({json.dumps(selector)}).textContent")
        return text

    def choose_file(self, selector: str, path: Path) -> None:
        """Choose a file in a file input."""
        expression = f"document.querySelector({json.dumps(selector)})"
        chosen = self.call("Runtime.evaluate", expression=expression)["result"]["objectId"]
        self.call("DOM.setFileInputFiles", files=[str(path)], objectId=chosen)

    def choose_option(self, selector: str, value: str) -> None:
        """Choose an option of a select."""
        self.evaluate(
            f"(() => {{ const choice = document.querySelector({json.dumps(selector)});"
            f"choice.value = {json.dumps(value)};"
            "choice.dispatchEvent(new Event('change', {bubbles: true})); })()"
        )

    def click(self, selector: str, x: float = 0.5, y: float = 0.5) -> None:
        """Press and release the mouse at a place of an element, given as fractions of it."""
        left, top = self._place(selector, x, y)
        for kind in ("mouseMoved", "mousePressed", "mouseReleased"):
            self.call(
                "Input.dispatchMouseEvent",
                type=kind,
                x=left,
                y=top,
                button="none" if kind == "mouseMoved" else "left",
                clickCount=0 if kind == "mouseMoved" else 1,
            )

    def hover(self, selector: str, x: float = 0.5, y: float = 0.5) -> None:
        """Move the mouse to a place of an element, given as fractions of it."""
        left, top = self._place(selector, x, y)
        self.call("Input.dispatchMouseEvent", type="mouseMoved", x=left, y=top)

    def _place(self, selector: str, x: float, y: float) -> tuple[float, float]:
        left, top = self.evaluate(
            f"(() => {{ const element = document.querySelector({json.dumps(selector)});"
            "element.scrollIntoView({block: 'nearest'});"
            "const box = element.getBoundingClientRect();"
            f"return [box.left + {x} * box.width, box.top + {y} * box.height]; }})()"
        )
        return left, top

    def press(self, key: str) -> None:
        """Press and release a key."""
        for kind in ("keyDown", "keyUp"):
            self.call(
                "Input.dispatchKeyEvent",
                type=kind,
                key=key,
                code=key,
                windowsVirtualKeyCode=_KEY_CODES[key],
            )

    def resize(self, width: int, height: int, scale: float = 1.0) -> None:
        """Give the tab another size in CSS pixels."""
        self.call(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=scale,
            mobile=False,
        )

    def screenshot(self, path: Path, *, whole_page: bool = True) -> None:
        """Save what the tab shows as PNG."""
        data = self.call("Page.captureScreenshot", captureBeyondViewport=whole_page)["data"]
        path.write_bytes(base64.b64decode(data))

    def foreign_requests(self, url: str) -> list[str]:
        """Addresses asked for that are not of the origin of `url`."""
        own = urlsplit(url).netloc
        fetched = (urlsplit(request) for request in self.requests)
        return [
            parts.geturl()
            for parts in fetched
            if parts.scheme not in ("about", "blob", "data") and parts.netloc != own
        ]


@contextlib.contextmanager
def open_browser(profile: Path) -> Iterator[Page]:
    """A tab of a Chromium with a new profile; skips the test, and says so, where there is none."""
    program = shutil.which("chromium") or shutil.which("google-chrome")
    if program is None:
        pytest.skip("no chromium: install it (Debian package chromium) to test the pages")
    with (profile.parent / "chromium.log").open("w") as log:
        process = subprocess.Popen(
            [program, *_FLAGS, f"--user-data-dir={profile}", "about:blank"],
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    try:
        address = f"http://127.0.0.1:{_debugging_port(profile, process)}/json/list"
        with urllib.request.urlopen(address) as answer:
            tabs = [tab for tab in json.load(answer) if tab["type"] == "page"]
        with connect(tabs[0]["webSocketDebuggerUrl"], max_size=None) as connection:
            yield Page(connection)
    finally:
        os.killpg(process.pid, signal.SIGKILL)  # its helpers too
        process.wait()


def _debugging_port(profile: Path, process: subprocess.Popen[bytes]) -> int:
    file = profile / "DevToolsActivePort"
    deadline = time.monotonic() + 30
    while not (file.is_file() and file.read_text().strip()):
        log = (profile.parent / "chromium.log").read_text
        assert process.poll() is None, log()
        assert time.monotonic() < deadline, log()
        time.sleep(0.05)
    return int(file.read_text().split()[0])
