"""A table of residuals in the text of a Python file: which of the values in it is the table, or why none is taken for it."""

from __future__ import annotations

import ast
import re
from collections.abc import Sequence
from typing import Any, Literal

from shapecheck.contract import Geometry, ShapecheckError
from shapecheck.explain.mapping_python_values import WRITE, File, Named, Refused
from shapecheck.explain.mapping_values import is_list_of_shapes, is_one_shape, is_pair, is_residual, side, slot_number

Part = Literal["down", "mid", "slot", "shapes", "widths"]


_AFTER_RESIDUALS = re.compile(r"residual|control|down|slot", re.IGNORECASE)


def read_python(text: str, origin: str, geometry: Geometry) -> tuple[Any, str]:
    """The table in a Python file, as JSON would hold it, and a note where nothing but its form says that it is the table.

    `geometry` is what names such as `height` stand for. Raises ShapecheckError with lines, where there is none, where several
    values can be it, and where it is made by what the file does.
    """
    try:
        file = File(ast.parse(text), geometry)
        return _table(list(file.named()), file.unnamed)
    except Refused as refused:
        raise ShapecheckError(f"{origin}: {refused}") from None
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise ShapecheckError(f"{origin} is no Python: {error}") from None


def _part(named: Named) -> Part | None:
    """What of a table a value is, by its name and its form."""
    sided, value = side(named.name), named.value
    if named.computed:
        written = not named.variable or isinstance(named.node, (ast.List, ast.Tuple))
        return sided or ("slot" if slot_number(named.name, () if written else None) is not None else None)
    if sided == "down":
        return "down" if isinstance(value, list) and all(map(is_residual, value)) else None
    if sided == "mid":
        return "mid" if value is None or is_residual(value) else None
    if slot_number(named.name, value) is not None:
        return "slot" if is_residual(value) or (isinstance(value, list) and not named.variable) else None
    if is_list_of_shapes(value) or is_pair(value):
        return "shapes"
    widths = isinstance(value, list) and len(value) > 1 and all(type(each) is int for each in value)
    return "widths" if widths and not is_one_shape(value) and _AFTER_RESIDUALS.search(named.name) else None


def _table(named: Sequence[Named], unnamed: str) -> tuple[Any, str]:
    used = {name for each in named if _part(each) for name in each.uses}
    found: dict[Part, list[Named]] = {"down": [], "mid": [], "slot": [], "shapes": [], "widths": []}
    for each in named:
        if (part := _part(each)) and not (each.variable and each.name in used):
            found[part].append(each)
    mids = [each for each in found["mid"] if not each.computed and each.value is not None] or found["mid"]
    downs = [each for each in found["down"] if not each.computed] or found["down"]
    after = [each for each in found["shapes"] if _AFTER_RESIDUALS.search(each.name)]
    lists = downs or after or [*found["shapes"], *found["widths"]]
    if found["slot"] and not (lists and all(each.computed for each in found["slot"])):
        mids = [each for each in mids if not (each.variable and each.computed)]
        return _by_name([*found["slot"], *mids], [*downs, *after], unnamed), ""
    if not lists:
        raise Refused(_nothing(named, mids, unnamed))
    down = _only(lists, "the table of the down residuals", found["down"])
    note = "" if downs or _AFTER_RESIDUALS.search(down.name) else f"{down.at} of the file is read as the table"
    if not mids:
        return ({"down": down.value, "mid": None} if side(down.name) and not down.variable else down.value), note
    return {"down": down.value, "mid": _only(mids, "the mid residual", found["mid"]).value}, note


def _by_name(slots: Sequence[Named], rivals: Sequence[Named], unnamed: str) -> dict[str, Any]:
    """Residuals under the names of their slots."""
    if unnamed or rivals:
        raise Refused(unnamed or _several("the table", [slots[0], *rivals]))
    named: dict[str, list[Named]] = {}
    for each in slots:
        named.setdefault(each.name, []).append(each)
    return {name: _only(several, name).value for name, several in named.items()}


def _only(candidates: Sequence[Named], what: str, others: Sequence[Named] = ()) -> Named:
    """The one that all of them are."""
    first = candidates[0]
    again = [each for each in (*candidates, *others) if each.computed and each.name == first.name]
    if first.computed or again:
        raise Refused(f"line {(again or [first])[0].line}: {first.name} is computed there; {WRITE}")
    if any(each.value != first.value for each in candidates):
        raise Refused(_several(what, candidates))
    return first


def _several(what: str, candidates: Sequence[Named]) -> str:
    told = " or ".join(dict.fromkeys(each.at for each in candidates[:6]))
    return f"{what} can be {told}; keep one in the file, or name the lists that were given down_shapes and mid_shape"


def _nothing(named: Sequence[Named], mids: Sequence[Named], unnamed: str) -> str:
    """Why there is no table."""
    if mids:
        return f"{mids[0].at} is the mid residual, and no down residuals are written out; {WRITE}"
    plain = [each for each in named if isinstance(each.value, list) and each.value and all(map(is_residual, each.value))]
    shape = next((f"; {each.at} reads as one shape" for each in plain if is_one_shape(each.value)), "")
    widths = next((f"; {each.at} is named after no residuals" for each in plain if not is_one_shape(each.value)), "")
    wanted = 'no table of residuals is written out; expected {"input_control_00": (2, 320, 64, 64), …}, or down_shapes = [(2, '
    return unnamed or f"{wanted}320, 64, 64), …] and mid_shape = (2, 1280, 8, 8){shape or widths}"
