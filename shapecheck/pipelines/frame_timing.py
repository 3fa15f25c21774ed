"""Time frames of several backends in turns, so that what disturbs the machine disturbs all of them."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from shapecheck import extras
from shapecheck.contract import ShapecheckError
from shapecheck.contract.errors import one_line
from shapecheck.pipelines.bench_record import COMPILED, Frame, Timing
from shapecheck.pipelines.frame import Clock, PlayFrame
from shapecheck.progress import Progress
from shapecheck.runtime.gpu import free_memory

Caught = type[Exception] | tuple[type[Exception], ...]


@dataclass(frozen=True, slots=True)
class TimedBackend:
    """A backend to be timed. `make_frame` loads it; the other fields are those of its `Timing`."""

    backend: str
    ran: str
    controlnets: str
    make_frame: Callable[[], PlayFrame]
    asked: bool = True


def time_candidates(
    candidates: Sequence[TimedBackend],
    device: torch.device,
    *,
    frames: int,
    warm_up: int,
    progress: Progress,
    caught: Caught = (ShapecheckError, ModuleNotFoundError, torch.OutOfMemoryError),
) -> tuple[Timing, ...]:
    """Load all, then play one frame of each in turn. A candidate that does not run is a timing with its reason.

    `caught` are the errors by which it does not run; a compiler may raise any. Call it without gradients.
    """
    clock = Clock(device)
    plays: dict[str, PlayFrame] = {}
    timings = []
    for candidate in candidates:
        compiles = candidate.backend in COMPILED
        progress(f"compiling {candidate.backend}: minutes" if compiles else f"loading {candidate.backend}")
        timing, play = _prepare(candidate, clock, device, warm_up, Exception if compiles else caught)
        timings.append(timing)
        if play is not None:
            plays[candidate.backend] = play
    measured: dict[str, list[Frame]] = {candidate.backend: [] for candidate in candidates}
    for number in range(frames):
        progress(f"timing frame {number + 1} of {frames}")
        for name, play in plays.items():
            # The second is timed: ONNX Runtime's threads go on spinning after a call, and slow down another backend.
            for _ in range(2):
                clock.begin()
                play(clock)
            controlnet, before, unet, after = clock.measure_parts()
            measured[name].append(Frame(controlnet, before + after, unet))
    return tuple(replace(timing, frames=tuple(measured[timing.backend])) for timing in timings)


def _prepare(
    candidate: TimedBackend, clock: Clock, device: torch.device, warm_up: int, caught: Caught
) -> tuple[Timing, PlayFrame | None]:
    """Load a backend and play frames that do not count. Return its timing, still without frames, and its frame."""
    timing = Timing(candidate.backend, "", asked=candidate.asked)
    free_memory()
    before, start = measure_memory(device), time.monotonic()
    try:
        play = candidate.make_frame()
        for _ in range(warm_up):
            clock.begin()
            play(clock)
        clock.measure_parts()  # waits for what was queued
    except caught as error:
        problem = extras.explain_missing(error, candidate.backend) if isinstance(error, ModuleNotFoundError) else error
        return replace(timing, reason=one_line(str(problem) or type(problem).__name__, longest=300)), None
    seconds, after = time.monotonic() - start, measure_memory(device)
    memory = None if before is None or after is None else max(0, after - before)
    known = replace(timing, ran=candidate.ran, controlnets=candidate.controlnets, memory=memory, seconds=seconds)
    return known, play


def measure_memory(device: torch.device) -> int | None:
    """Return the bytes in use, on a GPU by everybody, else by this process; None if the system does not say."""
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        return total - free
    try:
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError):
        return None
