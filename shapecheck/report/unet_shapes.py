"""What the picture of a UNet is made of: frozen places and words, which a template turns into SVG."""

from __future__ import annotations

from dataclasses import dataclass

from shapecheck.contract.parity import Result, Status


@dataclass(frozen=True, slots=True)
class Told:
    """What a check of one slot came to, and where its numbers stand in the JSON; `path` is empty where there are none."""

    status: Status = "not run"
    path: str = ""
    result: Result | None = None


@dataclass(frozen=True, slots=True)
class Box:
    """A rectangle with a word in it; `y` is its upper edge."""

    x: float
    y: float
    width: float
    height: float
    label: str

    @property
    def middle(self) -> float:
        """Halfway down."""
        return self.y + self.height / 2

    @property
    def right(self) -> float:
        """Its right edge."""
        return self.x + self.width

    @property
    def bottom(self) -> float:
        """Its lower edge."""
        return self.y + self.height


@dataclass(frozen=True, slots=True)
class Bar:
    """A horizontal bar beside a slot: how far it is filled, and the place of the right value."""

    x: float
    y: float
    width: float
    filled: float
    tick: float
    path: str


@dataclass(frozen=True, slots=True)
class Reason:
    """Why a slot failed, in one line or two: on a strip across its line."""

    strip: Box
    lines: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class SlotDrawing:
    """One slot: its name, bars and arrow on the left, its box, and the line along which its sum travels."""

    name: str
    label: str
    producer: str
    shape: str
    told: Told
    box: Box
    arrow: str
    skip: str
    bars: tuple[Bar, ...]
    reason: Reason | None
    """None where it did not fail."""
    pooled: bool


@dataclass(frozen=True, slots=True)
class Drawing:
    """The whole picture; `flows` are the paths of the UNet's own U."""

    width: float
    height: float
    lane: float
    """The right edge of the column of residuals."""
    slots: tuple[SlotDrawing, ...]
    levels: tuple[Box, ...]
    ups: tuple[Box, ...]
    flows: tuple[str, ...]
    entry: tuple[float, float]
    """Where the sample comes in."""
    exit: tuple[float, float]
    """Where the prediction leaves."""
    words: str
