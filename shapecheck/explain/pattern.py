"""Describe what a tool prints: fixed words, an expression around them whose groups name facts, and the symptom they make."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import NamedTuple

from shapecheck.contract import Shape
from shapecheck.explain.symptom import Symptom, SymptomKind

# Groups of a pattern: each is named after the fact of the symptom that it holds; low and high are its bounds.
WANTED, GIVEN, AXIS = r"(?P<wanted>\d+)", r"(?P<given>\d+)", r"(?P<axis>\d)"


WANTED_SHAPE, GIVEN_SHAPE = (rf"[\[(](?P<{shape}>[-\d, ]{{1,200}})[\])]" for shape in ("wanted_shape", "given_shape"))


NAME = r"(?P<name>[\w./:-]{1,200}\w)"


GIVEN_DTYPE, WANTED_DTYPE = (rf"(?P<{bound}>[\w.:]{{1,40}}\w)" for bound in ("low", "high"))


class Pattern(NamedTuple):
    """One thing that is said."""

    kind: SymptomKind
    source: str
    marker: str
    """Words that must be there, looked for first."""
    regex: re.Pattern[str]
    complete: Callable[[Symptom, re.Match[str]], Symptom] | None = None
    """Adds what no group holds as it stands."""

    def make_symptom(self, match: re.Match[str]) -> Symptom:
        """Make the symptom of what was found."""
        groups = {name: text for name, text in match.groupdict().items() if text is not None}
        symptom = Symptom(
            self.kind,
            self.source,
            match[0],
            axis=int(groups["axis"]) if "axis" in groups else None,
            wanted=parse_size(groups.get("wanted", "")),
            given=parse_size(groups.get("given", "")),
            wanted_shape=parse_shape(groups.get("wanted_shape", "")),
            given_shape=parse_shape(groups.get("given_shape", "")),
            names=(groups["name"],) if "name" in groups else _find_names(groups.get("names", "")),
            bounds=(groups.get("low", ""), groups.get("high", "")),
        )
        return self.complete(symptom, match) if self.complete else symptom


def pattern(
    kind: SymptomKind,
    source: str,
    marker: str,
    regex: str = "",
    complete: Callable[[Symptom, re.Match[str]], Symptom] | None = None,
) -> Pattern:
    """Make a pattern that is looked for around `marker`; without an expression it is the marker alone."""
    return Pattern(kind, source, marker, re.compile(regex or re.escape(marker)), complete)


def parse_size(text: str) -> int | None:
    """Return a size, as far as it is one that a tensor may have."""
    return int(text) if text.isascii() and text.isdigit() and len(text) < 10 else None


def parse_shape(text: str) -> Shape:
    """Return the sizes of a shape, -1 for one that is free; nothing if one is no number."""
    parts = [part.strip() for part in text.split(",") if part.strip()]
    if not all(re.fullmatch(r"-?\d{1,9}", part) for part in parts) or len(parts) > 8:
        return ()
    return tuple(map(int, parts))


def _find_names(text: str) -> tuple[str, ...]:
    """Return the names between quotation marks by the numbers in them: down_block_2 before down_block_10."""

    def numbers(name: str) -> tuple[object, ...]:
        return tuple((int(part[:9]), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name))

    return tuple(sorted(re.findall(r"'([^']{1,200})'", text), key=numbers))
