"""The page of a parity run."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from shapecheck.parity import summary
from shapecheck.parity.drawing import draw_unet
from shapecheck.parity.findings import suggest_command
from shapecheck.parity.json_record import OUTPUTS, record_parity
from shapecheck.parity.results import KINDS, CheckKind, Parity, Result, Status
from shapecheck.report.pages import Place, open_template


@dataclass(frozen=True, slots=True)
class Row:
    """One check, its values in the JSON, and what it is called on the page."""

    result: Result
    values: Place
    name: str
    message: str


def render_page(parity: Parity) -> str:
    """Return the page. Every number on it names its place in the JSON inside: `data-path`, and `data-value` as JSON has it."""
    values = Place(record_parity(parity))
    return open_template("parity/parity.html.j2").render(
        parity=parity,
        sections=[_describe_side(parity, index, values["sides"][index]) for index in range(len(parity.sides))],
        summary=summary,
        command=suggest_command(parity),
        values=values,
        outputs=OUTPUTS,
    )


def _describe_side(parity: Parity, index: int, place: Place) -> dict[str, Any]:
    side = parity.sides[index]
    rows = []
    for number, result in enumerate(side.results):
        about = summary.describe_subject(result)
        message = summary.describe_reason(result).removeprefix(about).lstrip(" :") or result.reason
        rows.append(Row(result, place["results"][number], about.removeprefix("case "), message))
    slots = _choose_rows(rows, "slot")
    results = {name: row.result for name, row in slots.items()}
    return {
        "side": side,
        "place": place,
        "tallies": [*_tally(side.results)],
        "rows": rows,
        "inputs": [*_choose_rows(rows, "input").values()],
        "slots": slots,
        "drawing": draw_unet(parity.contract, results) if side.results and parity.contract.role == "unet" else None,
    }


def _choose_rows(rows: Sequence[Row], kind: CheckKind) -> dict[str, Row]:
    """Return by slot or input the worst of its checks, which decides how it is drawn."""
    order: tuple[Status, ...] = ("not run", "passed", "failed")
    of_kind = [row for row in rows if row.result.check.kind == kind]
    return {row.result.check.where: row for row in sorted(of_kind, key=lambda row: order.index(row.result.status))}


def _tally(results: Sequence[Result]) -> Iterator[tuple[str, Status, int, int]]:
    """Yield for each kind of checks its name, the worst status, how many passed, and how many there are."""
    for kind in KINDS:
        statuses = [result.status for result in results if result.check.kind == kind]
        if statuses:
            worst: Status = "failed" if "failed" in statuses else "not run" if "not run" in statuses else "passed"
            name = f"{kind}s" if kind in ("case", "input", "slot") else kind
            yield name, worst, statuses.count("passed"), len(statuses)
