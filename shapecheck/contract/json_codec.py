"""Records as JSON and back, by the types of their fields: strict on the way in, so that what loads is what was saved.

A record is an object with a key for each field; one with a single field stands for that field alone. A tuple of (text, value)
pairs is an object too, and every other tuple a list. A class may have a form of its own: `to_value()` and `from_value(value)`.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, fields, is_dataclass
from functools import cache
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from shapecheck.contract.errors import ShapecheckError

OPTIONAL = {"optional": True}
"""Metadata of a field that is left out if it is empty, as in files older than it is."""
POSITIVE = {"limits": (1, math.inf)}
"""Metadata of a field whose whole numbers are read from 1 on; otherwise they are from 0 on."""
_NOT_NEGATIVE = (0, math.inf)
_EXPECTED = {str: "text", bool: "true or false", float: "a number", dict: "an object", list: "a list"}


@dataclass(frozen=True, slots=True)
class TextFormat:
    """One kind of JSON text that we write: how it is recognized, and the words for it in messages."""

    key: str
    """The key that holds the schema."""
    what: str
    writer: str
    """The command that writes it."""
    remedy: str
    largest: int
    """Characters."""
    schema: int = 1

    def parse(self, text: str) -> dict[str, Any]:
        """Return the JSON object in a text. Raises ShapecheckError if it is not of this kind."""
        if not isinstance(text, str):
            raise ShapecheckError(f"not {self.what}: expected JSON text, got {type(text).__name__}")
        if len(text) > self.largest:
            raise ShapecheckError(f"not {self.what}: {len(text)} characters, more than the {self.largest} allowed")
        try:
            return self.check(json.loads(text))
        except (ValueError, RecursionError) as error:
            raise ShapecheckError(f"not {self.what}: not JSON ({error})") from None

    def check(self, record: Any) -> dict[str, Any]:
        """Return the JSON object that a record is. Raises ShapecheckError if it is not of this kind."""
        if not isinstance(record, dict) or self.key not in record:
            raise ShapecheckError(f"not {self.what}: no key {self.key!r}; {self.writer} writes one")
        if type(record[self.key]) is not int or record[self.key] != self.schema:
            raise ShapecheckError(
                f"{self.what} of schema {record[self.key]!r:.20}; this release reads schema {self.schema}: {self.remedy}"
            )
        return record


def encode(value: Any, *, compared: bool = False) -> Any:
    """Return the JSON value of a record; with `compared`, without the fields that do not count in equality."""
    if hasattr(value, "to_value"):
        return value.to_value()
    if not is_dataclass(value):
        return [encode(member, compared=compared) for member in value] if isinstance(value, (list, tuple)) else value
    kind: Any = type(value)
    types, record = _field_types(kind), {}
    for field in fields(value):
        content = getattr(value, field.name)
        if (field.compare or not compared) and (content or "optional" not in field.metadata):
            record[field.name] = dict(content) if _is_table(types[field.name]) else encode(content, compared=compared)
    return record if len(types) > 1 else record.popitem()[1]


def decode(kind: Any, value: Any, where: str = "", limits: tuple[int, float] = _NOT_NEGATIVE) -> Any:
    """Return the value of type `kind` that a JSON value stands for. Raises ValueError with where and what was expected.

    `limits` are the least and the largest whole number that is read.
    """
    origin, arguments = get_origin(kind), get_args(kind)
    if hasattr(kind, "from_value"):
        try:
            return kind.from_value(value)
        except ValueError as error:
            raise _error(where, str(error)) from None
    if is_dataclass(kind):
        return decode_record(kind, value, where)
    if origin in (Union, UnionType):  # of something and None
        return None if value is None else decode(arguments[0], value, where, limits)
    if _is_table(kind):
        _, member = get_args(arguments[0])
        table = decode(dict, value, where)
        return tuple((key, decode(member, entry, f"{where}[{key!r:.60}]", limits)) for key, entry in table.items())
    if origin is tuple:
        members = decode(list, value, where)
        kinds = arguments[:1] * len(members) if arguments[1:] == (...,) else arguments
        if len(kinds) != len(members):
            raise _error(where, f"expected a list of {len(kinds)}, got {value!r:.60}")
        pairs = enumerate(zip(kinds, members, strict=True))
        return tuple(decode(one, member, f"{where}[{at}]", limits) for at, (one, member) in pairs)
    least, most = limits
    if value in arguments if origin is Literal else type(value) is kind and (kind is not int or least <= value <= most):
        return value
    whole = f"a whole number {f'of at least {least}' if most == math.inf else f'from {least} to {most}'}"
    expected = f"one of {', '.join(arguments)}" if origin is Literal else _EXPECTED.get(kind, whole)
    raise _error(where, f"expected {expected}, got {value!r:.60}")


def decode_record(kind: Any, value: Any, where: str = "") -> Any:
    """Return the dataclass `kind` that a JSON object stands for; unknown keys are ignored."""
    types, known = _field_types(kind), fields(kind)
    record = decode(dict, value, where) if len(known) > 1 else {known[0].name: value}
    values = {}
    for field in known:
        if field.name in record:
            inside = where if len(known) == 1 else f"{where}.{field.name}" if where else field.name
            limits = field.metadata.get("limits", _NOT_NEGATIVE)
            values[field.name] = decode(types[field.name], record[field.name], inside, limits)
        elif "optional" not in field.metadata:
            raise _error(where, f"no key {field.name!r}")
    return kind(**values)


def refuse_unprintable(value: Any) -> None:
    """Raise ValueError if text in a JSON value cannot be printed: anybody may have written it, and reports show it."""
    if isinstance(value, str) and not value.isprintable():
        raise ValueError(f"{value!r:.60} cannot be printed")
    for member in [*value, *value.values()] if isinstance(value, dict) else value if isinstance(value, list) else ():
        refuse_unprintable(member)


def _is_table(kind: Any) -> bool:
    """Return whether a type is a tuple of (text, value) pairs, of any number."""
    arguments = get_args(kind)
    return get_origin(kind) is tuple and arguments[1:] == (...,) and get_args(arguments[0])[:1] == (str,)


@cache
def _field_types(kind: Any) -> dict[str, Any]:
    types = get_type_hints(kind, include_extras=True)
    return {field.name: types[field.name] for field in fields(kind)}


def _error(where: str, text: str) -> ValueError:
    return ValueError(f"{where}: {text}" if where else text)
