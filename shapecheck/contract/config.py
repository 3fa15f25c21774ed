"""A model's configuration as a frozen value."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any


class Config(Mapping[str, Any]):
    """An immutable, hashable mapping of JSON values; lists become tuples.

    Keys that begin with an underscore are left out: they name the writer of the file, not the model.
    """

    __slots__ = ("_items",)

    def __init__(self, values: Mapping[str, Any] | None = None) -> None:
        kept = {key: _frozen(value) for key, value in (values or {}).items() if not key.startswith("_")}
        self._items = dict(sorted(kept.items()))

    def __getitem__(self, key: str) -> Any:
        return self._items[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._items)

    def __len__(self) -> int:
        return len(self._items)

    def __hash__(self) -> int:
        return hash(tuple(self._items.items()))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Config) and self._items == other._items

    def __repr__(self) -> str:
        return f"Config({self._items!r})"

    def to_json(self) -> dict[str, Any]:
        """A plain mutable copy, lists where the JSON had lists."""
        return json.loads(json.dumps(self._items, default=_thawed))  # type: ignore[no-any-return]


def _frozen(value: Any) -> Any:
    if isinstance(value, Mapping):
        return Config(value)
    return tuple(map(_frozen, value)) if isinstance(value, (list, tuple)) else value


def _thawed(value: Any) -> Any:
    if isinstance(value, Config):
        return dict(value)
    raise TypeError(f"a model's config holds JSON values only, got {type(value).__name__}: {value!r}")
