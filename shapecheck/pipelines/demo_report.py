"""What the demo came to, as text, Markdown, JSON, or a page that holds its pictures."""

from __future__ import annotations

import base64
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path

from shapecheck.doctor.environment import BACKENDS
from shapecheck.files import whole
from shapecheck.pipelines.demo_record import Demo
from shapecheck.report.numbers import named, storable, written
from shapecheck.report.pages import environment
from shapecheck.report.tables import Format, clean, fact_list, heading, note_list, table, wrapped

SCHEMA = 1


_STATUSES = {"PARITY": "passed", "NOT JUDGED": "not run", "BROKEN": "failed"}
"""From a verdict to the mark that it has on a page."""


_RANDOM = (
    "The weights are random: these are textures, no chairs. What counts is that both pictures are the same, and that the "
    "ControlNet changes them."
)


_NOT_JUDGED = "In half precision rounding alone moves a picture, so the difference is told and not judged."


def told(demo: Demo, form: Format = "human") -> str:
    """The verdict, the numbers, what ran; in Markdown the pictures too, as files beside it."""
    title, verdict = clean(_title(demo), form), clean(f"{demo.verdict}: {sentence(demo)}", form)
    parts = [
        f"# {title}" if form == "markdown" else title,
        f"**{verdict}**" if form == "markdown" else wrapped(verdict, "    "),
        fact_list([(name, clean(value, form)) for name, value in (*_numbers(demo), *_facts(demo), _files(demo))], form),
        note_list(tuple(_notes(demo)), form),
    ]
    if form == "markdown":
        rows = [(f"![{picture.file}]({picture.file})", picture.caption) for picture in demo.pictures]
        parts += [heading("Pictures", form), table(rows, ("picture", "what it is"), form)]
    return "\n\n".join(part for part in parts if part) + "\n"


def as_json(demo: Demo) -> str:
    """The whole record, and what follows from it."""
    derived = {"verdict": demo.verdict.lower(), "passes": demo.passes, "times_faster": demo.times_faster}
    values = {"shapecheck_demo": SCHEMA} | derived | asdict(demo) | {"versions": dict(demo.versions)}
    return storable(json.dumps(named(values), indent=1, ensure_ascii=False, allow_nan=False)) + "\n"


def page(demo: Demo, pictures: Mapping[str, bytes]) -> str:
    """One page that needs nothing but itself. `pictures` are the PNG files by the names that the record gives them."""
    width, height = demo.size_px
    return (
        environment()
        .get_template("pipelines/demo.html.j2")
        .render(
            demo=demo,
            title=_title(demo),
            sentence=sentence(demo),
            status=_STATUSES[demo.verdict],
            pictures=[(each.caption, base64.b64encode(pictures[each.file]).decode("ascii")) for each in demo.pictures],
            width=width,
            height=height,
            notes=tuple(_notes(demo)),
            numbers=tuple(_numbers(demo)),
            facts=tuple(_facts(demo)),
        )
    )


def sentence(demo: Demo) -> str:
    """What stands after the verdict."""
    largest, control = written(demo.difference.largest, "level"), written(demo.control.largest, "level")
    acts = f"the ControlNet changes it by up to {control}"
    if not demo.passes:
        return "; ".join(_wrong(demo))
    if demo.allowed is None:
        return f"{demo.backend} and PyTorch differ by at most {largest} of 255, in {demo.precision}; {acts}"
    return f"{demo.backend} gives PyTorch's picture, at most {largest} of 255 apart; {acts}"


def _wrong(demo: Demo) -> Iterator[str]:
    largest, control = written(demo.difference.largest, "level"), written(demo.control.largest, "level")
    if demo.allowed is None:
        if not math.isfinite(demo.difference.largest):
            yield f"{demo.backend} and PyTorch differ by {largest}: a picture holds values that are no numbers"
        elif not demo.difference.mean < demo.control.mean:
            apart, moved = (written(each.mean, "level") for each in (demo.difference, demo.control))
            yield f"{demo.backend} is on average {apart} of 255 from PyTorch's picture, which the ControlNet changes by {moved}"
    elif not demo.difference.largest <= demo.allowed:
        allowed = written(demo.allowed, "level")
        yield f"{demo.backend} does not give PyTorch's picture: they are {largest} of 255 apart, {allowed} allowed"
    if not demo.acted:
        yield f"the ControlNet changes PyTorch's picture by {control} of 255: a backend that ignores it would not be noticed"


def _title(demo: Demo) -> str:
    return f"Demo: {BACKENDS[demo.backend]} in the place of PyTorch's UNet"


def _numbers(demo: Demo) -> Iterator[tuple[str, str]]:
    """What was measured."""
    limit = "not judged" if demo.allowed is None else f"{written(demo.allowed, 'level')} allowed"
    for name, change, more in (("difference", demo.difference, f", {limit}"), ("effect of the ControlNet", demo.control, "")):
        yield name, f"at most {written(change.largest, 'level')} of 255, {written(change.mean, 'level')} on average{more}"
    yield "a step in PyTorch", written(1000 * demo.torch_seconds, "milliseconds")
    rate = f"{written(demo.times_faster, 'times')} as fast; the ControlNet runs in PyTorch in both"
    yield f"a step with {demo.backend}", f"{written(1000 * demo.backend_seconds, 'milliseconds')}, {rate}"


def _facts(demo: Demo) -> Iterator[tuple[str, str]]:
    """What ran."""
    width, height = demo.size_px
    yield "model", demo.model
    yield "ControlNet", demo.controlnet
    yield "prompt", demo.prompt
    yield "picture", f"{width}x{height} pixels, {demo.steps} steps, seed {demo.seed}"
    yield "ran", f"{BACKENDS[demo.backend]} ({demo.device}), {demo.precision}"
    yield "artefact", demo.artefact
    yield "contract", f"{demo.contract}, {demo.slots} slots"
    yield "versions", ", ".join(f"{name} {release}" for name, release in demo.versions)


def _files(demo: Demo) -> tuple[str, str]:
    return "written", ", ".join(["index.html", "demo.json", "demo.md", *(picture.file for picture in demo.pictures)])


def _notes(demo: Demo) -> Iterator[str]:
    if demo.random:
        yield _RANDOM
    if demo.allowed is None:
        yield _NOT_JUDGED


def write_all(demo: Demo, folder: Path) -> None:
    """Write demo.json, demo.md and index.html into the folder that holds the pictures, each when it is whole.

    Raises ShapecheckError where the folder cannot be written.
    """
    pictures = {each.file: (folder / each.file).read_bytes() for each in demo.pictures}
    texts = {"demo.json": as_json(demo), "demo.md": told(demo, "markdown"), "index.html": page(demo, pictures)}
    for name, text in texts.items():
        with whole(folder / name) as partial:
            partial.write_text(text, encoding="utf-8", errors="backslashreplace")
