"""A class that is equal to another one where a program compares types."""

from __future__ import annotations


class ReplacingClass(type):
    """The class of a drop-in: it equals the class of diffusers that it replaces, for `from_pipe` compares the two."""

    def __eq__(cls, other: object) -> bool:
        return other is cls or (other is not None and other is cls.__dict__.get("replaces"))

    def __hash__(cls) -> int:
        return hash(cls.__dict__.get("replaces") or type.__hash__(cls))
