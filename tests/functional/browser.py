"""A headless Chromium that a test drives as a person would: open, read, click, type, look."""

from __future__ import annotations

import base64
import json
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import Any

from websockets.sync.client import ClientConnection, connect

DESKTOP, PHONE = (1280, 1400), (390, 844)
PROGRAM = shutil.which("chromium")
_WAIT_S = 60.0
# A label stands before its field in the document, whatever the two UIs put around them.
_HELPERS = """
window.visible = (selector) => [...document.querySelectorAll(selector)].filter(
  (element) => element.getClientRects().length > 0);
window.labelled = (text) => visible('body *').filter((element) => element.innerText?.trim() === text).pop();
window.follows = (label, element) =>
  labelled(label)?.compareDocumentPosition(element) & Node.DOCUMENT_POSITION_FOLLOWING;
"""


class Page:
    """One page of the browser.

    Args:
        socket: Connection to the page's debugger.
        pictures: Folder for screenshots.
    """

    def __init__(self, socket: ClientConnection, pictures: Path):
        self._socket = socket
        self._pictures = pictures
        self._numbers = count(1)
        for domain in ("Page", "Runtime"):
            self.send(f"{domain}.enable")
        self.send("Page.addScriptToEvaluateOnNewDocument", source=_HELPERS)
        self.resize(DESKTOP)

    def send(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Send a command of the DevTools protocol and return its result."""
        number = next(self._numbers)
        self._socket.send(json.dumps({"id": number, "method": method, "params": parameters}))
        while True:
            answer = json.loads(self._socket.recv(timeout=_WAIT_S))
            if answer.get("id") == number:
                assert "error" not in answer, answer
                return answer["result"]

    def resize(self, size: tuple[int, int]) -> None:
        """Give the page the size of a screen."""
        self.send(
            "Emulation.setDeviceMetricsOverride",
            width=size[0], height=size[1], deviceScaleFactor=1, mobile=size == PHONE,
        )  # fmt: skip

    def open(self, url: str) -> None:
        """Open an address."""
        self.send("Page.navigate", url=url)

    def run(self, script: str) -> Any:
        """Evaluate JavaScript and return its value."""
        answer = self.send("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def text(self) -> str:
        """Return the text that the page shows."""
        return str(self.run("document.body ? document.body.innerText : ''"))

    def until(self, script: str, what: str) -> Any:
        """Wait until JavaScript gives a true value, and return it."""
        deadline = time.monotonic() + _WAIT_S
        while not (value := self.run(script)):
            if time.monotonic() > deadline:
                self.picture("failed")
                raise AssertionError(f"{what}: {self.text()}")
            time.sleep(0.2)
        return value

    def shows(self, text: str) -> None:
        """Wait until the page shows a text."""
        self.until(f"(document.body?.innerText || '').includes({json.dumps(text)})", f"the page lacks {text!r}")

    def click(self, text: str) -> None:
        """Click the last element with exactly this text, as soon as the page shows it."""
        self._click(f"labelled({json.dumps(text)})", f"no {text!r} to click")

    def click_after(self, label: str, text: str) -> None:
        """Click the first button with exactly this text below a label."""
        has_text = f"e.innerText.trim() === {json.dumps(text)}"
        button = f"visible('button').find(e => {has_text} && follows({json.dumps(label)}, e))"
        self._click(button, f"no {text!r} below {label!r}")

    def click_first(self, selector: str) -> None:
        """Click the first element of a CSS selector."""
        self._click(f"visible({json.dumps(selector)})[0]", f"no {selector} to click")

    def fill(self, label: str, text: str) -> None:
        """Type a text into the first field below a label."""
        field = f"visible('input, textarea').find(e => follows({json.dumps(label)}, e))"
        # A list that closes takes the first click for itself.
        for _ in range(10):
            self._click(field, f"no field {label!r}")
            time.sleep(0.2)
            if self.run(f"document.activeElement === {field}"):
                break
        self.type(text)

    def choose(self, label: str, option: str) -> None:
        """Choose an option of the first list below a label."""
        native = f"visible('select').find(e => follows({json.dumps(label)}, e))"
        if self.run(f"Boolean({native})"):
            change = f"e.value = {json.dumps(option)}; e.dispatchEvent(new Event('change', {{bubbles: true}}))"
            self.run(f"(e => {{ {change} }})({native})")
        else:
            self.click_after(label, "Select")
            self.click(option)

    def type(self, text: str) -> None:
        """Type a text into the field that has the focus."""
        self.send("Input.insertText", text=text)

    def _click(self, element: str, problem: str) -> None:
        self.until(f"window.labelled && Boolean({element})", problem)
        # The older UI's message about a busy server may cover the element, until it has faded.
        closed = "visible('.p-toast__close-btn').map((button) => button.click()).length === 0"
        self.until(closed, "a message covers the page")
        self.run(f"{element}.scrollIntoView({{block: 'center'}})")
        x, y = self.run(f"(r => [r.x + r.width / 2, r.y + r.height / 2])({element}.getBoundingClientRect())")
        for kind in ("mousePressed", "mouseReleased"):
            self.send("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)

    def pictures(self, name: str) -> None:
        """Write what the page shows on a desktop and on a phone to PNG files."""
        for size, device in ((PHONE, "phone"), (DESKTOP, "desktop")):
            self.resize(size)
            # The page is laid out and drawn again.
            time.sleep(0.5)
            self.picture(f"{name}-{device}")

    def picture(self, name: str) -> None:
        """Write what the page shows to a PNG file."""
        data = self.send("Page.captureScreenshot", optimizeForSpeed=True)["data"]
        (self._pictures / f"{name}.png").write_bytes(base64.b64decode(data))


@contextmanager
def browser(home: Path, pictures: Path) -> Iterator[Page]:
    """Start Chromium and give its first page.

    Args:
        home: Folder for its profile.
        pictures: Folder for screenshots.
    """
    assert PROGRAM is not None
    pictures.mkdir(parents=True, exist_ok=True)
    words = [
        PROGRAM, "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--hide-scrollbars",
        "--no-first-run", "--disable-background-networking", "--remote-debugging-port=0",
        # Nothing but this machine.
        "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1", f"--user-data-dir={home}", "about:blank",
    ]  # fmt: skip
    process = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        port_file, deadline = home / "DevToolsActivePort", time.monotonic() + _WAIT_S
        while not port_file.exists() or port_file.read_text("utf-8").count("\n") < 1:
            assert process.poll() is None, "Chromium ended"
            assert time.monotonic() < deadline, "Chromium does not start"
            time.sleep(0.1)
        port, path = port_file.read_text("utf-8").split("\n")[:2]
        with _connection(f"ws://127.0.0.1:{port}{path}") as root:
            root.send(json.dumps({"id": 1, "method": "Target.getTargets"}))
            targets = json.loads(root.recv())["result"]["targetInfos"]
        (page,) = [target["targetId"] for target in targets if target["type"] == "page"]
        with _connection(f"ws://127.0.0.1:{port}/devtools/page/{page}") as socket:
            yield Page(socket, pictures)
    finally:
        process.terminate()
        process.wait(timeout=30)


def _connection(url: str) -> ClientConnection:
    return connect(url, max_size=None, proxy=None, open_timeout=_WAIT_S)
