"""List every fault there is a name for, at one geometry."""

from __future__ import annotations

from typing import get_args

from shapecheck.explain.fault import Fault, FaultKind
from shapecheck.explain.hints import Hints
from shapecheck.explain.reordered import list_reordered
from shapecheck.explain.residual_table import ResidualShapes, ResidualTable
from shapecheck.explain.single_residual import list_single
from shapecheck.explain.wrong_tables import list_wrong_tables

_ORDER = get_args(FaultKind)


def list_faults(table: ResidualTable, hints: Hints = Hints()) -> list[tuple[Fault, ...]]:  # noqa: B008  # it is frozen
    """Return all faults, those that lead to one and the same table together, since no shape can tell them apart."""
    faults = (*list_wrong_tables(table, hints), *list_reordered(table), *list_single(table, hints))
    tables: dict[ResidualShapes, list[Fault]] = {}
    for fault in sorted(faults, key=lambda fault: _ORDER.index(fault.kind)):
        if fault.given != table.right:
            tables.setdefault(fault.given, []).append(fault)
    return [tuple(alike) for alike in tables.values()]
