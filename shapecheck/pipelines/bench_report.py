"""What frames took, as text, Markdown or JSON."""

from __future__ import annotations

from dataclasses import asdict

from shapecheck.pipelines.bench_record import Bench, Timing
from shapecheck.report.document import Document, Facts, Format, Heading, Part, Points, Table
from shapecheck.report.numbers import dump_json

_HEADERS = ("backend", "median ms", "p95 ms", "frames/s", "ratio", "memory MiB", "ControlNet", "hand-over", "UNet")


_PARTS = ("controlnet", "handover", "unet")


_NOTES = (
    "a frame is the ControlNets, the hand-over of their residuals, and one call of the UNet; PyTorch's weights are random",
    "memory is what loading a backend and its first frames added; torch.compile shares the weights of PyTorch's UNet",
)


def render_text(bench: Bench, form: Format = "human") -> str:
    """Return the whole report. `ratio` is the median beside that of the first backend that ran."""
    ran = [timing for timing in bench.timings if timing.frames]
    refused = [f"{timing.backend} did not run: {timing.reason}" for timing in bench.timings if timing.reason]
    facts = [
        ("device", bench.device),
        ("size", f"{bench.geometry}, {bench.geometry.tokens} text tokens"),
        ("ControlNets", f"{bench.controlnets}, in PyTorch" if bench.controlnets else "none: every slot gets zeros"),
        ("frames", f"{max(len(timing.frames) for timing in bench.timings)} of each backend, in turns"),
        *((timing.backend, timing.ran) for timing in ran),
        ("contract", bench.contract),
        ("versions", ", ".join(f"{name} {release}" for name, release in bench.versions)),
    ]
    table = Table(_HEADERS, [_tabulate_timing(timing, ran[0]) for timing in ran])
    parts: list[Part] = [Facts(facts), Heading("Time and memory"), table, Points([*_NOTES, *refused], "note: ")]
    return Document(f"Frames of {bench.artefact}", parts).render(form)


def render_json(bench: Bench) -> str:
    """Return the same for machines, with every frame's milliseconds."""
    timings = [asdict(timing) | _derive_numbers(timing) for timing in bench.timings]
    return dump_json({"shapecheck_bench": 1} | asdict(bench) | {"timings": timings, "versions": dict(bench.versions)})


def _tabulate_timing(timing: Timing, first: Timing) -> tuple[str, ...]:
    memory = "not known" if timing.memory is None else f"{timing.memory / 2**20:.0f}"
    shares = (f"{100 * timing.share(part):.1f}%" for part in _PARTS)
    ratio = f"{timing.median / first.median:.2f}×"
    return (timing.backend, f"{timing.median:.2f}", f"{timing.p95:.2f}", f"{timing.rate:.2f}", ratio, memory, *shares)


def _derive_numbers(timing: Timing) -> dict[str, object]:
    if not timing.frames:
        return {}
    shares = {part: timing.share(part) for part in _PARTS}
    return {"median_ms": timing.median, "p95_ms": timing.p95, "frames_per_second": timing.rate, "shares": shares}
