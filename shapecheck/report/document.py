"""A report, built once from headings, facts, tables and notes: text for a terminal, or Markdown."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from tabulate import tabulate

Format = Literal["human", "markdown"]
Cell = str | int
LINE = 100
"""Columns that text for a terminal is wrapped at."""
_SHAPES = (
    "ControlNet gives", "adapter gives", "claimed", "the file has", "the engine has", "given", "UNet takes", "it should have",
    "it should be", "likely cause", "A", "B",
)  # fmt: skip
_WIDTHS = {**dict.fromkeys(_SHAPES, 40), "what was done": 78, "change": 84, "verdict": 60}
"""Columns that are wrapped in a terminal, and how wide they may be."""


class Part(Protocol):
    """A piece of a report. It may hold text from outside, which `render` makes harmless."""

    def render(self, form: Format) -> str:
        """Return the text, or nothing if there is nothing to say."""


@dataclass(frozen=True, slots=True)
class Document:
    """A whole report: the verdict stands under the title, and again at the end of a text, so that it is seen in a terminal."""

    title: str
    parts: Sequence[Part]
    verdict: Sequence[str] = ()
    wraps_verdict: bool = False

    def render(self, form: Format) -> str:
        """Return the whole text."""
        lines = [clean(line, form) for line in self.verdict]
        if form == "markdown":
            verdict = "\n\n".join(f"**{line}**" for line in lines)
        else:
            verdict = "\n".join(wrap(line, "    ") if self.wraps_verdict else line for line in lines)
        title = Heading(self.title, 1).render(form) if self.title else ""
        texts = [title, verdict, *(part.render(form) for part in self.parts), verdict if form == "human" else ""]
        return "\n\n".join(text for text in texts if text) + "\n"


@dataclass(frozen=True, slots=True)
class Heading:
    """A heading; `indent` begins the later lines of a long one, None leaves it on one line."""

    text: str
    level: int = 2
    indent: str | None = None

    def render(self, form: Format) -> str:
        text = Paragraph(self.text, self.indent).render(form)
        return f"{'#' * self.level} {text}" if form == "markdown" else text


@dataclass(frozen=True, slots=True)
class Paragraph:
    """A text; `indent` as in a Heading."""

    text: str
    indent: str | None = None

    def render(self, form: Format) -> str:
        text = clean(self.text, form)
        return text if form == "markdown" or self.indent is None else wrap(text, self.indent)


@dataclass(frozen=True, slots=True)
class Lines:
    """Lines that are left as they are, for a terminal or as code."""

    lines: Sequence[str]
    indent: str = ""

    def render(self, form: Format) -> str:
        # Indented by four columns it is code in Markdown, where a backslash would be shown.
        return "\n".join(self.indent + clean(line, "human" if self.indent else form) for line in self.lines)


@dataclass(frozen=True, slots=True)
class Points:
    """One item a line, in a terminal after a label."""

    lines: Sequence[str]
    label: str = ""

    def render(self, form: Format) -> str:
        lines = [clean(line, form) for line in self.lines]
        if form == "markdown":
            return "\n".join(f"- {line}" for line in lines)
        return "\n".join(wrap(self.label + line, " " * (len(self.label) or 4)) for line in lines)


@dataclass(frozen=True, slots=True)
class Facts:
    """Values by name. A value without a name goes on with the one before; one that is empty is left out.

    `width` is where a terminal wraps the values.
    """

    pairs: Sequence[tuple[str, str]]
    width: int | None = None

    def render(self, form: Format) -> str:
        pairs = [(name, clean(value, form)) for name, value in self.pairs if value]
        if form == "markdown":
            return "".join(f"\n- {name}: {value}" if name else f"; {value}" for name, value in pairs).removeprefix("\n")
        if self.width is not None:
            pairs = [(name, wrap(value, "", self.width)) for name, value in pairs]
        return tabulate(pairs, tablefmt="plain", disable_numparse=True)


@dataclass(frozen=True, slots=True)
class Table:
    """Rows under their headers. Columns that are empty in every row are left out, in a terminal those in `spared` too.

    If it `fits`, a terminal wraps the last column so that the whole is no wider than a line.
    """

    headers: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    spared: Sequence[str] = ()
    fits: bool = False

    def render(self, form: Format) -> str:
        if not self.rows:
            return "none"
        columns: list[Sequence[Cell]] = []
        for header, *cells in zip(self.headers, *self.rows, strict=True):
            if any(cell != "" for cell in cells) and not (form == "human" and header in self.spared):
                columns.append([header, *(clean(cell, form) if isinstance(cell, str) else cell for cell in cells)])
        headers, *rows = map(list, zip(*columns, strict=True))
        sides = ["right" if isinstance(cell, int) else "left" for cell in rows[0]]
        if form == "markdown":
            return tabulate(rows, headers, tablefmt="github", disable_numparse=True, colalign=sides)
        widths = [_WIDTHS.get(header) for header in headers]
        if self.fits:
            widths[-1] = max(LINE - sum(max(len(str(cell)) for cell in column) + 2 for column in columns[:-1]), 30)
        # tabulate pads a header that is given as such by two columns.
        lines = tabulate(
            [headers, *rows], tablefmt="simple", disable_numparse=True, colalign=sides, maxcolwidths=widths
        ).splitlines()
        return "\n".join([lines[1], lines[0], *lines[2:-1]])


def clean(text: str, form: Format) -> str:
    """Return text on one line, without what steers a terminal; for Markdown without what would be HTML or end a cell."""
    line = "".join(letter if letter.isprintable() else " " if letter.isspace() else ascii(letter)[1:-1] for letter in text)
    return line.replace("<", "\\<").replace("|", "\\|") if form == "markdown" else line


def wrap(text: str, indent: str, width: int = LINE) -> str:
    """Return lines of at most that width, but break no path or address."""
    return textwrap.fill(text, width, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)
