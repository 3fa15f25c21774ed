"""Render the times of a bench as text, Markdown or JSON."""

from __future__ import annotations

from dataclasses import asdict

from shapecheck.pipelines.bench_record import Bench
from shapecheck.report.document import Document, Facts, Format, Heading, Points, Table
from shapecheck.report.numbers import dump_json


def render_text(bench: Bench, form: Format = "human") -> str:
    """Return the whole report. `ratio` is the median beside that of the first backend that ran."""
    ran = [timing for timing in bench.timings if timing.frames]
    rows = []
    for timing in ran:
        memory = "not known" if timing.memory is None else f"{timing.memory / 2**20:.0f}"
        shares = (f"{100 * share:.1f}%" for share in timing.shares.values())
        times = f"{timing.median:.2f}", f"{timing.p95:.2f}", f"{timing.rate:.2f}", f"{timing.median / ran[0].median:.2f}×"
        rows.append((timing.backend, *times, memory, *shares))
    facts = [
        ("device", bench.device),
        ("size", f"{bench.geometry}, {bench.geometry.tokens} text tokens"),
        ("ControlNets", f"{bench.controlnets}, in PyTorch" if bench.controlnets else "none: every slot gets zeros"),
        ("frames", f"{max(len(timing.frames) for timing in bench.timings)} of each backend, in turns"),
        *((timing.backend, timing.ran) for timing in ran),
        ("contract", bench.contract),
        ("versions", ", ".join(f"{name} {release}" for name, release in bench.versions)),
    ]
    headers = ("backend", "median ms", "p95 ms", "frames/s", "ratio", "memory MiB", "ControlNet", "hand-over", "UNet")
    table = Table(headers, rows)
    notes = [
        "a frame is the ControlNets, the hand-over of their residuals, and one call of the UNet; PyTorch's weights are random",
        "memory is what loading a backend and its first frames added; torch.compile shares the weights of PyTorch's UNet",
        *(f"{timing.backend} did not run: {timing.reason}" for timing in bench.timings if timing.reason),
    ]
    return Document(
        f"Frames of {bench.artefact}", [Facts(facts), Heading("Time and memory"), table, Points(notes, "note: ")]
    ).render(form)


def render_json(bench: Bench) -> str:
    """Return the same for machines, with every frame's milliseconds."""
    derived = {"median_ms": "median", "p95_ms": "p95", "frames_per_second": "rate", "shares": "shares"}
    timings = [
        asdict(timing) | {key: getattr(timing, name) for key, name in derived.items() if timing.frames}
        for timing in bench.timings
    ]
    return dump_json({"shapecheck_bench": 1} | asdict(bench) | {"timings": timings, "versions": dict(bench.versions)})
