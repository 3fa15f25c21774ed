"""The page reports/gpu.md from what gpu.py measured: numbers in, text out."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from shapecheck.report.document import Cell, Document, Heading, Paragraph, Part, Points, Table

BACKENDS = ("torch", "torch-reduce-overhead", "torch-compile", "ort-cuda", "ort-trt", "trt")
TITLES = {"sd15": "SD1.5", "sd-turbo": "SD-Turbo", "sdxl": "SDXL"}
CARDS = {
    "H200, H100 (compute capability 9.0)": ("9.0",),
    "B200 and others (10.x)": ("10.",),
    "A100, A10, RTX 30 (8.0, 8.6)": ("8.0", "8.6"),
    "L4, L40, RTX 40 (8.9)": ("8.9",),
    "RTX 50, RTX PRO Blackwell (12.x)": ("12.",),
    "T4, RTX 20 (7.5)": ("7.5",),
}
"""Kinds of cards, by the starts of their compute capability."""
_NOT_MEASURED = "not measured"
Record = Mapping[str, Any]


def render(record: Record) -> str:
    """Return the page as Markdown."""
    models = [name for name in TITLES if any(key.startswith(f"{name}/") for key in record["parts"])]
    parts: list[Part] = [Points(list(describe_machine(record))), Paragraph(_INTRODUCTION)]
    for name in models:
        found = {key.partition("/")[2]: part for key, part in record["parts"].items() if key.startswith(f"{name}/")}
        parts += render_model(TITLES[name], found)
    parts += [Heading("What was not run"), tabulate_what_ran(record)]
    parts += [Paragraph("TensorRT for RTX (`rtx`) makes no engines for compute capability 9.0, and is not measured here.")]
    return Document("On a GPU", parts).render("markdown")


_INTRODUCTION = (
    "Written by `python tests/bench/gpu.py`, which anybody with a GPU can run. Models have the presets' real sizes and random "
    "weights. A frame is one ControlNet, the hand-over of its residuals and one call of the UNet; backends take turns within "
    "one run, times are medians of CUDA events. `torch` is eager PyTorch, `torch-reduce-overhead` the line that users type: "
    'torch.compile(mode="reduce-overhead", fullgraph=True) of UNet and ControlNet, channels_last. Ratios are to these two.'
)


def describe_machine(record: Record) -> Iterator[str]:
    machine = record["machine"]
    yield f"GPU: {machine['gpu']}" + (f", compute capability {machine['capability']}" if machine.get("capability") else "")
    if machine.get("memory"):
        driver = ", ".join(machine.get("driver") or ()) or "not known"
        yield f"memory: {machine['memory'] / 2**30:.0f} GiB; driver: {driver}; CUDA of PyTorch: {machine.get('cuda')}"
    versions = ", ".join(f"{name} {release}" for name, release in machine["versions"].items())
    yield f"versions: Python {machine['python']}, {versions}"
    made = {(part["commit"], part["date"], part.get("quick", False)) for part in record["parts"].values()}
    for commit, date, quick in sorted(made):
        yield f"commit: {commit}, {date}" + (", --quick" if quick else "")
    notes: dict[str, list[str]] = {}
    for key, part in record["parts"].items():
        if part.get("note"):
            notes.setdefault(part["note"], []).append(key)
    for note, keys in notes.items():
        yield f"note ({', '.join(keys)}): {note}"


def render_model(title: str, found: Mapping[str, Record]) -> list[Part]:
    parts: list[Part] = []
    latency = found.get("latency", {})
    if "bench" in latency:
        geometry, steps = latency["bench"]["geometry"], latency["bench"]["steps"]
        size = f"{8 * geometry['width']}×{8 * geometry['height']}, batch {geometry['batch']}"
        parts += [Heading(f"{title}, {size}, {steps} {'step' if steps == 1 else 'steps'}")]
        parts += render_latency(latency, found.get("limit", {}))
    else:
        parts.append(Heading(title))
    if rows := found.get("parity", {}).get("rows"):
        parts += [
            Heading(f"Parity of {title}", 3),
            Paragraph(_PARITY),
            Table(_PARITY_HEADERS, [describe_parity(row) for row in rows]),
        ]
    if preparation := list(list_preparation(found)):
        parts += [Heading(f"Preparing {title}", 3), Table(("what", "seconds"), preparation)]
    reasons = [f"{part} ended early: {values['reason']}" for part, values in found.items() if values.get("reason")]
    return [*parts, Points(reasons)] if reasons else parts


_PARITY = (
    "Against PyTorch in float32 with the same weights, TF32 off: the largest difference as a share of the largest value, the "
    "worst of all outputs; and the worst ratio to eager PyTorch's own error in that precision at the same output. The UNet's "
    "image is compared with control off, on, and with each slot exchanged alone; of the ControlNet every residual. "
    "Up to 4.00 times passes; on TensorRT in half precision, in which it also sums, up to 12.00."
)
_PARITY_HEADERS = ("backend", "precision", "model", "outputs", "worst error", "where", "times PyTorch's own", "verdict")


def describe_parity(row: Record) -> tuple[Cell, ...]:
    name = {"unet": "UNet", "controlnet": "ControlNet"}[row["role"]]
    if row.get("reason"):
        return (row["backend"], row["precision"], name, "", "", "", "", f"not run: {row['reason']}")
    ratio = f"{float(row['ratio']):.2f}× ({row['ratio_at']})" if row["backend"] != "torch" else "1.00× (itself)"
    verdict = "PARITY" if row["passes"] else "BROKEN"
    return (
        row["backend"],
        row["precision"],
        name,
        str(row["compared"]),
        f"{float(row['error']):.1e}",
        row["at"],
        ratio,
        verdict,
    )


def render_latency(latency: Record, limit: Record) -> list[Part]:
    bench = latency["bench"]
    ran = {timing["backend"]: timing for timing in bench["timings"] if timing["frames"]}
    rows = [describe_timing(timing, ran) for timing in ran.values()]
    headers = ("backend", "UNet ms", "ControlNet ms", "hand-over ms", "frame ms", "× eager", "× reduce-overhead")
    parts: list[Part] = [Table(headers, rows)]
    if "rate" in limit:
        flops = [limit["flops"][role] for role in ("unet", "controlnet")]
        unet, net = (1000 * count / limit["rate"] for count in flops)
        times = f"{unet:.2f}", f"{net:.2f}", "", f"{unet + net:.2f}"
        rows.append(("limit of the arithmetic", *times, *compare(unet + net, ran)))
        counted, rate = " + ".join(f"{count / 1e12:.2f}" for count in flops), f"{limit['rate'] / 1e12:.0f} TFLOP/s"
        reached = f"a product of two matrices of {limit['side']}×{limit['side']} reached here"
        parts.append(Paragraph(f"The limit is {counted} TFLOP at {rate}, which {reached}."))
    pictures = [describe_picture(timing) for timing in ran.values() if "picture" in timing]
    headers = ("backend", "picture ms", "with the VAE compiled", "frames", "VAE", "text", "GPU memory MiB", "ready s")
    parts += [Heading("A whole picture, and what a start takes", 3), Table(headers, pictures)]
    notes = [f"{part['name']}: {describe_part(part)}" for part in bench["parts"]]
    notes.append("GPU memory is what loading and the first frames took, ready how long, with what was compiled before found")
    notes += [f"{timing['backend']}: ControlNets: {timing['controlnets']}" for timing in ran.values() if timing["controlnets"]]
    notes += [f"{timing['backend']} did not run: {timing['reason']}" for timing in bench["timings"] if timing["reason"]]
    return [*parts, Points(notes)]


def median_of(timing: Record, part: str) -> float:
    return statistics.median(frame[part] for frame in timing["frames"])


def compare(milliseconds: float, ran: Mapping[str, Record]) -> tuple[str, str]:
    """Return the ratios to the two baselines; lower is faster."""
    base = [ran[name]["median_ms"] if name in ran else None for name in ("torch", "torch-reduce-overhead")]
    first, second = (_NOT_MEASURED if value is None else f"{milliseconds / value:.2f}×" for value in base)
    return first, second


def describe_timing(timing: Record, ran: Mapping[str, Record]) -> tuple[Cell, ...]:
    parts = (f"{median_of(timing, part):.2f}" for part in ("unet", "controlnet", "handover"))
    return (timing["backend"], *parts, f"{timing['median_ms']:.2f}", *compare(timing["median_ms"], ran))


def describe_picture(timing: Record) -> tuple[Cell, ...]:
    picture, fast = timing["picture"], timing["picture_vae_compiled"]
    shares = (f"{100 * picture['shares'][part]:.1f}%" for part in ("frames", "decode", "text"))
    memory = _NOT_MEASURED if timing["memory"] is None else f"{timing['memory'] / 2**20:.0f}"
    ready = _NOT_MEASURED if timing["seconds"] is None else f"{timing['seconds']:.1f}"
    return (timing["backend"], f"{picture['total']:.1f}", f"{fast['total']:.1f}", *shares, memory, ready)


def describe_part(part: Record) -> str:
    if part["eager"] is None:
        return f"not timed: {part['reason']}"
    compiled = f", {part['compiled']:.2f} compiled" if part["compiled"] is not None else ""
    return f"{part['eager']:.2f} ms{compiled} ({part['ran']})"


def list_preparation(found: Mapping[str, Record]) -> Iterator[Sequence[Cell]]:
    for row in found.get("prepare", {}).get("steps", ()):
        yield row["step"], f"not done: {row['reason']}" if row["reason"] else f"{row['seconds']:.0f}"
    latency = found.get("latency", {})
    for row in latency.get("compiled_first", ()):
        title = f"{row['backend']}, compiled for the first time" + (", side by side" if row.get("side_by_side", 1) > 1 else "")
        if row["reason"]:
            yield title, f"not done: {row['reason']}"
        else:
            yield title, f"{row['ready']:.0f} (UNet {row['unet']:.0f}, ControlNet {row['controlnet']:.0f})"
    for timing in latency.get("bench", {}).get("timings", ()):
        if timing["seconds"] is not None:
            again = ", compiled before" if timing["backend"] in ("torch-compile", "torch-reduce-overhead") else ""
            yield f"{timing['backend']}, from loading to the fifth frame{again}", f"{timing['seconds']:.1f}"


def tabulate_what_ran(record: Record) -> Table:
    """Return which models each backend ran on this card, and that it ran none on any other kind of card."""
    machine = record["machine"]
    capability = machine.get("capability", "")
    others = [card for card, starts in CARDS.items() if not (capability and capability.startswith(starts))]
    ran: dict[str, set[str]] = {name: set() for name in BACKENDS}
    for key, part in record["parts"].items():
        for timing in part.get("bench", {}).get("timings", ()):
            if timing["frames"]:
                ran[timing["backend"]].add(TITLES[key.partition("/")[0]])
    rows: list[Sequence[Cell]] = []
    for backend in (*BACKENDS, "rtx"):
        models = ", ".join(title for title in TITLES.values() if title in ran.get(backend, ())) or "not run"
        rows.append((backend, models, *("not run" for _ in others)))
    return Table(("backend", machine["gpu"], *others), rows)
