"""A real Chromium without a window, driven over the DevTools protocol."""

import json
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

import httpx
from websockets.sync.client import connect

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")

MIDDLE_AT_REST = """async (element) => {
  element.scrollIntoView({block: "center", behavior: "instant"});
  for (let before = null; ; ) {
    const box = element.getBoundingClientRect();
    const middle = [box.x + box.width / 2, box.y + box.height / 2];
    if (before && before[0] == middle[0] && before[1] == middle[1]) return middle;
    before = middle;
    await new Promise((resolve) => setTimeout(resolve, 100));
  }
}"""


class Browser:
    """One page; every address it asked for is in `requested`, and what its console complained of in `complaints`."""

    def __init__(self, folder: Path) -> None:
        assert CHROMIUM is not None
        options = ["--headless=new", "--no-sandbox", "--disable-gpu", "--remote-debugging-port=0"]
        options += ["--no-first-run", "--disable-background-networking", "--disable-component-update"]
        self._process = subprocess.Popen(
            [CHROMIUM, *options, f"--user-data-dir={folder}", "about:blank"],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        port_file = folder / "DevToolsActivePort"
        _wait(lambda: port_file.exists() and port_file.read_text().count("\n") > 0, "Chromium does not start", 60)
        port = port_file.read_text().split("\n")[0]
        [page] = [t for t in httpx.get(f"http://127.0.0.1:{port}/json").json() if t["type"] == "page"]
        self._socket = connect(page["webSocketDebuggerUrl"], max_size=None)
        self._calls = 0
        self.requested: list[str] = []
        self.complaints: list[str] = []
        for domain in ("Page", "Runtime", "Network", "Log"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """One call of the protocol; events that come before its answer are noted."""
        self._calls += 1
        self._socket.send(json.dumps({"id": self._calls, "method": method, "params": parameters}))
        while True:
            message = json.loads(self._socket.recv(timeout=60))
            if message.get("id") == self._calls:
                assert "error" not in message, message
                return message["result"]
            self._note(message.get("method"), message.get("params", {}))

    def _note(self, event: str | None, parameters: dict[str, Any]) -> None:
        if event == "Network.requestWillBeSent":
            self.requested.append(parameters["request"]["url"])
        elif event == "Log.entryAdded" and parameters["entry"]["level"] == "error":
            self.complaints.append(f"{parameters['entry']['text']} {parameters['entry'].get('url', '')}")
        elif event == "Runtime.exceptionThrown":
            self.complaints.append(str(parameters["exceptionDetails"].get("exception", {}).get("description")))

    def open(self, address: str, width: int, height: int = 900) -> None:
        """Open an address in a window of this width, a phone's when it is narrow."""
        self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 600
        )
        self.call("Page.navigate", url="about:blank")
        self.call("Page.navigate", url=address)

    def evaluate(self, script: str) -> Any:
        """The value of an expression in the page."""
        result = self.call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in result, result["exceptionDetails"]
        return result["result"].get("value")

    def wait_for(self, script: str, timeout_s: float = 60) -> Any:
        """The value of an expression once it is true."""
        return _wait(lambda: self.evaluate(script), f"the page never came to {script}", timeout_s)

    def click(self, selector: str) -> None:
        """Press the left button on the middle of the first element that matches, once it has come to rest."""
        self.wait_for(f"!!document.querySelector({selector!r})")
        x, y = self.evaluate(f"({MIDDLE_AT_REST})(document.querySelector({selector!r}))")
        for kind in ("mousePressed", "mouseReleased"):
            self.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)

    def close(self) -> None:
        """End the browser."""
        self._socket.close()
        self._process.terminate()
        self._process.wait(20)


def _wait(condition: Any, problem: str, timeout_s: float) -> Any:
    deadline = time.monotonic() + timeout_s
    while not (found := condition()):
        assert time.monotonic() < deadline, problem
        time.sleep(0.1)
    return found
