"""Values with names in the text of a Python file: what is written out is read, and nothing is run."""

from __future__ import annotations

import ast
import operator
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from shapecheck.contract import Geometry

WRITE = "a file is read, never run: write the names and shapes out, or save them as JSON"
"""What to do where a name or a shape would have to be computed."""


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


class Refused(Exception):  # noqa: N818  # no error of this program
    """Why a file is not taken for a table."""


class _Computed(Exception):  # noqa: N818  # no error: a value that only a run would give
    pass


@dataclass(frozen=True, slots=True)
class Named:
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


class File:
    """The values of a file that have names."""

    def __init__(self, tree: ast.AST, geometry: Geometry) -> None:
        self.nodes, self.geometry = list(ast.walk(tree)), geometry
        self.steps, self.uses, self.unnamed = 0, set[str](), ""
        self.changed = {name: node.lineno for node in self.nodes if (name := _changed(node)) and isinstance(node, ast.stmt)}
        pairs = [(key.id, value) for node in self.nodes for key, value in _assigned(node) if isinstance(key, ast.Name)]
        count = Counter(name for name, _ in pairs)
        self.variables = {name: value for name, value in pairs if count[name] == 1 and name not in self.changed}

    def named(self) -> Iterator[Named]:
        """Every one. Raises Refused where the name of a residual is computed; `unnamed` says where it may be."""
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
        told = f"line {key.lineno}: the name {ast.unparse(key)[:60]} is computed; {WRITE}"
        if re.search("residual|control|down|mid", words):
            raise Refused(told)
        if isinstance(value, (ast.Tuple, ast.List)) and 3 <= len(value.elts) <= 4:
            self.unnamed = self.unnamed or told
        return None

    def _read(self, name: str, node: ast.expr, *, variable: bool) -> Named:
        changed = self.changed.get(name) if variable else None
        self.uses = set()
        try:
            if not changed:
                value = self.value(node)
                return Named(name, node, node.lineno, variable, value, uses=frozenset(self.uses))
        except _Computed:
            pass
        return Named(name, node, changed or node.lineno, variable, computed=True)

    def value(self, node: ast.expr, depth: int = 0) -> Any:
        """What an expression is, where no run is needed to tell. Raises _Computed."""
        self.steps += 1
        if self.steps > _MOST_STEPS:
            raise Refused("too much to be read as a table; save the table as JSON")
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
