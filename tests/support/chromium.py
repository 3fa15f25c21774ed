"""A real browser for tests: Chromium without a window, spoken to through two pipes in the DevTools protocol."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome")
_FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync", "--disable-extensions", "--disable-dev-shm-usage",
    "--remote-debugging-pipe", "--window-size=1200,1600",
)  # fmt: skip
_PATIENCE = 60
"""Seconds after which a browser that says nothing is given up."""
_LAUNCH = "import os, sys; os.dup2(int(sys.argv[1]), 3); os.dup2(int(sys.argv[2]), 4); os.execv(sys.argv[3], sys.argv[3:])"
"""Chromium reads commands from descriptor 3 and answers on 4."""


def find() -> str | None:
    """Where Chromium is; None where there is none."""
    return next((found for name in NAMES if (found := shutil.which(name))), None)


@dataclass
class Seen:
    """What a page did while it was opened."""

    requests: list[str] = field(default_factory=list)
    """Every address that was asked for, whether or not that was allowed."""
    complaints: list[str] = field(default_factory=list)
    """What stands in the console, and exceptions that nobody caught."""
    value: Any = None
    """What the expression came to."""


class Browser:
    """One Chromium with a fresh profile; a `with` block ends it, its children and its profile."""

    def __init__(self, path: str) -> None:
        self._profile = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
        reads, self._commands = os.pipe()
        self._answers, writes = os.pipe()
        ends = [fcntl.fcntl(end, fcntl.F_DUPFD, 10) for end in (reads, writes)]  # neither may be 3 or 4
        launch = [sys.executable, "-I", "-S", "-c", _LAUNCH, *map(str, ends), path]
        self._process = subprocess.Popen(
            [*launch, *_FLAGS, f"--user-data-dir={self._profile.name}", "about:blank"],
            pass_fds=ends,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        for end in (reads, writes, *ends):
            os.close(end)
        self._number, self._unread, self._events = 0, b"", list[dict[str, Any]]()

    def __enter__(self) -> Browser:
        return self

    def __exit__(self, *_: object) -> None:
        try:
            with contextlib.suppress(OSError, TimeoutError):
                self._call("Browser.close")
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            pass
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)  # the session this very process began
        self._process.wait()
        os.close(self._commands)
        os.close(self._answers)
        self._profile.cleanup()

    def open(self, page: Path, expression: str) -> Seen:
        """Open a file in a new tab, wait until it and all it asks for has loaded, then evaluate the expression."""
        target = self._call("Target.createTarget", url="about:blank")["targetId"]
        session = self._call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Network", "Runtime", "Log", "Page"):
            self._call(f"{domain}.enable", session)
        self._events.clear()
        self._call("Page.navigate", session, url=page.as_uri())
        while not any(event["method"] == "Page.loadEventFired" for event in self._events):
            self._read()
        settled = "document.fonts.ready.then(() => new Promise(done => setTimeout(done, 50)))"
        self._call("Runtime.evaluate", session, expression=settled, awaitPromise=True)
        answer = self._call("Runtime.evaluate", session, expression=expression, returnByValue=True)
        seen = Seen(value=answer["result"].get("value"))
        if "exceptionDetails" in answer:
            seen.complaints.append(json.dumps(answer["exceptionDetails"]))
        for event in self._events:
            _note(event, seen)
        self._call("Target.closeTarget", targetId=target)
        return seen

    def _call(self, method: str, session: str | None = None, **params: Any) -> dict[str, Any]:
        self._number += 1
        message = {"id": self._number, "method": method, "params": params} | ({"sessionId": session} if session else {})
        data = json.dumps(message).encode() + b"\0"
        while data:
            data = data[os.write(self._commands, data) :]
        while (answer := self._read()).get("id") != self._number:
            pass
        if "error" in answer:
            raise RuntimeError(f"{method}: {answer['error']}")
        return answer["result"]

    def _read(self) -> dict[str, Any]:
        """The next message; events are kept."""
        deadline = time.monotonic() + _PATIENCE
        while b"\0" not in self._unread:
            ready, _, _ = select.select([self._answers], [], [], max(deadline - time.monotonic(), 0))
            if not ready:
                raise TimeoutError(f"Chromium said nothing for {_PATIENCE} seconds")
            data = os.read(self._answers, 1 << 20)
            if not data:
                raise BrokenPipeError("Chromium has ended")
            self._unread += data
        first, _, self._unread = self._unread.partition(b"\0")
        message: dict[str, Any] = json.loads(first)
        if "method" in message:
            self._events.append(message)
        return message


def _note(event: dict[str, Any], seen: Seen) -> None:
    params = event["params"]
    match event["method"]:
        case "Network.requestWillBeSent":
            seen.requests.append(params["request"]["url"])
        case "Runtime.exceptionThrown":
            seen.complaints.append(json.dumps(params["exceptionDetails"]))
        case "Runtime.consoleAPICalled":
            seen.complaints.append(f"console.{params['type']}: {json.dumps(params['args'])}")
        case "Log.entryAdded":
            seen.complaints.append(f"{params['entry']['level']}: {params['entry']['text']}")
