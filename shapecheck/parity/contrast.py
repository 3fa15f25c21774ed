"""Say what all rows that a backend computes wrongly have in common, and the fewest others."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

from shapecheck.parity.cases import ForwardCase, Row, list_rows

_LEAST = 0.6
"""The least share of wrong rows among those that have something in common: in a half precision a tolerance hides some."""
Holds = Callable[["JudgedRow"], bool]


@dataclass(frozen=True, slots=True)
class JudgedRow:
    """One row of a call, and whether it is PyTorch's."""

    case: ForwardCase
    number: int
    passes: bool
    numbers: Mapping[str, float] = field(default_factory=dict)
    """The inputs that are one number a row, by name: strength and label."""

    @property
    def given(self) -> Row:
        return list_rows(self.case)[self.number]

    @property
    def cells(self) -> int:
        return self.case.geometry.height * self.case.geometry.width


def describe_contrast(rows: Sequence[JudgedRow]) -> str:
    """Return what all wrong rows have in common and the fewest others: "differs only in rows 3 and later of a batch".

    What fits equally well is told too, as calls do not tell it apart. Empty if nothing that is varied fits.
    """
    wrong = [row for row in rows if not row.passes]
    on = [row for row in rows if row.given.frames]
    found = [(_measure_share(holds, wrong, rows), f"differs only {words}") for holds, words in _list_common(wrong, rows)]
    if len(on) < len(rows) and all(row.given.frames for row in wrong):
        found += [
            (_measure_share(holds, wrong, on), f"differs with control on, and only {words}")
            for holds, words in _list_common(wrong, on)
            if any(holds(row) for row in rows if not row.given.frames)
        ]
    best = max((share for share, _ in found), default=0.0)
    return ", or ".join(words for share, words in found if share == best) if best >= _LEAST else ""


def _measure_share(holds: Holds, wrong: Sequence[JudgedRow], rows: Sequence[JudgedRow]) -> float:
    return len(wrong) / sum(map(holds, rows))


def _list_common(wrong: Sequence[JudgedRow], rows: Sequence[JudgedRow]) -> Iterator[tuple[Holds, str]]:
    """Yield what holds for every wrong row and not for all rows, with its words, in the order in which it is told."""
    if not wrong:
        return
    at = min((row.case.geometry for row in wrong), key=lambda geometry: geometry.height * geometry.width)
    numbers: list[tuple[Callable[[JudgedRow], float], str, str]] = [
        (lambda row: row.case.geometry.tokens, "with {:g} tokens, not with {:g}", "with {:g} tokens, not with {:g}"),
        (lambda row: row.cells, f"above {{1:,g}} cells ({at.height}×{at.width})", ""),
        (lambda row: row.case.geometry.batch, "in a batch of {:g}, not of {:g}", "in a batch of {:g}, not of {:g}"),
        (lambda row: row.number, "in rows {:g} and later of a batch", "in rows up to {:g} of a batch"),
        (
            lambda row: row.given.timestep,
            "at timestep {:g} and above, not at {:g} and below",
            "at timestep {:g} and below, not at {:g} and above",
        ),
    ]
    for name in wrong[0].numbers:
        above = f"with {name} {{:g}} and above, not {{:g}} and below"
        numbers.append((partial(_read_number, name), above, f"with {name} {{:g}} and below, not {{:g}} and above"))
    for value, above, below in numbers:
        least, most = min(map(value, wrong)), max(map(value, wrong))
        if less := [value(row) for row in rows if value(row) < least]:
            yield partial(_is_within, value, least, math.inf), above.format(least, max(less))
        if below and (more := [value(row) for row in rows if value(row) > most]):
            yield partial(_is_within, value, -math.inf, most), below.format(most, min(more))
    kinds: list[tuple[Holds, str]] = [
        (lambda row: row.given.is_strong, "with strong residuals, of which many are beyond ±8"),
        (lambda row: row.given.is_noisy, "with latents as wide as an Euler-type scheduler's first (to ±50)"),
        (lambda row: row.given.has_outliers, "with text that has the outliers of real encoders (to ±33)"),
        (lambda row: len(row.given.frames) > 1, "where the residuals of two ControlNets are added"),
        (lambda row: row.case.pooled, "where residuals are pooled"),
        (
            lambda row: row.given.is_strong or row.given.is_noisy,
            "where sums are large: with strong residuals, or latents as wide as an Euler-type scheduler's first",
        ),
        (lambda row: bool(row.given.frames), "with control on"),
        (lambda row: not row.given.frames, "with control off"),
    ]
    for holds, words in kinds:
        if all(map(holds, wrong)) and not all(map(holds, rows)):
            yield holds, words


def _read_number(name: str, row: JudgedRow) -> float:
    return row.numbers[name]


def _is_within(value: Callable[[JudgedRow], float], least: float, most: float, row: JudgedRow) -> bool:
    return least <= value(row) <= most
