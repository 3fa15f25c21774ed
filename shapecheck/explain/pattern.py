"""What a pattern is: fixed words, an expression around them, and the symptom that it comes to; and what most are made with."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import NamedTuple

from shapecheck.contract import Shape
from shapecheck.explain.symptom import Symptom, SymptomKind

SHAPE = r"[\[(]([-\d, ]{1,200})[\])]"


NAME = r"([\w./:-]{1,200}\w)"


DTYPE = r"([\w.:]{1,40}\w)"


Build = Callable[[re.Match[str]], Symptom]


class Pattern(NamedTuple):
    """How one thing that is said is recognised."""

    marker: str
    """Words that must be there, looked for first."""
    regex: re.Pattern[str]
    build: Build


def pattern(regex: str, build: Build, marker: str) -> Pattern:
    """A pattern that is looked for around `marker`."""
    return Pattern(marker, re.compile(regex), build)


def size_of(text: str) -> int | None:
    """A size, as far as it is one that a tensor may have."""
    return int(text) if text.isascii() and text.isdigit() and len(text) < 10 else None


def shape_of(text: str) -> Shape:
    """The sizes of a shape, -1 for one that is free; nothing where one is no number."""
    parts = [part.strip() for part in text.split(",") if part.strip()]
    if not all(re.fullmatch(r"-?\d{1,9}", part) for part in parts) or len(parts) > 8:
        return ()
    return tuple(map(int, parts))


def names_in(text: str) -> tuple[str, ...]:
    """Names between quotation marks, in the order of the numbers in them."""
    return tuple(sorted(re.findall(r"'([^']{1,200})'", text), key=_numbered))


def _numbered(name: str) -> tuple[object, ...]:
    """Names by the numbers in them: down_block_2 before down_block_10."""
    return tuple((int(part[:9]), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name))


def sizes(kind: SymptomKind, source: str) -> Build:
    """Two sizes: the model's own, what was given."""
    return lambda match: Symptom(kind, source, match[0], None, size_of(match[1]), size_of(match[2]))


def shapes(kind: SymptomKind, source: str) -> Build:
    """Two shapes: the model's own, what was given."""
    return lambda match: Symptom(
        kind,
        source,
        match[0],
        wanted_shape=shape_of(match[1]),
        given_shape=shape_of(match[2]),
    )


def plain(kind: SymptomKind, source: str) -> Build:
    """The words alone."""
    return lambda match: Symptom(kind, source, match[0])


def dtype(source: str, given: int, wanted: int) -> Build:
    """The groups that hold the dtype given and the one wanted; 0 for none."""
    return lambda match: Symptom(
        "dtype", source, match[0], bounds=(match[given] if given else "", match[wanted] if wanted else "")
    )


def named(kind: SymptomKind, source: str) -> Build:
    """The name of one input."""
    return lambda match: Symptom(kind, source, match[0], names=(match[1],))


def several(kind: SymptomKind, source: str) -> Build:
    """The names of several inputs."""
    return lambda match: Symptom(kind, source, match[0], names=names_in(match[1]))
