"""Pages that need nothing but themselves, no script, no font, no image from elsewhere; and that of a parity run."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from shapecheck.parity.drawing import Drawing, Told, draw
from shapecheck.parity.json_record import record
from shapecheck.parity.results import KINDS, CheckKind, Parity, Result, Side, Status
from shapecheck.parity.summary import backend_title, counts, explained, sentence, side_status, subject, tolerance
from shapecheck.report.numbers import Style, storable, written
from shapecheck.report.pages import environment

_NUMBERS = {"NaN": float("nan"), "Infinity": float("inf"), "-Infinity": float("-inf")}


_OUTPUT: tuple[CheckKind, ...] = ("case", "switch", "cfg")


_PLURALS = {"case": "cases", "input": "inputs", "slot": "slots"}


@dataclass(frozen=True, slots=True)
class Row:
    """One check, where its numbers stand in the JSON, and what it is called on the page."""

    result: Result
    path: str
    name: str
    told: str


@dataclass(frozen=True, slots=True)
class Tally:
    """All checks of one kind: `slots 11 of 13`."""

    name: str
    status: Status
    passed: int
    total: int


@dataclass(frozen=True, slots=True)
class Section:
    """All that is said of one backend."""

    side: Side
    path: str
    anchor: str
    title: str
    status: Status
    counts: str
    tallies: tuple[Tally, ...]
    failed: tuple[Row, ...]
    unrun: tuple[Row, ...]
    inputs: tuple[Row, ...]
    cases: tuple[Row, ...]
    prints: tuple[Row, ...]
    rows: tuple[Row, ...]
    drawing: Drawing | None


def page(parity: Parity) -> str:
    """The whole page. Every number on it names its place in the JSON inside: `data-path`, and `data-value` as JSON has it."""
    values = record(parity)
    template = environment().get_template("parity/parity.html.j2")
    return template.render(
        parity=parity,
        sections=[_section(parity, index) for index in range(len(parity.sides))],
        sentence=sentence(parity),
        tolerance=tolerance(parity),
        status="passed" if parity.passes else "failed",
        embedded=_embedded(values),
        number=_Numbers(values),
    )


def _embedded(values: Mapping[str, Any]) -> str:
    """JSON that cannot end the script element it stands in: no letter of it is markup."""
    text = json.dumps(values, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    for each in "<>&\u2028\u2029":
        text = text.replace(each, f"\\u{ord(each):04x}")
    return storable(text)


class _Numbers:
    """Finds and writes the number at a path of the JSON, so that none on the page is from elsewhere."""

    def __init__(self, values: Mapping[str, Any]) -> None:
        self._values = values

    def text(self, path: str, style: Style) -> str:
        """For a person; empty where the JSON has no number there."""
        found = self._at(path)
        return "" if found is None else written(_NUMBERS[found] if isinstance(found, str) else found, style)

    def json(self, path: str) -> str:
        """As the JSON has it."""
        return json.dumps(self._at(path), allow_nan=False, separators=(",", ":"))

    def _at(self, path: str) -> Any:
        found: Any = self._values
        for step in path.split("."):
            if found is None:
                return None
            found = found[int(step)] if isinstance(found, list) else found[step]
        return found


def _section(parity: Parity, index: int) -> Section:
    side, path = parity.sides[index], f"sides.{index}"
    rows = tuple(_row(each, f"{path}.results.{number}") for number, each in enumerate(side.results))
    told = {row.result.check.where: Told(row.result.status, row.path, row.result) for row in _worst_last(rows, "slot")}
    return Section(
        side=side,
        path=path,
        anchor=f"backend-{index}",
        title=backend_title(side),
        status=side_status(side),
        counts=counts(side),
        tallies=tuple(_tallies(side.results)),
        failed=tuple(row for row in rows if row.result.status == "failed"),
        unrun=tuple(row for row in rows if row.result.status == "not run"),
        inputs=tuple({row.result.check.where: row for row in _worst_last(rows, "input")}.values()),
        cases=tuple(row for row in rows if row.result.check.kind in _OUTPUT),
        prints=tuple(row for row in rows if row.result.effect),
        rows=rows,
        drawing=draw(parity.contract, told) if side.results else None,
    )


def _row(result: Result, path: str) -> Row:
    about = subject(result)
    told = explained(result).removeprefix(about).lstrip(" :") or result.reason
    return Row(result, path, about.removeprefix("case "), told)


def _worst_last(rows: Sequence[Row], kind: CheckKind) -> list[Row]:
    """Of several checks of one slot or input, the last decides how it is drawn."""
    order: tuple[Status, ...] = ("not run", "passed", "failed")
    return sorted((row for row in rows if row.result.check.kind == kind), key=lambda row: order.index(row.result.status))


def _tallies(results: Sequence[Result]) -> Iterator[Tally]:
    for kind in KINDS:
        statuses = [each.status for each in results if each.check.kind == kind]
        if statuses:
            worst: Status = "failed" if "failed" in statuses else "not run" if "not run" in statuses else "passed"
            yield Tally(_PLURALS.get(kind, kind), worst, statuses.count("passed"), len(statuses))
