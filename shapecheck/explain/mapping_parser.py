"""Parse a claimed table: channels@size, a list of shapes, shapes by name, down and mid, or a saved contract."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from shapecheck.contract import Contract, Geometry, ShapecheckError
from shapecheck.contract.naming import SCHEMES, residual_index
from shapecheck.explain.claimed_table import MID, Claim, Entry
from shapecheck.files import read_bytes

FORMS = (
    "320,640,1280,1280@64 (channels@HxW in cells: 320@64x96 is height 64, width 96; mid:1280@8 for the mid residual), shapes "
    "such as 2x320x64x96 or [[2, 320, 64, 96], …], or a .json or .txt file with these, with names such as "
    "input_control_00, with down and mid, or a saved contract"
)
_LARGEST_FILE = 2**22
_LARGEST_AXIS = 2**20
_MOST_RESIDUALS = 512
_FEWEST_CHANNELS, _LARGEST_SIDE = 32, 256
"""Plain numbers can be widths or one shape: channels are at least so many, sides in cells at most so many."""
_UNREAD = {".yaml": "YAML", ".yml": "YAML", ".toml": "TOML", ".py": "Python"}
_CHANNELS = re.compile(r"(\d{1,9})(?:@(\d{1,9})(?:[xX×](\d{1,9}))?)?")
_CROSSED = re.compile(r"\d{1,9}(?:[xX×]\d{1,9}){2,5}")
_NAMED = re.compile(r"(?:[\"']?([^\"']{1,200}?)[\"']?[:=])?([^:=]+)")
_SIDE_WORD = re.compile("blocks?|res|residuals?|samples?|shapes?|slots?|outputs?|additional|controls?|controlnet|given")
"""The words of a side's name beside `down` or `mid`."""


def parse_mapping(text: str, geometry: Geometry) -> Claim:
    """Parse a table that is written out, or in the file of that name. A saved contract is read at `geometry`.

    Raises ShapecheckError saying what was expected.
    """
    path = Path(text)
    try:
        is_file = path.is_file()
    except (OSError, ValueError):  # too long for a name, or no name at all
        is_file = False
    if not is_file:
        if _is_file_name(text):
            raise ShapecheckError(f"--mapping: there is no file {text}")
        return _parse_text(text, "--mapping", geometry)

    suffix, origin = path.suffix.lower(), f"--mapping: {path}"
    if suffix in _UNREAD:
        raise ShapecheckError(f"{origin}: {_UNREAD[suffix]} is not read; save the same as .json: {FORMS}")
    too_large = f"{origin} is larger than {_LARGEST_FILE // 2**20} MiB, which no table of residuals is"
    try:
        text = read_bytes(path, _LARGEST_FILE, too_large=too_large).decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ShapecheckError(f"--mapping: cannot read {path} as text: {error}") from None
    if suffix != ".json":
        return _parse_text(text, origin, geometry)
    try:
        value = json.loads(text, object_pairs_hook=_refuse_duplicate_keys)
    except (ValueError, RecursionError) as error:
        raise ShapecheckError(f"{origin} is not JSON: {error}") from None
    return parse_value(value, origin, geometry)


def _is_file_name(text: str) -> bool:
    """Return whether a text that is not the name of a file was meant as one, and not as a table."""
    if len(text) > 4096 or "\n" in text or text[:1] in ("[", "(", "{") or re.search(r":\d", text):
        return False
    return "/" in text or "\\" in text or re.search(r"\.[A-Za-z][A-Za-z0-9]{0,14}$", text) is not None


def _refuse_duplicate_keys(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    table: dict[str, Any] = {}
    for name, value in pairs:
        if name in table:
            raise ShapecheckError(f"--mapping: {name!r:.60} stands twice in one table; keep the one that was given")
        table[name] = value
    return table


def _parse_text(text: str, origin: str, geometry: Geometry) -> Claim:
    """Parse a table as it is typed, or pasted from JSON or what Python printed."""
    text = re.sub(r"(?:torch\.)?Size\((\[[^\[\]]{0,200}\])\)", r"\1", text.strip())
    text = re.sub(r"[\[(]([\d, ]{1,4000})[\])]@", r"\1@", text)
    if text[:1] not in ("[", "(", "{"):
        return _parse_words(text, origin)
    try:
        value = json.loads(text, object_pairs_hook=_refuse_duplicate_keys)
    except (ValueError, RecursionError):
        try:
            # shapes printed on lines of their own are a list of them
            value = ast.literal_eval(re.sub(r"(?<=[\])])\s+(?=[\[(])", ",", text))
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            raise ShapecheckError(f"{origin}: {text[:60]!r} is not a list of shapes; expected {FORMS}") from None
    return parse_value(value, origin, geometry)


def _parse_words(text: str, origin: str) -> Claim:
    """Parse channels with a size, or shapes; after a name and a colon, else in slot order."""
    for line in text.splitlines():
        if re.fullmatch(r"[\d,;\s]+", line):
            _refuse_one_shape([int(number) for number in re.findall(r"\d{1,9}", line)], origin)
    # every residual becomes one word: `name: [2, 320, 64, 64]` is name:2x320x64x64
    text = re.sub(r"([:=])\s+", r"\1", text.replace("+", ",mid:"))
    text = re.sub(r"(?<=[:=])[\[(]([^\[\]()]{1,200})[\])]", lambda match: "x".join(re.findall(r"[^,\s]+", match[1])), text)
    words: list[tuple[str, str]] = []
    parts = [part for part in re.split(r"[,;\s]+", text) if part]
    _refuse_too_many(len(parts), origin)
    for word in parts:
        match = _NAMED.fullmatch(word)
        if match is None or word.startswith("--"):  # trtexec's options give the least and the largest shapes too
            raise ShapecheckError(f"{origin}: {word[:40]!r} is not channels@size; expected {FORMS}")
        words.append((match[1] or "", match[2]))

    names = {name for name, _ in words}
    if not names <= {"", "mid"}:
        if "" in names:
            bare = next(word for name, word in words if not name)
            raise ShapecheckError(f"{origin}: {bare[:40]!r} has no name, and others have one; name every residual, or none")
        return _claim_by_name(words, _parse_word, origin)
    mids = [word for name, word in words if name]
    if len(mids) > 1:
        raise ShapecheckError(f"{origin}: two residuals for mid, {mids[0][:40]!r} and {mids[1][:40]!r}; give one")

    downs: list[Entry] = []
    size: tuple[int, int] | None = None
    for word, entry in reversed([(word, _parse_word(word, origin)) for name, word in words if not name]):
        size = entry.size if "@" in word else size  # a size holds for the channels before it that have none, too
        downs.append(replace(entry, size=size) if word.isdigit() else entry)
    entries = dict(enumerate(reversed(downs))) | ({MID: _parse_word(mids[0], origin)} if mids else {})
    return _make_claim(entries, False, bool(mids), origin)


def _parse_word(word: str, origin: str) -> Entry:
    if shape := _read_shape(word):
        return _parse_entry(shape, origin)
    match = _CHANNELS.fullmatch(word)
    if match is None:
        raise ShapecheckError(f"{origin}: {word[:40]!r} is not channels@size; expected {FORMS}")
    channels, height, width = match.groups()
    size = (int(height), int(width or height)) if height else None
    return _check_sizes(Entry(int(channels), size), origin, word)


def parse_value(value: Any, origin: str, geometry: Geometry) -> Claim:
    """Parse a table read from JSON: shapes in a list, in a pair (downs, mid), by name, or under down and mid at any depth.

    Raises ShapecheckError, which begins with `origin`, if there is none or there are several.
    """
    if isinstance(value, Mapping) and "shapecheck_contract" in value:
        return _claim_by_name(Contract.from_value(value).shapes(geometry).items(), _parse_entry, origin)
    if isinstance(value, (list, tuple)):
        if len(value) == 2 and isinstance(value[0], (list, tuple)) and all(map(_is_shape, value[0])) and _is_shape(value[1]):
            return _claim_by_side({"down": value[0], "mid": value[1]}, origin)
        return _make_claim(_parse_list(value, origin, "entry"), False, False, origin)
    tables = dict(_find_tables(value))
    if not tables:
        raise ShapecheckError(f"{origin}: no residuals in it; expected {FORMS}")
    table = next(iter(tables.values()))
    if any(other != table for other in tables.values()):
        raise ShapecheckError(f"{origin}: several tables in it, under {' and '.join(tables)}; keep the one that was given")
    if _find_downs(table):
        return _claim_by_side(table, origin)
    residuals = ((name, child) for name, child in table.items() if child is not None and slot_number(name, child) is not None)
    return _claim_by_name(residuals, _parse_entry, origin)


def _find_tables(value: Any, where: str = "", depth: int = 0) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Yield every table of residuals with its place, but none inside another."""
    if not isinstance(value, (Mapping, list, tuple)) or depth > 8:
        return
    table = {str(name): child for name, child in (value.items() if isinstance(value, Mapping) else enumerate(value))}
    shaped = ((name, child) for name, child in table.items() if child is None or type(child) is int or _is_shaped(child))
    if any(side_of(name) == "down" or slot_number(name, child) is not None for name, child in shaped):
        yield where or "the top", table
        return
    for name, child in table.items():
        yield from _find_tables(child, f"{where}.{name}".lstrip(".")[:60], depth + 1)


def _claim_by_name(values: Iterable[tuple[str, Any]], parse: Callable[[Any, str], Entry], origin: str) -> Claim:
    owners: dict[int, str] = {}
    entries: dict[int, Entry] = {}
    for name, value in values:
        index = slot_number(name)
        if index is None:
            continue
        if index in owners:
            slot = "mid" if index == MID else f"slot {index}"
            raise ShapecheckError(f"{origin}: {owners[index]} and {name} both name the residual of {slot}; keep the one given")
        owners[index] = name
        entries[index] = parse(value, f"{origin}: {name}")
    return _make_claim(entries, True, True, origin)


def _find_downs(table: Mapping[str, Any]) -> list[str]:
    """Return the names that stand for the down residuals; beside mid alone, any list of shapes does, such as `residuals`."""
    if downs := [name for name in table if side_of(name) == "down"]:
        return downs
    slots = {name: index for name, child in table.items() if (index := slot_number(name, child)) is not None}
    lists = [name for name, child in table.items() if name not in slots and _is_list_of_shapes(child)]
    return lists if set(slots.values()) == {MID} else []


def _claim_by_side(table: Mapping[str, Any], origin: str) -> Claim:
    """Make a claim of a list of shapes under a name for the down residuals, and a shape under one for mid."""
    downs = _find_downs(table)
    mids = [name for name in table if slot_number(name, None) == MID]
    for names in (downs, mids):
        if len(names) > 1:
            raise ShapecheckError(f"{origin}: {names[0]} and {names[1]} both name one side; keep the one that was given")
    if not isinstance(table[downs[0]], (list, tuple)):
        raise ShapecheckError(f"{origin}: `{downs[0]}` must be a list of shapes; expected {FORMS}")
    entries = _parse_list(table[downs[0]], origin, downs[0])
    if mids and table[mids[0]] is not None:
        entries[MID] = _parse_entry(table[mids[0]], f"{origin}: {mids[0]}")
    return _make_claim(entries, False, True, origin) if entries else Claim({}, False, True, origin)


def _make_claim(entries: Mapping[int, Entry], named: bool, tells_mid: bool, origin: str) -> Claim:
    if not entries:
        raise ShapecheckError(f"{origin}: no residuals in it; expected {FORMS}")
    _refuse_too_many(len(entries), origin)
    order = sorted(entries, key=lambda index: (index == MID, index))
    return Claim({index: entries[index] for index in order}, named, tells_mid, origin)


def _refuse_too_many(count: int, origin: str) -> None:
    if count > _MOST_RESIDUALS:
        raise ShapecheckError(f"{origin}: {count} residuals, more than any UNet has; expected {FORMS}")


def side_of(name: str) -> Literal["down", "mid"] | None:
    """Return the side that a name stands for, in any case: down_shapes, DOWNS, mid_block_res_sample; None for others."""
    rest = [word for word in re.split(r"[_\-. ]", name.lower()) if not _SIDE_WORD.fullmatch(word)]
    if rest in (["down"], ["downs"]):
        return "down"
    return "mid" if rest in (["mid"], ["middle"]) else None


def slot_number(name: str, value: Any = ()) -> int | None:
    """Return the number of the slot that a name stands for, -1 for mid; None for any other name.

    A name of no known scheme, such as down_3, counts only with a list or a shape: control_steps_20 can be a setting.
    """
    if side := side_of(name):
        return MID if side == "mid" else None
    known = [index for scheme in SCHEMES if (index := scheme.index(name.lower())) is not None]
    if known:
        return known[0]
    return residual_index(name.lower()) if _is_shaped(value) else None


def _is_shaped(value: Any) -> bool:
    return isinstance(value, (list, tuple)) or _is_shape(value)


def _is_shape(value: Any) -> bool:
    return _read_shape(value) is not None


def _is_list_of_shapes(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and bool(value) and all(map(_is_shape, value))


def _read_shape(value: Any) -> Sequence[int] | None:
    """Return the axes of a shape, given as a list or written as 2x320x64x96; None for anything else."""
    if isinstance(value, str):
        return [int(axis) for axis in re.split("[xX×]", value)] if _CROSSED.fullmatch(value) else None
    is_shape = isinstance(value, (list, tuple)) and 3 <= len(value) <= 6 and all(type(axis) is int for axis in value)
    return value if is_shape else None


def _parse_list(values: Sequence[Any], origin: str, name: str) -> dict[int, Entry]:
    _refuse_one_shape(values, origin)
    return {index: _parse_entry(value, f"{origin}: {name} {index}") for index, value in enumerate(values)}


def _refuse_one_shape(values: Sequence[Any], origin: str) -> None:
    """Refuse a plain list that is the shape of one residual, and not the widths of several."""
    if not _is_shape(values) or len(values) > 4:
        return
    first, *rest = values
    if first < _FEWEST_CHANNELS or (len(values) == 3 and max(rest) <= _LARGEST_SIDE and max(rest) < first):
        raise ShapecheckError(
            f"{origin}: {list(values)} reads as the shape of one residual; a list of shapes is expected, such as "
            f"[{list(values)}, …], or channels such as 320,640,1280,1280@64"
        )


def _parse_entry(value: Any, where: str) -> Entry:
    """Parse a number of channels or a shape. Raises ShapecheckError, which begins with `where`, on anything else."""
    if type(value) is int:
        return _check_sizes(Entry(value), where, value)
    shape = _read_shape(value)
    if shape is None:
        raise ShapecheckError(
            f"{where}: expected (channels, height, width) or (batch, channels, height, width), got {str(value)[:60]!r}"
        )
    if len(shape) > 4:
        return _check_sizes(Entry(shape[0], shape=tuple(shape)), where, value)
    *batch, channels, height, width = shape
    return _check_sizes(Entry(channels, (height, width), batch=batch[0] if batch else None), where, value)


def _check_sizes(entry: Entry, where: str, source: Any) -> Entry:
    """Return the entry. Raises ShapecheckError, which begins with `where` and shows the source, if a size is out of range."""
    for size in (entry.channels, *(entry.size or ()), entry.batch, *(entry.shape or ())):
        if size is not None and not 0 < size <= _LARGEST_AXIS:
            raise ShapecheckError(f"{where}: sizes go from 1 to {_LARGEST_AXIS}, got {str(source)[:60]}")
    return entry
