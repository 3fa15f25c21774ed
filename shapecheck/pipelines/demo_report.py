"""Render the result of the demo as text, Markdown, JSON, or a page that holds its pictures."""

from __future__ import annotations

import base64
import math
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

from shapecheck.doctor.environment import BACKENDS
from shapecheck.files import atomic_write
from shapecheck.pipelines.demo_record import Demo
from shapecheck.report.document import Document, Facts, Format, Heading, Part, Points, Table
from shapecheck.report.numbers import dump_json, format_number
from shapecheck.report.pages import open_template


def render_text(demo: Demo, form: Format = "human") -> str:
    """Return the verdict, the numbers and what ran; in Markdown the pictures too, as files beside it."""
    files = ["index.html", "demo.json", "demo.md", *(picture.file for picture in demo.pictures)]
    facts = [*_list_numbers(demo), *_list_facts(demo), ("written", ", ".join(files))]
    parts: list[Part] = [Facts(facts), Points(_list_notes(demo), "note: ")]
    if form == "markdown":
        rows = [(f"![{picture.file}]({picture.file})", picture.caption) for picture in demo.pictures]
        parts += [Heading("Pictures"), Table(("picture", "what it is"), rows)]
    return Document(_make_title(demo), parts, [f"{demo.verdict}: {_describe_result(demo)}"], wraps_verdict=True).render(form)


def render_json(demo: Demo) -> str:
    """Return the whole record, and what follows from it."""
    derived = {"verdict": demo.verdict.lower(), "passes": demo.passes, "times_faster": demo.times_faster}
    return dump_json({"shapecheck_demo": 1} | derived | asdict(demo) | {"versions": dict(demo.versions)})


def render_page(demo: Demo, pictures: Mapping[str, bytes]) -> str:
    """Return one page that needs nothing but itself. `pictures` are the PNG files, by the names in the record."""
    return open_template("pipelines/demo.html.j2").render(
        demo=demo,
        title=_make_title(demo),
        sentence=_describe_result(demo),
        status={"PARITY": "passed", "NOT JUDGED": "not run", "BROKEN": "failed"}[demo.verdict],
        pictures=[(picture.caption, base64.b64encode(pictures[picture.file]).decode()) for picture in demo.pictures],
        notes=_list_notes(demo),
        numbers=_list_numbers(demo),
        facts=_list_facts(demo),
    )


def write_all(demo: Demo, folder: Path) -> None:
    """Write demo.json, demo.md and index.html into the folder that holds the pictures, each when it is whole.

    Raises ShapecheckError if the folder cannot be written.
    """
    pictures = {picture.file: (folder / picture.file).read_bytes() for picture in demo.pictures}
    page, markdown = render_page(demo, pictures), render_text(demo, "markdown")
    for name, text in {"demo.json": render_json(demo), "demo.md": markdown, "index.html": page}.items():
        with atomic_write(folder / name) as partial:
            partial.write_text(text, encoding="utf-8", errors="backslashreplace")


def _describe_result(demo: Demo) -> str:
    largest, average = _format_level(demo.difference.largest), _format_level(demo.difference.mean)
    control, control_average = _format_level(demo.control.largest), _format_level(demo.control.mean)
    if demo.passes:
        acts = f"the ControlNet changes it by up to {control}"
        if demo.allowed is None:
            return f"{demo.backend} and PyTorch differ by at most {largest} of 255, in {demo.precision}; {acts}"
        return f"{demo.backend} draws PyTorch's picture, at most {largest} of 255 apart; {acts}"
    faults = []
    if demo.allowed is not None:
        if not demo.difference.largest <= demo.allowed:
            allowed = _format_level(demo.allowed)
            faults.append(f"{demo.backend} does not draw PyTorch's picture: they are {largest} of 255 apart, {allowed} allowed")
    elif not math.isfinite(demo.difference.largest):
        faults.append(f"{demo.backend} and PyTorch differ by {largest}: a picture holds values that are not numbers")
    elif not demo.difference.mean < demo.control.mean:
        distance = f"on average {average} of 255 from PyTorch's picture"
        faults.append(f"{demo.backend} is {distance}, which the ControlNet changes by {control_average}")
    if not demo.acted:
        ignored = "a backend that ignores it would not be noticed"
        faults.append(f"the ControlNet changes PyTorch's picture by {control} of 255: {ignored}")
    return "; ".join(faults)


def _make_title(demo: Demo) -> str:
    return f"Demo: {BACKENDS[demo.backend]} in the place of PyTorch's UNet"


def _format_level(value: float) -> str:
    return format_number(value, "level")


def _list_numbers(demo: Demo) -> list[tuple[str, str]]:
    limit = "not judged" if demo.allowed is None else f"{_format_level(demo.allowed)} allowed"
    difference, effect = (
        f"at most {_format_level(change.largest)} of 255, {_format_level(change.mean)} on average"
        for change in (demo.difference, demo.control)
    )
    rate = f"{format_number(demo.times_faster, 'times')} as fast; the ControlNet runs in PyTorch in both"
    return [
        ("difference", f"{difference}, {limit}"),
        ("effect of the ControlNet", effect),
        ("a step in PyTorch", format_number(1000 * demo.torch_seconds, "milliseconds")),
        (f"a step with {demo.backend}", f"{format_number(1000 * demo.backend_seconds, 'milliseconds')}, {rate}"),
    ]


def _list_facts(demo: Demo) -> list[tuple[str, str]]:
    width, height = demo.size_px
    return [
        ("model", demo.model),
        ("ControlNet", demo.controlnet),
        ("prompt", demo.prompt or "(empty)"),
        ("picture", f"{width}x{height} pixels, {demo.steps} steps, seed {demo.seed}"),
        ("ran", f"{BACKENDS[demo.backend]} ({demo.device}), {demo.precision}"),
        ("artefact", demo.artefact or "none: compiled in this process"),
        ("contract", f"{demo.contract}, {demo.slots} slots"),
        ("versions", ", ".join(f"{name} {release}" for name, release in demo.versions)),
    ]


def _list_notes(demo: Demo) -> list[str]:
    textures = "The weights are random: these are textures, no chairs. What counts is that both pictures are the same, and that"
    not_judged = "In half precision rounding alone moves a picture, so the difference is reported and not judged."
    return [f"{textures} the ControlNet changes them."] * demo.random + [not_judged] * (demo.allowed is None)
