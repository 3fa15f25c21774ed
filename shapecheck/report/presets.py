"""The list of presets, for people and for machines."""

from __future__ import annotations

import json
from dataclasses import asdict

from tabulate import tabulate

from shapecheck import presets
from shapecheck.report.tables import wrapped


def told(form: str) -> str:
    """Every preset with its kind and family, and below the table where its config was checked."""
    every = [presets.load(name) for name in presets.names()]
    if form == "json":
        return json.dumps([asdict(preset) for preset in every], indent=1) + "\n"
    rows = [(each.name, each.kind, each.family, each.title, "checked" if each.verified else "unverified") for each in every]
    headers = ("preset", "kind", "family", "model", "config")
    table = tabulate(rows, headers, tablefmt="github" if form == "markdown" else "simple", disable_numparse=True)
    if form == "markdown":
        heading, lines = "## Where each config was checked", [f"- {each.name}: {each.checked}" for each in every]
    else:
        heading, lines = "Where each config was checked", [wrapped(f"{each.name}: {each.checked}", "    ") for each in every]
    return "\n\n".join((table, heading, "\n".join(lines))) + "\n"
