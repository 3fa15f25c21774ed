"""A model's configuration as a frozen value."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from typing import Any


class Config(Mapping[str, Any]):
    """An immutable, hashable mapping of JSON values; lists become tuples, and values unknown to JSON their text.

    Two are equal if their JSON text is, so 1, 1.0 and True differ, as they do in a digest.
    Keys that begin with an underscore are left out: they name the writer of the file, not the model.
    """

    __slots__ = ("_items",)

    def __init__(self, values: Mapping[str, Any] | None = None) -> None:
        kept = {str(key): _freeze(value) for key, value in (values or {}).items() if not str(key).startswith("_")}
        self._items = dict(sorted(kept.items()))

    def __getitem__(self, key: str) -> Any:
        return self._items[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._items)

    def __len__(self) -> int:
        return len(self._items)

    def __hash__(self) -> int:
        return hash(self._text())

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Config) and self._text() == other._text()

    def __repr__(self) -> str:
        return f"Config({self._items!r})"

    @classmethod
    def from_value(cls, value: Any) -> Config:
        """Read a JSON object. Raises ValueError on anything else."""
        if not isinstance(value, dict):
            raise ValueError(f"expected an object, got {value!r:.60}")
        return cls(value)

    def to_json(self) -> dict[str, Any]:
        """Return a plain mutable copy, with lists for tuples."""
        return json.loads(self._text())  # type: ignore[no-any-return]

    def _text(self) -> str:
        return json.dumps(self._items, sort_keys=True, separators=(",", ":"), default=dict)


def _freeze(value: Any) -> Any:
    if isinstance(value, Mapping):
        return Config(value)
    if isinstance(value, (set, frozenset)):
        return tuple(sorted(map(_freeze, value), key=str))
    if isinstance(value, (list, tuple)):
        return tuple(map(_freeze, value))
    if isinstance(value, (str, int, float, type(None))):
        return value
    # The text of many objects has an address, which differs in every run.
    return re.sub(r" at 0x[0-9a-fA-F]+", "", str(value))
