"""Drive a headless Chromium from a test: type, click, look. It needs no package: the browser speaks its DevTools
protocol (chromedevtools.github.io/devtools-protocol) through a pipe, as JSON with a zero byte after each message.

    with Chromium(peers.CHROMIUM) as browser:
        page = browser.page("http://127.0.0.1:8000/", width=360)
        page.type("Hello")
        page.press("Enter")
        page.wait("document.querySelector('article')")
"""

import base64
import json
import os
import select
import subprocess
import tempfile
import time
from pathlib import Path

FLAGS = ["--headless", "--no-sandbox", "--disable-gpu", "--remote-debugging-pipe", "--no-first-run",
         "--disable-background-networking", "--force-color-profile=srgb", "--hide-scrollbars"]
KEYS = {"Enter": (13, "\r"), "Escape": (27, ""), "Tab": (9, ""), "Space": (32, " "), "ArrowDown": (40, "")}
SHIFT = 8


class Chromium:
    """A browser with an empty profile. `folder` has its program and, in lib/, libraries that it needs."""

    def __init__(self, folder: Path):
        self.folder = folder

    def __enter__(self):
        self.profile = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
        theirs_in, self.to = os.pipe()
        self.back, theirs_out = os.pipe()

        def connect():  # Chromium reads from descriptor 3 and writes to 4
            a, b = os.dup(theirs_in), os.dup(theirs_out)
            os.dup2(a, 3)
            os.dup2(b, 4)

        command = [str(self.folder / "chromium"), *FLAGS, f"--user-data-dir={self.profile.name}", "about:blank"]
        env = os.environ | {"LD_LIBRARY_PATH": str(self.folder / "lib")}
        self.process = subprocess.Popen(command, env=env, close_fds=False, preexec_fn=connect,
                                        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        os.close(theirs_in)
        os.close(theirs_out)
        self.held, self.number, self.events = b"", 0, []
        return self

    def __exit__(self, *_):
        self.process.kill()
        self.process.wait()
        os.close(self.to)
        os.close(self.back)
        self.profile.cleanup()

    def call(self, method: str, session: str = "", **params) -> dict:
        """Send one command and return its result. Events that arrive meanwhile are kept."""
        self.number += 1
        message = {"id": self.number, "method": method, "params": params}
        if session:
            message["sessionId"] = session
        os.write(self.to, json.dumps(message).encode() + b"\0")
        while True:
            answer = self.receive(30)
            if answer.get("id") == self.number:
                assert "error" not in answer, f"{method}: {answer['error']}"
                return answer["result"]
            self.events.append(answer)

    def receive(self, seconds: float) -> dict:
        while b"\0" not in self.held:
            assert select.select([self.back], [], [], seconds)[0], "Chromium does not answer"
            part = os.read(self.back, 1 << 16)
            assert part, "Chromium has ended"
            self.held += part
        message, _, self.held = self.held.partition(b"\0")
        return json.loads(message)

    def page(self, url: str, width: int = 1200, height: int = 800, dark: bool = False) -> "Page":
        """A new page without memory of others, at `url`."""
        context = self.call("Target.createBrowserContext")["browserContextId"]
        target = self.call("Target.createTarget", url="about:blank", browserContextId=context)["targetId"]
        page = Page(self, self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"])
        for domain in ("Page", "Runtime", "Log"):
            page.call(f"{domain}.enable")
        page.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1,
                  mobile=width < 500)
        page.call("Emulation.setFocusEmulationEnabled", enabled=True)  # several pages, each as if in front
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        page.call("Emulation.setEmulatedMedia", features=[scheme])
        self.call("Browser.grantPermissions", permissions=["clipboardReadWrite", "clipboardSanitizedWrite"],
                  browserContextId=context)
        page.go(url)
        return page


class Page:
    def __init__(self, browser: Chromium, session: str):
        self.browser, self.session = browser, session

    def call(self, method: str, **params) -> dict:
        return self.browser.call(method, self.session, **params)

    def go(self, url: str) -> None:
        self.call("Page.navigate", url=url)
        self.wait("document.readyState == 'complete' && location.href != 'about:blank'")

    def reload(self) -> None:
        self.see("window.before = true")
        self.call("Page.reload")
        self.wait("document.readyState == 'complete' && !window.before")

    def see(self, expression: str):
        """The value of a JavaScript expression, or of the promise that it is."""
        out = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True,
                        userGesture=True)
        assert "exceptionDetails" not in out, out["exceptionDetails"]
        return out["result"].get("value")

    def wait(self, expression: str, seconds: float = 60):
        """Until the expression is true; its value."""
        end = time.monotonic() + seconds
        while not (value := self.see(expression)):
            assert time.monotonic() < end, f"{expression} is still {value!r}; the page: {self.see(TEXT)!r}"
            time.sleep(0.02)
        return value

    def type(self, text: str) -> None:
        """Into the element that has the focus."""
        self.call("Input.insertText", text=text)

    def press(self, key: str, modifiers: int = 0) -> None:
        code, text = KEYS[key]
        event = dict(key=text if key == "Space" else key, code=key, windowsVirtualKeyCode=code, modifiers=modifiers)
        self.call("Input.dispatchKeyEvent", type="keyDown", text=text, **event)
        self.call("Input.dispatchKeyEvent", type="keyUp", **event)

    def compose(self, text: str) -> None:
        """What an input method shows before the user has chosen."""
        self.call("Input.imeSetComposition", text=text, selectionStart=len(text), selectionEnd=len(text))

    def click(self, selector: str) -> None:
        """With the mouse, in the middle of the element."""
        x, y = self.see(f"(() => {{ const r = document.querySelector({selector!r}).getBoundingClientRect(); "
                        "return [r.x + r.width / 2, r.y + r.height / 2] })()")
        for kind in ("mousePressed", "mouseReleased"):
            self.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)

    def complaints(self) -> list[str]:
        """Errors in the page's own script, and what its Content-Security-Policy has refused."""
        self.see("0")
        mine = [event for event in self.browser.events if event.get("sessionId") == self.session]
        thrown = [event["params"]["exceptionDetails"].get("exception", {}).get("description", "")
                  for event in mine if event["method"] == "Runtime.exceptionThrown"]
        return thrown + [event["params"]["entry"]["text"] for event in mine if event["method"] == "Log.entryAdded"]

    def picture(self) -> bytes:
        """A PNG of what is seen."""
        return base64.b64decode(self.call("Page.captureScreenshot")["data"])


TEXT = "document.body.innerText"
