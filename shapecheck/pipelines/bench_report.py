"""Render the times of a bench as text, Markdown or JSON."""

from __future__ import annotations

from dataclasses import asdict

from shapecheck.pipelines.bench_record import Bench
from shapecheck.report.document import Document, Facts, Format, Heading, Part, Points, Table
from shapecheck.report.numbers import dump_json, format_count


def render_text(bench: Bench, form: Format = "human") -> str:
    """Return the whole report. `ratio` is the median beside that of the first backend that ran."""
    ran = [timing for timing in bench.timings if timing.frames]
    rows = []
    for timing in ran:
        memory = "not known" if timing.memory is None else f"{timing.memory / 2**20:.0f}"
        shares = (f"{100 * share:.1f}%" for share in timing.shares.values())
        times = f"{timing.median:.2f}", f"{timing.p95:.2f}", f"{timing.rate:.2f}", f"{timing.median / ran[0].median:.2f}×"
        ready = "not known" if timing.seconds is None else f"{timing.seconds:.1f}"
        rows.append((timing.backend, *times, memory, ready, *shares))
    facts = [
        ("device", bench.device),
        ("size", f"{bench.geometry}, {bench.geometry.tokens} text tokens"),
        ("ControlNets", str(bench.controlnets or "none: every slot gets zeros")),
        ("frames", f"{max(len(timing.frames) for timing in bench.timings)} of each backend, in turns"),
        *(
            (timing.backend, timing.ran + (f"; ControlNets: {timing.controlnets}" if timing.controlnets else ""))
            for timing in ran
        ),
        ("contract", bench.contract),
        ("versions", ", ".join(f"{name} {release}" for name, release in bench.versions)),
    ]
    headers = (
        "backend",
        "median ms",
        "p95 ms",
        "frames/s",
        "ratio",
        "memory MiB",
        "ready s",
        "ControlNet",
        "hand-over",
        "UNet",
    )
    table = Table(headers, rows)
    notes = [
        "a frame is the ControlNets, the hand-over of their residuals, and one call of the UNet; PyTorch's weights are random",
        "memory is what loading a backend and its first frames added, ready how long they took, compiling included",
        *(f"{timing.backend} did not run: {timing.reason}" for timing in bench.timings if timing.reason),
    ]
    parts: list[Part] = [Facts(facts), Heading("Time and memory"), table, Points(notes, "note: ")]
    return Document(f"Frames of {bench.artefact}", [*parts, *_describe_picture(bench)]).render(form)


def _describe_picture(bench: Bench) -> list[Part]:
    """Return the section on a whole picture: its frames by each backend, its other parts by PyTorch."""
    facts = [
        (
            part.name,
            f"{_show(part.eager)} ms eager" + (f", {_show(part.compiled)} compiled" if part.compiled else "") + f": {part.ran}",
        )
        for part in bench.parts
        if part.eager is not None
    ]
    rows = []
    for timing in bench.timings:
        if timing.frames:
            picture, fast = bench.compose_picture(timing), bench.compose_picture(timing, compiled=True)
            times = (picture.frames, picture.decode, picture.text, picture.total)
            compiled = _show(fast.total) if fast != picture else ""
            rows.append(
                (timing.backend, *map(_show, times), compiled, *(f"{100 * share:.1f}%" for share in picture.shares.values()))
            )
    headers = ("backend", "frames ms", "VAE ms", "text ms", "picture ms", "with the VAE compiled", "frames", "VAE", "text")
    notes = [
        f"a picture is {format_count(bench.steps, 'frame')}, one VAE decode and one text encoding, without the scheduler",
        "a stream decodes (and made from pictures encodes) at every frame, and keeps its text",
        *(
            f"{part.name} was not timed{' compiled' if part.eager else ''}: {part.reason}"
            for part in bench.parts
            if part.reason
        ),
    ]
    title = f"A picture of {format_count(bench.steps, 'step')}"
    return [Heading(title), Facts(facts), Table(headers, rows), Points(notes, "note: ")] if bench.parts else []


def _show(milliseconds: float | None) -> str:
    return "not timed" if milliseconds is None else f"{milliseconds:.2f}"


def render_json(bench: Bench) -> str:
    """Return the same for machines, with every frame's milliseconds."""
    derived = {"median_ms": "median", "p95_ms": "p95", "frames_per_second": "rate", "shares": "shares"}
    timings = []
    for timing in bench.timings:
        values = asdict(timing)
        if timing.frames:
            values |= {key: getattr(timing, name) for key, name in derived.items()}
            for key, compiled in (("picture", False), ("picture_vae_compiled", True)):
                picture = bench.compose_picture(timing, compiled=compiled)
                values[key] = asdict(picture) | {"total": picture.total, "shares": picture.shares}
        timings.append(values)
    return dump_json({"shapecheck_bench": 1} | asdict(bench) | {"timings": timings, "versions": dict(bench.versions)})
