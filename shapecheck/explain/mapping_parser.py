"""Claimed tables as people write them: 320,640@64; a list of shapes; names in JSON, TOML or Python; a saved contract."""

from __future__ import annotations

import ast
import json
import re
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from shapecheck.contract import Contract, Geometry, ShapecheckError
from shapecheck.explain.mapping import MID, Claim, Entry
from shapecheck.explain.mapping_python import read_python
from shapecheck.explain.mapping_values import (
    checked,
    entry_of,
    is_list_of_shapes,
    is_one_shape,
    is_pair,
    side,
    slot_number,
    written_axes,
)

FORMS = (
    "320,640,1280,1280@64 (channels@HxW in cells: 320@64x96 is height 64, width 96; mid:1280@8 for the mid residual), shapes "
    "such as 2x320x64x96 or [[2, 320, 64, 96], …], or a .json, .toml, .py or .txt file with these, with names such as "
    "input_control_00, with down and mid, or a saved contract"
)


_LARGEST_FILE = 2**22


_MOST_ENTRIES = 512


_DEEPEST = 8


_CHANNELS = re.compile(r"(\d{1,9})(?:@(\d{1,9})(?:[xX×](\d{1,9}))?)?")


_LONGEST_NAME = 4096


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
    if _is_file_name(text):
        raise ShapecheckError(f"--mapping: there is no file {text}")
    return _from_text(text, "--mapping", geometry)


def _is_file_name(text: str) -> bool:
    """Whether this is the name of a file, and no table."""
    if len(text) > _LONGEST_NAME or "\n" in text or text[:1] in ("[", "(", "{") or re.search(r":\d", text):
        return False
    return "/" in text or "\\" in text or re.search(r"\.[A-Za-z][A-Za-z0-9]{0,14}$", text) is not None


def _from_file(path: Path, geometry: Geometry) -> Claim:
    """The claim in a file, by its suffix."""
    suffix, origin = path.suffix.lower(), f"--mapping: {path}"
    if suffix in (".yaml", ".yml"):
        raise ShapecheckError(f"{origin}: YAML is not read; save the same as .json")
    try:
        with path.open("rb") as file:
            text = file.read(_LARGEST_FILE + 1).decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ShapecheckError(f"--mapping: cannot read {path} as text: {error}") from None
    if len(text) > _LARGEST_FILE:
        raise ShapecheckError(f"{origin} is larger than {_LARGEST_FILE // 2**20} MiB, which no table of residuals is")
    if suffix == ".py":
        value, note = read_python(text, origin, geometry)
        claim = _from_value(value, origin, geometry)
        return replace(claim, notes=(note,)) if note else claim
    if suffix not in (".json", ".toml"):
        return _from_text(text, origin, geometry)
    try:
        value = tomllib.loads(text) if suffix == ".toml" else json.loads(text, object_pairs_hook=_once)
    except (ValueError, RecursionError) as error:
        raise ShapecheckError(f"{origin} is no {suffix[1:].upper()}: {error}") from None
    return _from_value(value, origin, geometry)


def _once(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    """An object of JSON, where no key stands twice."""
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise ShapecheckError(f"--mapping: {name!r:.60} stands twice in one table; keep the one that was given")
        found[name] = value
    return found


def _from_text(text: str, origin: str, geometry: Geometry) -> Claim:
    """A claim in the forms of the command line."""
    text = re.sub(r"(?:torch\.)?Size\((\[[^\[\]]{0,200}\])\)", r"\1", text.strip())
    if sized := re.fullmatch(r"[\[(]([\d, ]{1,4000})[\])]@([\dxX×]{1,20})", text):
        return _from_words(f"{sized[1]}@{sized[2]}", origin)
    if text[:1] in ("[", "(", "{"):
        return _from_value(_literal(text, origin), origin, geometry)
    return _from_words(text, origin)


def _literal(text: str, origin: str) -> Any:
    """A value as JSON or Python writes it; lists on lines of their own are a list of them."""
    try:
        return json.loads(text, object_pairs_hook=_once)
    except (ValueError, RecursionError):
        pass
    try:
        return ast.literal_eval(re.sub(r"(?<=[\])])\s+(?=[\[(])", ",", text))
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        raise ShapecheckError(f"{origin}: {text[:60]!r} is no list of shapes; expected {FORMS}") from None


def _from_words(text: str, origin: str) -> Claim:
    """Channels with a size, or shapes; after a name and a colon as in trtexec's options, else in slot order."""
    for line in text.splitlines():
        if re.fullmatch(r"[\d,;\s]+", line):
            _refuse_one_shape([int(each) for each in re.findall(r"\d{1,9}", line)], origin)
    words = [_split(word, origin) for word in filter(None, re.split(r"[,;\s]+", _joined(text)))]
    names = {name for name, _ in words}
    if not names <= {"", "mid"}:
        if "" in names:
            bare = next(value for name, value in words if not name)
            raise ShapecheckError(f"{origin}: {bare[:40]!r} has no name, and others have one; name every residual, or none")
        known = [(name, value) for name, value in words if slot_number(name, ()) is not None]
        return _named([(name, _word(value, f"{origin}: {name}")) for name, value in known], origin)
    mids = [value for name, value in words if name]
    if len(mids) > 1:
        raise ShapecheckError(f"{origin}: two residuals for mid, {mids[0][:40]!r} and {mids[1][:40]!r}; give one")
    downs = _spread([(value, _word(value, origin)) for name, value in words if not name])
    entries = [*enumerate(downs), *((MID, _word(value, origin)) for value in mids)]
    return _claim(entries, False, bool(mids), origin)


def _joined(text: str) -> str:
    """Each residual as one word: `name: [2, 320, 64, 64]` is name:2x320x64x64; of trtexec's options only the shapes."""
    options = re.findall(r"--(opt|)[sS]hapes[=\s]+[\"']?([^\s\"']+)", text)
    if options:
        wanted = "opt" if any(kind == "opt" for kind, _ in options) else ""
        text = ",".join(shapes for kind, shapes in options if kind == wanted)
    text = re.sub(r"([:=])\s+", r"\1", text.replace("+", ",mid:"))
    return re.sub(r"(?<=[:=])[\[(]([^\[\]()]{1,200})[\])]", lambda match: "x".join(re.findall(r"[^,\s]+", match[1])), text)


def _split(word: str, origin: str) -> tuple[str, str]:
    """A name, empty where there is none, and what stands for the shape."""
    match = re.fullmatch(r"(?:[\"']?([^\"']{1,200}?)[\"']?[:=])?([^:=]+)", word)
    if match is None:
        raise ShapecheckError(f"{origin}: {word[:40]!r} is no channels@size; expected {FORMS}")
    return match[1] or "", match[2]


def _word(word: str, origin: str) -> Entry:
    if axes := written_axes(word):
        return entry_of(axes, origin)
    match = _CHANNELS.fullmatch(word)
    if match is None:
        raise ShapecheckError(f"{origin}: {word[:40]!r} is no channels@size; expected {FORMS}")
    channels, height, width = match.groups()
    size = (int(height), int(width or height)) if height else (None, None)
    return checked(Entry(int(channels), size), origin, word)


def _spread(words: list[tuple[str, Entry]]) -> Iterator[Entry]:
    """A size stands for itself and the channels before it that have none."""
    found: list[Entry] = []
    size: tuple[int | None, int | None] = (None, None)
    for word, entry in reversed(words):
        size = entry.size if "@" in word else size
        found.append(replace(entry, size=size) if word.isdigit() else entry)
    return reversed(found)


def _from_value(value: Any, origin: str, geometry: Geometry) -> Claim:
    """A table in a value read from JSON, TOML or Python."""
    if isinstance(value, Mapping) and "shapecheck_contract" in value:
        shapes = Contract.from_json(json.dumps(value)).shapes(geometry)
        return _named([(name, entry_of(list(shape), origin)) for name, shape in shapes.items()], origin)
    if is_pair(value):
        return _from_sides({"down": value[0], "mid": value[1]}, origin)
    if isinstance(value, (list, tuple)):
        if value and all(isinstance(each, Mapping) and isinstance(each.get("name"), str) for each in value):
            return _from_names([(each["name"], each) for each in value], origin)
        return _claim(_listed(value, origin, "entry"), False, False, origin)
    tables = {where: table for where, table in _tables(value) if _kind(table)}
    if len(tables) > 1 and any(table != next(iter(tables.values())) for table in tables.values()):
        raise ShapecheckError(f"{origin}: several tables in it, under {' and '.join(tables)}; keep the one that was given")
    for table in tables.values():
        return _from_sides(table, origin) if _kind(table) == "sides" else _from_names(list(table.items()), origin)
    raise ShapecheckError(f"{origin}: no residuals in it; expected {FORMS}")


def _tables(value: Any, where: str = "", depth: int = 0) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Every mapping in a value with its place, but none inside one that is a table."""
    if depth > _DEEPEST:
        return
    if isinstance(value, Mapping):
        table = {str(key): each for key, each in value.items()}
        yield where or "the top", table
        if _kind(table):
            return
    children = value.items() if isinstance(value, Mapping) else enumerate(value) if isinstance(value, list) else ()
    for key, child in children:
        yield from _tables(child, f"{where}.{key}".lstrip(".")[:60], depth + 1)


def _kind(table: Mapping[str, Any]) -> str:
    """`sides`, `names`, or nothing."""
    numbers = [number for name, each in table.items() if (number := slot_number(name, each)) is not None]
    if any(side(name) == "down" for name in table) or (set(numbers) == {MID} and any(map(is_list_of_shapes, table.values()))):
        return "sides"
    return "names" if numbers else ""


def _from_names(table: Sequence[tuple[str, Any]], origin: str) -> Claim:
    known = [(name, each) for name, each in table if each is not None and slot_number(name, each) is not None]
    return _named([(name, entry_of(each, f"{origin}: {name}")) for name, each in known], origin)


def _named(entries: Sequence[tuple[str, Entry]], origin: str) -> Claim:
    """A claim of residuals by name."""
    owners: dict[int, str] = {}
    found: list[tuple[int, Entry]] = []
    for name, entry in entries:
        index = slot_number(name, ())
        assert index is not None
        if index in owners:
            slot = "mid" if index == MID else f"slot {index}"
            raise ShapecheckError(f"{origin}: {owners[index]} and {name} both name the residual of {slot}; keep the one given")
        owners[index] = name
        found.append((index, entry))
    return _claim(found, True, True, origin)


def _from_sides(table: Mapping[str, Any], origin: str) -> Claim:
    """Lists of shapes under a name for the down residuals, and a shape under one for mid."""
    downs = [name for name in table if side(name) == "down"] or [name for name in table if is_list_of_shapes(table[name])]
    mids = [name for name in table if side(name) == "mid"]
    for names in (downs, mids):
        if len(names) > 1:
            raise ShapecheckError(f"{origin}: {names[0]} and {names[1]} both name one side; keep the one that was given")
    if not isinstance(table[downs[0]], (list, tuple)):
        raise ShapecheckError(f"{origin}: `{downs[0]}` must be a list of shapes; expected {FORMS}")
    entries = _listed(table[downs[0]], origin, downs[0])
    if mids and table[mids[0]] is not None:
        entries.append((MID, entry_of(table[mids[0]], f"{origin}: {mids[0]}")))
    return _claim(entries, False, True, origin) if entries else Claim((), False, True, origin)


def _listed(values: Sequence[Any], origin: str, name: str) -> list[tuple[int, Entry]]:
    _refuse_one_shape(values, origin)
    return [(index, entry_of(each, f"{origin}: {name} {index}")) for index, each in enumerate(values)]


def _claim(entries: list[tuple[int, Entry]], named: bool, tells_mid: bool, origin: str) -> Claim:
    if not entries:
        raise ShapecheckError(f"{origin}: no residuals in it; expected {FORMS}")
    if len(entries) > _MOST_ENTRIES:
        raise ShapecheckError(f"{origin}: {len(entries)} residuals, which no UNet takes; expected {FORMS}")
    return Claim(tuple(sorted(entries, key=lambda pair: (pair[0] == MID, pair[0]))), named, tells_mid, origin)


def _refuse_one_shape(values: Sequence[Any], origin: str) -> None:
    if is_one_shape(values):
        raise ShapecheckError(
            f"{origin}: {list(values)} reads as the shape of one residual; a list of shapes is expected, such as "
            f"[{list(values)}, …], or channels such as 320,640,1280,1280@64"
        )
