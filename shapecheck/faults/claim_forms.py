"""Claimed tables as people write them: 320,640@64; a list of shapes; names in JSON, TOML or Python; a saved contract."""

from __future__ import annotations

import ast
import json
import operator
import re
import tomllib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from shapecheck.contract import Contract, Geometry, ShapecheckError
from shapecheck.faults.claim import MID, Claim, Entry
from shapecheck.faults.matching import residual_index

FORMS = (
    "320,640,1280,1280@64 (sizes in cells; mid:1280@8 for the mid residual), a list of shapes such as [[320, 64, 64], …], or a "
    ".json, .toml or .py file with names such as input_control_00, with down and mid, or a saved contract"
)
_LARGEST_FILE = 2**22
_MOST_ENTRIES = 512
_DEEPEST = 8
_DOWNS = ("down", "downs", "down_block_res_samples", "down_block_additional_residuals")
_MIDS = ("mid", "mid_block_res_sample", "mid_block_additional_residual")
"""What the two sides are called: by us, by a ControlNet's output, by a UNet's forward."""
_COMPACT = re.compile(r"(mid[:=]|\+)?(\d{1,9})(?:@(\d{1,9})(?:[x×](\d{1,9}))?)?")
_LARGEST = 2**20
"""Of any axis."""


def read_claim(text: str, geometry: Geometry) -> Claim:
    """The claim written out, or in the file of that name. `geometry` is what names such as `height` in a Python file stand for,
    and where a saved contract is read.

    Raises ShapecheckError saying what was expected.
    """
    path = Path(text)
    try:
        is_file = path.is_file()
    except (OSError, ValueError):  # too long for a name, or no name at all
        is_file = False
    if is_file:
        return _from_file(path, geometry)
    text = re.sub(r"torch\.Size\((\[[^\[\]]{0,200}\])\)", r"\1", text.strip())
    if sized := re.fullmatch(r"[\[(]([\d, ]{1,4000})[\])]@([\dx×]{1,20})", text):
        return _compact(f"{sized[1]}@{sized[2]}")
    if text[:1] in ("[", "(", "{"):
        return _from_value(_literal(text), "--mapping", geometry)
    if path.suffix in (".json", ".toml", ".py"):
        raise ShapecheckError(f"--mapping: there is no file {text}")
    return _compact(text)


def _from_file(path: Path, geometry: Geometry) -> Claim:
    try:
        with path.open("rb") as file:
            text = file.read(_LARGEST_FILE + 1).decode("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ShapecheckError(f"--mapping: cannot read {path} as text: {error}") from None
    if len(text) > _LARGEST_FILE:
        raise ShapecheckError(f"--mapping: {path} is larger than {_LARGEST_FILE // 2**20} MiB, which no table of residuals is")
    if path.suffix == ".py":
        return _from_python(text, path, geometry)
    try:
        value = tomllib.loads(text) if path.suffix == ".toml" else json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ShapecheckError(f"--mapping: {path} is no {'TOML' if path.suffix == '.toml' else 'JSON'}: {error}") from None
    return _from_value(value, str(path), geometry)


def _literal(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        pass
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        raise ShapecheckError(f"--mapping: {text[:60]!r} is no list of shapes; expected {FORMS}") from None


def _compact(text: str) -> Claim:
    """`320,640,1280,1280@64`: a size stands for itself and the entries before it that have none."""
    entries: list[tuple[int, Entry]] = []
    waiting: list[int] = []
    for part in filter(None, re.split(r"[,;\s]+", text.replace("+", ",+"))):
        match = _COMPACT.fullmatch(part)
        if match is None:
            raise ShapecheckError(f"--mapping: {part[:40]!r} is no channels@size; expected {FORMS}")
        is_mid, channels, height, width = match.groups()
        index = MID if is_mid else sum(number != MID for number, _ in entries)
        size = (int(height), int(width or height)) if height else None
        entries.append((index, _checked(Entry(int(channels), size), part)))
        waiting.append(len(entries) - 1)
        if size:
            for at in waiting:
                entries[at] = (entries[at][0], Entry(entries[at][1].channels, size))
            waiting.clear()
    return _claim(entries, False, any(index == MID for index, _ in entries), "--mapping")


def _claim(entries: list[tuple[int, Entry]], named: bool, tells_mid: bool, origin: str) -> Claim:
    if not entries:
        raise ShapecheckError(f"{origin}: no residuals in it; expected {FORMS}")
    if len(entries) > _MOST_ENTRIES:
        raise ShapecheckError(f"{origin}: {len(entries)} residuals, which no UNet takes; expected {FORMS}")
    return Claim(tuple(sorted(entries, key=lambda pair: (pair[0] == MID, pair[0]))), named, tells_mid, origin)


def _from_value(value: Any, origin: str, geometry: Geometry) -> Claim:
    """A table in a value read from JSON, TOML or Python."""
    if isinstance(value, Mapping) and "shapecheck_contract" in value:
        shapes = Contract.from_json(json.dumps(value)).shapes(geometry)
        return _from_names({name: list(shape) for name, shape in shapes.items()}, origin)
    if isinstance(value, (list, tuple)):
        if len(value) == 2 and _are_shapes(value[0]) and not _is_shape(value[0]) and _is_shape(value[1]):
            return _from_sides({"down": value[0], "mid": value[1]}, origin)
        return _from_list(value, origin)
    for table in _tables(value):
        if any(name in table for name in _DOWNS):
            return _from_sides(table, origin)
        if any(residual_index(name) is not None for name in table):
            return _from_names({name: each for name, each in table.items() if residual_index(name) is not None}, origin)
    raise ShapecheckError(f"{origin}: no residuals in it; expected {FORMS}")


def _tables(value: Any, depth: int = 0) -> Iterator[Mapping[str, Any]]:
    """Every mapping in a value, the outer first."""
    if depth > _DEEPEST:
        return
    if isinstance(value, Mapping):
        yield {str(key): each for key, each in value.items()}
    children = value.values() if isinstance(value, Mapping) else value if isinstance(value, list) else ()
    for child in children:
        yield from _tables(child, depth + 1)


def _from_names(table: Mapping[str, Any], origin: str) -> Claim:
    entries = {residual_index(name): _entry(each, f"{origin}: {name}") for name, each in table.items()}
    return _claim([(index, entry) for index, entry in entries.items() if index is not None], True, True, origin)


def _from_sides(table: Mapping[str, Any], origin: str) -> Claim:
    downs, mid = (next((table[name] for name in names if name in table), None) for names in (_DOWNS, _MIDS))
    if not isinstance(downs, (list, tuple)):
        raise ShapecheckError(f"{origin}: `down` must be a list of shapes; expected {FORMS}")
    entries = [(index, _entry(each, f"{origin}: down {index}")) for index, each in enumerate(downs)]
    if mid is not None:
        entries.append((MID, _entry(mid, f"{origin}: mid")))
    return Claim(tuple(entries), False, True, origin) if not entries else _claim(entries, False, True, origin)


def _from_list(values: list[Any] | tuple[Any, ...], origin: str) -> Claim:
    entries = [(index, _entry(each, f"{origin}: entry {index}")) for index, each in enumerate(values)]
    return _claim(entries, False, False, origin)


def _is_shape(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and 3 <= len(value) <= 6 and all(type(each) is int for each in value)


def _are_shapes(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and all(map(_is_shape, value))


def _entry(value: Any, where: str) -> Entry:
    """A number of channels, a shape, or a mapping with `shape`, with `opt`, or with `channels` and `stride`."""
    if isinstance(value, Mapping):
        if (inner := value.get("shape", value.get("opt"))) is not None:
            return _entry(inner, where)
        if type(value.get("channels")) is int:
            stride = value.get("stride", value.get("scale"))
            return _checked(Entry(value["channels"], stride=stride if type(stride) is int else None), where)
    if isinstance(value, str) and re.fullmatch(r"\d{1,9}(?:[x×]\d{1,9}){2,3}", value):
        value = [int(part) for part in re.split("[x×]", value)]
    if type(value) is int:
        return _checked(Entry(value), where)
    if not _is_shape(value):
        raise ShapecheckError(
            f"{where}: expected (channels, height, width) or (batch, channels, height, width), got {str(value)[:60]!r}"
        )
    shape = tuple(value)
    if len(shape) in (3, 4):
        batch = shape[0] if len(shape) == 4 else None
        return _checked(Entry(shape[-3], (shape[-2], shape[-1]), batch=batch), where)
    return _checked(Entry(shape[0], shape=shape), where)


def _checked(entry: Entry, where: str) -> Entry:
    told = (entry.channels, *(entry.size or ()), entry.stride or 1, entry.batch or 1, *(entry.shape or ()))
    if not all(0 < size <= _LARGEST for size in told):
        raise ShapecheckError(f"{where}: sizes go from 1 to {_LARGEST}, got {', '.join(str(size)[:20] for size in told)}")
    return entry


# Python files are read, never run


def _from_python(text: str, path: Path, geometry: Geometry) -> Claim:
    try:
        tree = ast.parse(text)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise ShapecheckError(f"--mapping: {path} is no Python: {error}") from None
    names: dict[str, Any] = {}
    lists: list[Any] = []
    for node in ast.walk(tree):
        names |= dict(_named_values(node, geometry))
        if isinstance(node, ast.Assign) and isinstance(node.value, (ast.List, ast.Tuple)):
            value = _value(node.value, geometry)
            if isinstance(value, list) and value and all(_is_shape(each) or type(each) is int for each in value):
                lists.append(value)
    if names:
        return _from_names(names, str(path))
    if lists:
        return _from_list(max(lists, key=len), str(path))
    raise ShapecheckError(f"--mapping: {path} names no residuals with shapes of numbers; expected {FORMS}")


def _named_values(node: ast.AST, geometry: Geometry) -> Iterator[tuple[str, Any]]:
    """`{"input_control_00": (2, 320, h, w)}` and `shapes["input_control_00"] = (2, 320, h, w)`."""
    pairs: list[tuple[ast.AST | None, ast.AST]] = []
    if isinstance(node, ast.Dict):
        pairs = list(zip(node.keys, node.values, strict=True))
    elif isinstance(node, ast.Assign) and len(node.targets) == 1 and isinstance(node.targets[0], ast.Subscript):
        pairs = [(node.targets[0].slice, node.value)]
    for key, value in pairs:
        if isinstance(key, ast.Constant) and isinstance(key.value, str) and residual_index(key.value) is not None:
            read = _value(value, geometry)
            if read is None:
                raise ShapecheckError(
                    f"--mapping: line {getattr(value, 'lineno', 0)}: the shape of {key.value} is no list of numbers; batch, "
                    "height and width may stand in it, with +, -, * and //"
                )
            yield key.value, read


_OPERATORS: Mapping[type[ast.operator], Callable[[int, int], int]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.FloorDiv: operator.floordiv,
}
_SYMBOLS = (
    (re.compile(r"(latent_)?(height|h)", re.IGNORECASE), "height"),
    (re.compile(r"(latent_)?(width|w)", re.IGNORECASE), "width"),
    (re.compile(r"(b|bs|n|batch|batch_size|max_batch|min_batch)", re.IGNORECASE), "batch"),
)


def _value(node: ast.AST, geometry: Geometry) -> Any:
    """A number or a list of numbers and lists; None where it is anything else."""
    if isinstance(node, (ast.List, ast.Tuple)):
        values = [_value(each, geometry) for each in node.elts]
        return None if any(value is None for value in values) else values
    return _number(node, geometry)


def _number(node: ast.AST, geometry: Geometry, depth: int = 0) -> int | None:
    if isinstance(node, ast.Constant) and type(node.value) is int:
        return node.value
    if isinstance(node, ast.Name):
        return next((getattr(geometry, symbol) for pattern, symbol in _SYMBOLS if pattern.fullmatch(node.id)), None)
    if isinstance(node, ast.BinOp) and type(node.op) in _OPERATORS and depth < _DEEPEST:
        left, right = _number(node.left, geometry, depth + 1), _number(node.right, geometry, depth + 1)
        if (
            left is None
            or right is None
            or max(abs(left), abs(right)) > _LARGEST
            or (right == 0 and isinstance(node.op, ast.FloorDiv))
        ):
            return None
        return _OPERATORS[type(node.op)](left, right)
    return None
