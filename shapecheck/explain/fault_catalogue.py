"""Every fault there is a name for, at one geometry."""

from __future__ import annotations

from shapecheck.explain.fault import Fault, alike
from shapecheck.explain.hints import Hints
from shapecheck.explain.reordered import edits
from shapecheck.explain.residual_table import Table
from shapecheck.explain.single_residual import singles
from shapecheck.explain.wrong_tables import rules

NONE = Hints()


def mistakes(table: Table, hints: Hints = NONE) -> list[tuple[Fault, ...]]:
    """All faults, those that lead to one table together."""
    return [
        each for each in alike((*rules(table, hints), *edits(table), *singles(table, hints))) if each[0].given != table.right
    ]
