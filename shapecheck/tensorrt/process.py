"""The requesting side of the process that builds an engine."""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Self

from shapecheck.contract import ShapecheckError
from shapecheck.contract.errors import one_line
from shapecheck.progress import Progress
from shapecheck.tensorrt.record import Target

_LONGEST = 2000


def has_driver() -> bool:
    """Return whether there is a driver to load an engine with."""
    try:
        return ctypes.CDLL("nvcuda.dll" if os.name == "nt" else "libcuda.so.1").cuInit(0) == 0  # type: ignore[no-any-return]
    except OSError:
        return False


@dataclass(frozen=True, slots=True)
class ParserError:
    """One node that TensorRT's parser refuses."""

    node: str
    operator: str
    text: str


class EngineError(ShapecheckError):
    """TensorRT could not be loaded, or refused the graph, or could not build it; `texts` are its own words, in order."""

    def __init__(self, stage: str, text: str, messages: tuple[str, ...], errors: tuple[ParserError, ...] = ()) -> None:
        self.stage, self.messages, self.errors = stage, messages, errors
        known = any(text.endswith(message) for message in messages)  # Polygraphy logs what it then raises
        self.texts = messages if known or not text else (*messages, text)
        super().__init__("\n".join(self.texts) or stage)


@dataclass(slots=True)
class EngineProcess:
    """A process in which TensorRT is loaded, for as long as the `with` lasts. Killed at its end, whatever it is doing."""

    target: Target
    progress: Progress
    messages: list[str] = field(default_factory=list)
    """Warnings and errors of TensorRT, in its words."""
    _process: subprocess.Popen[str] = field(init=False, repr=False)
    _stderr: Any = field(init=False, repr=False)

    def __enter__(self) -> Self:
        self._stderr = tempfile.TemporaryFile()
        command = [sys.executable, "-P", "-m", "shapecheck.tensorrt.worker", self.target]
        try:
            self._process = subprocess.Popen(  # noqa: S603  # our own module, by our own interpreter
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._stderr, encoding="utf-8"
            )
        except OSError as error:
            self._stderr.close()
            raise ShapecheckError(f"cannot start {sys.executable}: {error.strerror or error}") from None
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._process.kill()
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout, self._stderr):
            with contextlib.suppress(OSError):  # flushing to a process that is gone
                stream.close()  # type: ignore[union-attr]

    def send(self, job: Mapping[str, Any]) -> None:
        """Send a job, or an empty one as the word to go on."""
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # `receive` says why it is gone
            self._process.stdin.write(json.dumps(job) + "\n")
            self._process.stdin.flush()

    def receive(self, event: str) -> Mapping[str, Any]:
        """Wait for this event. Raises EngineError if the process reports a failure, or ends."""
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if not line.endswith("\n"):  # it ended in the middle of a line
                break
            message = json.loads(line)
            if message["event"] == event:
                return message  # type: ignore[no-any-return]
            if message["event"] == "failed":
                errors = tuple(ParserError(**error) for error in message.get("errors", ()))
                raise EngineError(message["stage"], message["text"], tuple(self.messages), errors)
            self._note(message)
        status = self._process.wait()
        self._stderr.seek(0, os.SEEK_END)
        self._stderr.seek(max(0, self._stderr.tell() - _LONGEST))
        words = self._stderr.read().decode("utf-8", "replace").strip()
        how = f"was killed by signal {-status}" if status < 0 else f"ended with status {status}"
        likely = "; was there too little memory?" if status == -9 else ""  # SIGKILL, which Windows does not name
        text = f"the building process {how}{likely}" + (f"\n{words}" if words else "")
        raise EngineError("end", text, tuple(self.messages))

    def finish(self) -> None:
        """Receive everything until the process has ended by itself."""
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._note(json.loads(line))
        self._process.wait()

    def _note(self, message: Mapping[str, Any]) -> None:
        if message["event"] == "progress":
            steps = f" {message['step'] + 1} of {message['steps']}" if message["steps"] > 1 else ""
            self.progress(f"building: {one_line(message['phase'])}{steps}")
        elif len(self.messages) < 50:
            self.messages.append(one_line(re.sub(r"^\[.\] ", "", message["text"]), _LONGEST))
