"""When the parts of a frame began and ended, on the device that computes them, and how much memory it takes."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from shapecheck.contract import Contract
from shapecheck.runtime.dropin import Session


class Clock:
    """Marks along one frame. On a GPU they are CUDA events on the current stream, so that nothing waits in between."""

    def __init__(self, device: torch.device) -> None:
        self._device, self._on_gpu = device, device.type == "cuda"
        self._marks: list[Any] = []

    def begin(self) -> None:
        """Forget the last frame; what it left to do is done first."""
        self._settle()
        self._marks.clear()

    def mark(self) -> None:
        """Here a part ends and the next begins."""
        self._marks.append(self._event() if self._on_gpu else time.perf_counter())

    def parts(self) -> list[float]:
        """Milliseconds between the marks, once all is done."""
        self._settle()
        pairs = zip(self._marks[:-1], self._marks[1:], strict=True)
        return [one.elapsed_time(other) if self._on_gpu else (other - one) * 1000 for one, other in pairs]

    def _event(self) -> Any:
        event: Any = torch.cuda.Event
        made = event(enable_timing=True)
        made.record(torch.cuda.current_stream(self._device))
        return made

    def _settle(self) -> None:
        if self._on_gpu:
            torch.cuda.synchronize(self._device)


class Marked:
    """A session whose calls are marked at both ends."""

    def __init__(self, session: Session, clock: Clock) -> None:
        self._session, self._clock = session, clock

    @property
    def contract(self) -> Contract:
        """The session's own."""
        return self._session.contract

    @property
    def device(self) -> torch.device:
        """The session's own."""
        return self._session.device

    @property
    def reuses_outputs(self) -> bool:
        """The session's own."""
        return self._session.reuses_outputs

    def __call__(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The session's own outputs."""
        self._clock.mark()
        found = self._session(inputs)
        self._clock.mark()
        return found

    def close(self) -> None:
        """Close the session."""
        self._session.close()


def taken(device: torch.device) -> int | None:
    """Bytes that are taken: on a GPU by everybody, else by this process in memory; None where the system does not tell."""
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        return total - free
    try:
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError):
        return None
