"""The list of presets, for people and for machines."""

from __future__ import annotations

from dataclasses import asdict

from shapecheck import presets
from shapecheck.report.document import Document, Heading, Part, Points, Table
from shapecheck.report.numbers import dump_json


def render(form: str) -> str:
    """Return every preset with its kind and family, and for people below the table where its config was checked."""
    every = [presets.load(name) for name in presets.names()]
    if form == "json":
        return dump_json([asdict(preset) for preset in every], ascii_only=True)
    rows = [
        (preset.name, preset.kind, preset.family, preset.title, "checked" if preset.verified else "unverified")
        for preset in every
    ]
    checked = Points([f"{preset.name}: {preset.checked}" for preset in every])
    parts: list[Part] = [
        Table(("preset", "kind", "family", "model", "config"), rows),
        Heading("Where each config was checked"),
        checked,
    ]
    return Document("", parts).render("markdown" if form == "markdown" else "human")
