"""The pieces every report is made of: headings, facts, tables and wrapped text, for people or as Markdown."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from typing import Any, Literal

from tabulate import tabulate

from shapecheck.contract import Mismatch
from shapecheck.contract.naming import SHAPECHECK, is_feature
from shapecheck.contract.records import shape_or_words

Format = Literal["human", "markdown"]
LINE = 100
"""Columns a person's text is wrapped at."""
_COLUMN = 40
_WRAPPED = (
    "ControlNet gives", "adapter gives", "claimed", "the file has", "the engine has", "given", "UNet takes", "it should have",
    "it should be", "likely cause", "A", "B",
)  # fmt: skip
_LONG = {"what was done": 78, "change": 84, "verdict": 60}
"""Widths of columns that hold sentences."""


def heading(text: str, form: Format) -> str:
    """What stands over a table."""
    return f"## {text}" if form == "markdown" else text


def fact_list(facts: Sequence[tuple[str, str]], form: Format) -> str:
    """One line a fact, each under its name."""
    if form == "markdown":
        return "\n".join(f"- {name}: {value}" for name, value in facts)
    return tabulate(facts, tablefmt="plain", disable_numparse=True)


def note_list(notes: Sequence[str], form: Format) -> str:
    """One paragraph a note."""
    if form == "markdown":
        return "\n".join(f"- {note}" for note in notes)
    return "\n".join(wrapped(f"note: {note}", "      ") for note in notes)


def clean(text: str, form: Format) -> str:
    """On one line, without what steers a terminal; in Markdown without what would be read as HTML or end a cell."""
    line = "".join(each if each.isprintable() else " " if each.isspace() else ascii(each)[1:-1] for each in text)
    return line.replace("<", "\\<").replace("|", "\\|") if form == "markdown" else line


def wrapped(text: str, indent: str) -> str:
    """For people: lines of at most LINE columns, but no path or address broken."""
    return textwrap.fill(text, LINE, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)


def table(rows: Sequence[Sequence[Any]], headers: Sequence[str], form: Format) -> str:
    """Rows under their headers, without columns that are empty in every row."""
    if not rows:
        return "none"
    kept = [at for at, _ in enumerate(headers) if any(row[at] != "" for row in rows)]
    rows, headers = [[row[at] for at in kept] for row in rows], [headers[at] for at in kept]
    sides = ["right" if isinstance(cell, int) else "left" for cell in rows[0]]
    if form == "markdown":
        return tabulate(rows, headers, tablefmt="github", disable_numparse=True, colalign=sides)
    widest = [_COLUMN if header in _WRAPPED else _LONG.get(header) for header in headers]
    body = [headers, *rows]  # a header given as such is padded by two columns
    lines = tabulate(body, tablefmt="simple", disable_numparse=True, colalign=sides, maxcolwidths=widest).splitlines()
    return "\n".join([lines[1], lines[0], *lines[2:-1]])


def mismatch_table(mismatches: Sequence[Mismatch], form: Format, given: str, wanted: str = "UNet takes") -> str:
    """Every mismatch, less the cause that all of them share."""
    emitter = "adapter module" if all(is_feature(each.where) for each in mismatches) else "ControlNet module"
    headers = ("where", "kind", given, wanted, "UNet module", "ControlNet", emitter, "likely cause")
    shared = shared_cause(mismatches)
    several = len({each.controlnet for each in mismatches}) > 1
    usual = form == "human" and all(map(_is_of_the_slot, mismatches))
    rows = [
        (
            each.where,
            each.kind,
            *_sides(each),
            each.unet_module,
            each.controlnet if several else "",
            "" if usual else each.controlnet_module,
            each.cause.removeprefix(shared).removeprefix("; ") if shared else each.cause,
        )
        for each in mismatches
    ]
    told = table(rows, headers, form)
    at = next((each.geometry for each in mismatches if each.geometry), None)
    return f"{told}\n\nTold at {at}." if at else told


def _is_of_the_slot(mismatch: Mismatch) -> bool:
    """Whether the ControlNet's module is the one any reader expects."""
    number = SHAPECHECK.index(mismatch.where)
    module = "controlnet_mid_block" if number == -1 else f"controlnet_down_blocks.{number}"
    return is_feature(mismatch.where) or mismatch.controlnet_module in ("", module)


def _sides(mismatch: Mismatch) -> tuple[str, str]:
    return shape_or_words(mismatch.observed), shape_or_words(mismatch.expected)


def shared_cause(mismatches: Sequence[Mismatch]) -> str:
    """The cause that every mismatch names first, to be told once."""
    firsts = {each.cause.split("; ")[0] for each in mismatches}
    return firsts.pop() if len(firsts) == 1 and len(mismatches) > 1 else ""
