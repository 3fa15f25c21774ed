"""Every fault there is a name for, at one geometry."""

from __future__ import annotations

from shapecheck.faults.edits import edits
from shapecheck.faults.fault import Fault, alike
from shapecheck.faults.hints import Hints
from shapecheck.faults.rules import rules
from shapecheck.faults.singles import singles
from shapecheck.faults.table import Table

NONE = Hints()


def mistakes(table: Table, hints: Hints = NONE) -> list[tuple[Fault, ...]]:
    """All faults, those that lead to one table together."""
    return [
        each for each in alike((*rules(table, hints), *edits(table), *singles(table, hints))) if each[0].given != table.right
    ]
