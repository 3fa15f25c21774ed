"""The list of presets, for people and for machines."""

from __future__ import annotations

import json
from dataclasses import asdict

from tabulate import tabulate

from shapecheck import presets


def told(form: str) -> str:
    """Every preset with its kind, family and where its config was checked."""
    every = [presets.load(name) for name in presets.names()]
    if form == "json":
        return json.dumps([asdict(preset) for preset in every], indent=1) + "\n"
    rows = [(each.name, each.kind, each.family, each.title, "" if each.verified else "unverified") for each in every]
    style = "github" if form == "markdown" else "simple"
    return tabulate(rows, ("preset", "kind", "family", "model", ""), tablefmt=style, disable_numparse=True) + "\n"
