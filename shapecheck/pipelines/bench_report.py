"""What frames took, as text, Markdown or JSON."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict

from shapecheck.pipelines.bench_record import Bench, Timing
from shapecheck.report.numbers import storable
from shapecheck.report.tables import Format, clean, fact_list, heading, note_list, table

_HEADERS = ("backend", "median ms", "p95 ms", "frames/s", "ratio", "memory MiB", "ControlNet", "hand-over", "UNet")


_PARTS = ("controlnet", "handover", "unet")


_NOTES = (
    "a frame is the ControlNets, the hand-over of their residuals, and one call of the UNet; PyTorch's weights are random",
    "memory is what loading a backend and its first frames added; torch.compile shares the weights of PyTorch's UNet",
)


def told(bench: Bench, form: Format = "human") -> str:
    """The whole report. `ratio` is the median beside that of the first backend that ran."""
    ran = [each for each in bench.timings if each.frames]
    title = clean(f"Frames of {bench.artefact}", form)
    refused = [clean(f"{each.backend} did not run: {each.reason}", form) for each in bench.timings if each.reason]
    parts = [
        f"# {title}" if form == "markdown" else title,
        fact_list(list(_facts(bench)), form),
        heading("Time and memory", form),
        table([_row(each, ran[0]) for each in ran], _HEADERS, form),
        note_list([*_NOTES, *refused], form),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def as_json(bench: Bench) -> str:
    """The same for machines, with every frame's milliseconds."""
    timings = [asdict(each) | _numbers(each) for each in bench.timings]
    values = {"shapecheck_bench": 1} | asdict(bench) | {"timings": timings, "versions": dict(bench.versions)}
    return storable(json.dumps(values, indent=1, ensure_ascii=False, allow_nan=False)) + "\n"


def _facts(bench: Bench) -> Iterator[tuple[str, str]]:
    at = bench.geometry
    yield "device", bench.device
    yield "size", f"{at}, {at.tokens} text tokens"
    yield "ControlNets", f"{bench.controlnets}, in PyTorch" if bench.controlnets else "none: every slot gets zeros"
    yield "frames", f"{max(len(each.frames) for each in bench.timings)} of each backend, in turns"
    for each in bench.timings:
        if each.frames:
            yield each.backend, each.ran
    yield "contract", bench.contract
    yield "versions", ", ".join(f"{name} {release}" for name, release in bench.versions)


def _row(each: Timing, first: Timing) -> tuple[str, ...]:
    memory = "not known" if each.memory is None else f"{each.memory / 2**20:.0f}"
    shares = (f"{100 * each.share(part):.1f}%" for part in _PARTS)
    numbers = (f"{each.median:.2f}", f"{each.p95:.2f}", f"{each.rate:.2f}", f"{each.median / first.median:.2f}×")
    return (each.backend, *numbers, memory, *shares)


def _numbers(each: Timing) -> dict[str, object]:
    if not each.frames:
        return {}
    shares = {part: each.share(part) for part in _PARTS}
    return {"median_ms": each.median, "p95_ms": each.p95, "frames_per_second": each.rate, "shares": shares}
