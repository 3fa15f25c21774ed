"""A table of residuals in the text of a Python file: what is written out is read, and nothing is run."""

from __future__ import annotations

import ast
import operator
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from shapecheck.contract import Geometry, ShapecheckError
from shapecheck.faults.claim import is_list_of_shapes, is_one_shape, is_pair, is_residual, side, slot_number

Part = Literal["down", "mid", "slot", "shapes", "widths"]
_WRITE = "a file is read, never run: write the names and shapes out, or save them as JSON"
_AFTER_RESIDUALS = re.compile(r"residual|control|down|slot", re.IGNORECASE)
_CHANGES = ("append", "extend", "insert", "pop", "remove", "reverse", "clear", "sort")
_MOST_STEPS, _DEEPEST = 10**6, 40
_LARGEST, _LONGEST = 2**20, 4096
"""Of numbers, and of lists that are repeated."""
_SYMBOLS = (
    (re.compile(r"(latent_)?(height|h)", re.IGNORECASE), "height"),
    (re.compile(r"(latent_)?(width|w)", re.IGNORECASE), "width"),
    (re.compile(r"(b|bs|n|batch|batch_size|max_batch|min_batch)", re.IGNORECASE), "batch"),
)
_OPERATORS: Mapping[type[ast.operator], Callable[[int, int], int]] = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.FloorDiv: operator.floordiv
}  # fmt: skip


def read_python(text: str, origin: str, geometry: Geometry) -> tuple[Any, str]:
    """The table in a Python file, as JSON would hold it, and a note where nothing but its form says that it is the table.

    `geometry` is what names such as `height` stand for. Raises ShapecheckError with lines, where there is none, where several
    values can be it, and where it is made by what the file does.
    """
    try:
        file = _File(ast.parse(text), geometry)
        return _table(list(file.named()), file.unnamed)
    except _Refused as refused:
        raise ShapecheckError(f"{origin}: {refused}") from None
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise ShapecheckError(f"{origin} is no Python: {error}") from None


class _Refused(Exception):  # noqa: N818  # no error of this program: why a file is not taken for a table
    pass


class _Computed(Exception):  # noqa: N818  # no error: a value that only a run would give
    pass


@dataclass(frozen=True, slots=True)
class _Named:
    """A value with a name: of a variable, a key or a keyword; `node` alone where only a run would give it."""

    name: str
    node: ast.expr
    line: int
    variable: bool
    value: Any = None
    computed: bool = False
    uses: frozenset[str] = frozenset()
    """Variables its value is made of."""

    @property
    def at(self) -> str:
        """Name and line, for a person."""
        return f"{self.name or 'a list'} (line {self.line})"

    @property
    def part(self) -> Part | None:
        """What of a table it is, by its name and its form."""
        sided, value = side(self.name), self.value
        if self.computed:
            written = not self.variable or isinstance(self.node, (ast.List, ast.Tuple))
            return sided or ("slot" if slot_number(self.name, () if written else None) is not None else None)
        if sided == "down":
            return "down" if isinstance(value, list) and all(map(is_residual, value)) else None
        if sided == "mid":
            return "mid" if value is None or is_residual(value) else None
        if slot_number(self.name, value) is not None:
            return "slot" if is_residual(value) or (isinstance(value, list) and not self.variable) else None
        if is_list_of_shapes(value) or is_pair(value):
            return "shapes"
        widths = isinstance(value, list) and len(value) > 1 and all(type(each) is int for each in value)
        return "widths" if widths and not is_one_shape(value) and _AFTER_RESIDUALS.search(self.name) else None


# which of the values is the table


def _table(named: Sequence[_Named], unnamed: str) -> tuple[Any, str]:
    used = {name for each in named if each.part for name in each.uses}
    found: dict[Part, list[_Named]] = {"down": [], "mid": [], "slot": [], "shapes": [], "widths": []}
    for each in named:
        if each.part and not (each.variable and each.name in used):
            found[each.part].append(each)
    mids = [each for each in found["mid"] if not each.computed and each.value is not None] or found["mid"]
    downs = [each for each in found["down"] if not each.computed] or found["down"]
    after = [each for each in found["shapes"] if _AFTER_RESIDUALS.search(each.name)]
    lists = downs or after or [*found["shapes"], *found["widths"]]
    if found["slot"] and not (lists and all(each.computed for each in found["slot"])):
        mids = [each for each in mids if not (each.variable and each.computed)]
        return _by_name([*found["slot"], *mids], [*downs, *after], unnamed), ""
    if not lists:
        raise _Refused(_nothing(named, mids, unnamed))
    down = _only(lists, "the table of the down residuals", found["down"])
    note = "" if downs or _AFTER_RESIDUALS.search(down.name) else f"{down.at} of the file is read as the table"
    if not mids:
        return ({"down": down.value, "mid": None} if side(down.name) and not down.variable else down.value), note
    return {"down": down.value, "mid": _only(mids, "the mid residual", found["mid"]).value}, note


def _by_name(slots: Sequence[_Named], rivals: Sequence[_Named], unnamed: str) -> dict[str, Any]:
    """Residuals under the names of their slots."""
    if unnamed or rivals:
        raise _Refused(unnamed or _several("the table", [slots[0], *rivals]))
    named: dict[str, list[_Named]] = {}
    for each in slots:
        named.setdefault(each.name, []).append(each)
    return {name: _only(several, name).value for name, several in named.items()}


def _only(candidates: Sequence[_Named], what: str, others: Sequence[_Named] = ()) -> _Named:
    """The one that all of them are."""
    first = candidates[0]
    again = [each for each in (*candidates, *others) if each.computed and each.name == first.name]
    if first.computed or again:
        raise _Refused(f"line {(again or [first])[0].line}: {first.name} is computed there; {_WRITE}")
    if any(each.value != first.value for each in candidates):
        raise _Refused(_several(what, candidates))
    return first


def _several(what: str, candidates: Sequence[_Named]) -> str:
    told = " or ".join(dict.fromkeys(each.at for each in candidates[:6]))
    return f"{what} can be {told}; keep one in the file, or name the lists that were given down_shapes and mid_shape"


def _nothing(named: Sequence[_Named], mids: Sequence[_Named], unnamed: str) -> str:
    """Why there is no table."""
    if mids:
        return f"{mids[0].at} is the mid residual, and no down residuals are written out; {_WRITE}"
    plain = [each for each in named if isinstance(each.value, list) and each.value and all(map(is_residual, each.value))]
    shape = next((f"; {each.at} reads as one shape" for each in plain if is_one_shape(each.value)), "")
    widths = next((f"; {each.at} is named after no residuals" for each in plain if not is_one_shape(each.value)), "")
    wanted = 'no table of residuals is written out; expected {"input_control_00": (2, 320, 64, 64), …}, or down_shapes = [(2, '
    return unnamed or f"{wanted}320, 64, 64), …] and mid_shape = (2, 1280, 8, 8){shape or widths}"


# what is written out in the file


class _File:
    """The values of a file that have names."""

    def __init__(self, tree: ast.AST, geometry: Geometry) -> None:
        self.nodes, self.geometry = list(ast.walk(tree)), geometry
        self.steps, self.uses, self.unnamed = 0, set[str](), ""
        self.changed = {name: node.lineno for node in self.nodes if (name := _changed(node)) and isinstance(node, ast.stmt)}
        pairs = [(key.id, value) for node in self.nodes for key, value in _assigned(node) if isinstance(key, ast.Name)]
        count = Counter(name for name, _ in pairs)
        self.variables = {name: value for name, value in pairs if count[name] == 1 and name not in self.changed}

    def named(self) -> Iterator[_Named]:
        """Every one. Raises _Refused where the name of a residual is computed; `unnamed` says where it may be."""
        for node in self.nodes:
            for target, value in _assigned(node):
                if isinstance(target, ast.Name):
                    yield self._read(target.id, value, variable=True)
            for key, value in _keyed(node):
                if (name := self._key(key, value)) is not None:
                    yield self._read(name, value, variable=False)

    def _key(self, key: ast.expr | str, value: ast.expr) -> str | None:
        """A key that is written out; None where it is no text."""
        if isinstance(key, str):
            return key
        try:
            name = self.value(key)
        except _Computed:
            name = None
        if isinstance(name, str) or isinstance(key, ast.Constant):
            return name if isinstance(name, str) else None
        words = " ".join(str(each.value) for each in ast.walk(key) if isinstance(each, ast.Constant))
        told = f"line {key.lineno}: the name {ast.unparse(key)[:60]} is computed; {_WRITE}"
        if re.search("residual|control|down|mid", words):
            raise _Refused(told)
        if isinstance(value, (ast.Tuple, ast.List)) and 3 <= len(value.elts) <= 4:
            self.unnamed = self.unnamed or told
        return None

    def _read(self, name: str, node: ast.expr, *, variable: bool) -> _Named:
        changed = self.changed.get(name) if variable else None
        self.uses = set()
        try:
            if not changed:
                value = self.value(node)
                return _Named(name, node, node.lineno, variable, value, uses=frozenset(self.uses))
        except _Computed:
            pass
        return _Named(name, node, changed or node.lineno, variable, computed=True)

    def value(self, node: ast.expr, depth: int = 0) -> Any:
        """What an expression is, where no run is needed to tell. Raises _Computed."""
        self.steps += 1
        if self.steps > _MOST_STEPS:
            raise _Refused("too much to be read as a table; save the table as JSON")
        if depth > _DEEPEST:
            raise _Computed
        match node:
            case ast.Constant():
                return node.value
            case ast.List() | ast.Tuple():
                return [each for child in node.elts for each in self._elements(child, depth + 1)]
            case ast.Dict():
                pairs = [(key, each) for key, each in zip(node.keys, node.values, strict=True) if isinstance(key, ast.Constant)]
                return {key.value: self.value(each, depth + 1) for key, each in pairs}
            case ast.UnaryOp(op=ast.USub(), operand=ast.Constant(value=int(number))):
                return -number
            case ast.Call(func=ast.Attribute(attr="Size") | ast.Name(id="Size" | "tuple" | "list"), args=[inner]):
                return self.value(inner, depth + 1)
            case ast.Name():
                return self._variable(node.id, depth)
            case ast.BinOp():
                return _combined(self.value(node.left, depth + 1), node.op, self.value(node.right, depth + 1))
        raise _Computed

    def _elements(self, node: ast.expr, depth: int) -> list[Any]:
        if not isinstance(node, ast.Starred):
            return [self.value(node, depth)]
        value = self.value(node.value, depth)
        if not isinstance(value, list):
            raise _Computed
        return value

    def _variable(self, name: str, depth: int) -> Any:
        for pattern, symbol in _SYMBOLS:
            if pattern.fullmatch(name):
                return getattr(self.geometry, symbol)
        if name not in self.variables:
            raise _Computed
        self.uses.add(name)
        return self.value(self.variables[name], depth + 1)


def _combined(left: Any, sign: ast.operator, right: Any) -> Any:
    """The result of an operator on numbers, or of joining and repeating lists."""
    if isinstance(left, list) and isinstance(right, list) and isinstance(sign, ast.Add):
        return left + right
    if isinstance(left, list) and type(right) is int and isinstance(sign, ast.Mult) and len(left) * right <= _LONGEST:
        return left * right
    known = type(left) is int and type(right) is int and type(sign) in _OPERATORS
    if not known or max(abs(left), abs(right)) > _LARGEST or (right == 0 and isinstance(sign, ast.FloorDiv)):
        raise _Computed
    return _OPERATORS[type(sign)](left, right)


def _assigned(node: ast.AST) -> Iterator[tuple[ast.expr, ast.expr]]:
    """Targets of an assignment with their values; those of `DOWNS, MID = […], (…)` apart."""
    if not isinstance(node, (ast.Assign, ast.AnnAssign)) or node.value is None:
        return
    for target in node.targets if isinstance(node, ast.Assign) else [node.target]:
        if isinstance(target, ast.Tuple) and isinstance(node.value, ast.Tuple) and len(target.elts) == len(node.value.elts):
            yield from zip(target.elts, node.value.elts, strict=True)
        else:
            yield target, node.value


def _keyed(node: ast.AST) -> Iterator[tuple[ast.expr | str, ast.expr]]:
    """Keys and values of a dict, however it is made; lists that are returned, or stand alone, under no name."""
    match node:
        case ast.Dict():
            yield from ((key, value) for key, value in zip(node.keys, node.values, strict=True) if key)
        case ast.DictComp():
            yield node.key, node.value
        case ast.Call(func=ast.Name(id="dict") | ast.Attribute(attr="update")):
            yield from ((each.arg, each.value) for each in node.keywords if each.arg)
        case ast.Return(value=ast.List() | ast.Tuple() as value) | ast.Expr(value=ast.List() | ast.Tuple() as value):
            yield "", value
        case ast.Assign() | ast.AnnAssign():
            yield from ((each.slice, value) for each, value in _assigned(node) if isinstance(each, ast.Subscript))


def _changed(node: ast.AST) -> str:
    """The variable that a statement changes after it was assigned: `downs.append(…)`, `downs += …`, `downs[3] = …`."""
    match node:
        case ast.Expr(value=ast.Call(func=ast.Attribute(value=ast.Name(id=name), attr=method))) if method in _CHANGES:
            return name
        case ast.AugAssign(target=ast.Name(id=name) | ast.Subscript(value=ast.Name(id=name))):
            return name
        case ast.Assign(targets=[ast.Subscript(value=ast.Name(id=name), slice=ast.Constant(value=int()))]):
            return name
    return ""
