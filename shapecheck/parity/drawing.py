"""Where everything stands in the picture of a UNet and its slots: plain numbers, which a template turns into SVG."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby, pairwise

from shapecheck.contract import Contract, Slot, show
from shapecheck.contract.naming import SHAPECHECK
from shapecheck.parity.results import Result, Status


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


WIDTH = 1160


_TOP = 52


_ROW = 34


_BOX = 24


_LEVEL_HEAD = 22


_GAP = 12


_LANE = 312
"""Where the column of residuals ends and the UNet begins."""


_INSET = 26


_NARROWEST, _WIDEST = 58, 124


_UP = 106


_BARS = 190


_BAR = 64


_FULL_BAR = 1.25
"""The strength at which a bar is full; more is drawn no longer."""


_LETTER, _SMALL_LETTER = 6.3, 6.0
"""Width of an average letter of a label, and of a reason."""


def draw(contract: Contract, told: Mapping[str, Told]) -> Drawing | None:
    """The picture of a UNet whose slots came to what `told` says by slot name; None where it has no slots."""
    downs = [slot for slot in contract.slots if slot.name != SHAPECHECK.mid]
    mids = [slot for slot in contract.slots if slot.name == SHAPECHECK.mid]
    if not contract.slots:
        return None
    widest = max(slot.channels for slot in contract.slots)
    rows, levels, bottom = _rows(downs, widest)
    ups = _up_blocks(downs, rows)
    mid = _mid_box(bottom, mids, widest)
    slots = [_down(slot, told.get(slot.name, Told()), box, ups) for slot, box in zip(downs, rows, strict=True)]
    slots += [_mid(slot, told.get(slot.name, Told()), mid) for slot in mids]
    right = ups[0] if ups else Box(WIDTH - _UP, _TOP, _UP, 0, "")
    left = rows[0] if rows else mid
    return Drawing(
        width=WIDTH,
        height=mid.bottom + (46 if any(slot.reason for slot in slots) else 20),
        lane=_LANE,
        slots=tuple(slots),
        levels=tuple(levels),
        ups=tuple(ups),
        flows=tuple(_flows(rows, mid, ups)),
        entry=(left.x + 18, left.y),
        exit=(right.right - 18, right.y),
        words=_words(contract, told),
    )


def _rows(downs: Sequence[Slot], widest: int) -> tuple[list[Box], list[Box], float]:
    """The boxes of the down path, the bands of its levels, and where the last band ends."""
    rows: list[Box] = []
    levels: list[Box] = []
    y = float(_TOP)
    for depth, (stride, group) in enumerate(groupby(downs, key=lambda slot: slot.stride)):
        level, start = list(group), y
        y += _LEVEL_HEAD
        for slot in level:
            rows.append(Box(_LANE + 34 + _inset(depth), y + (_ROW - _BOX) / 2, _breadth(slot, widest), _BOX, _channels(slot)))
            y += _ROW
        size = show(level[0].skip[-2:])
        levels.append(Box(_LANE + 14, start, WIDTH - _LANE - 14, y - start + 6, f"stride {stride}  ·  {size}"))
        y += 6 + _GAP
    return rows, levels, y


def _inset(depth: int) -> float:
    return _INSET * min(depth, 4)


def _breadth(slot: Slot, widest: int) -> float:
    """Wider for more channels."""
    return _NARROWEST + (_WIDEST - _NARROWEST) * slot.channels / widest


def _channels(slot: Slot) -> str:
    return f"{slot.channels} · 1×1" if slot.spatial == "pooled" else str(slot.channels)


def _up_blocks(downs: Sequence[Slot], rows: Sequence[Box]) -> list[Box]:
    """A box for each run of slots that one up block consumes, beside them."""
    boxes: list[Box] = []
    shift = _LANE + 34
    for up_block, run in groupby(zip(downs, rows, strict=True), key=lambda pair: pair[0].up_block):
        beside = [box for _, box in run]
        if up_block:
            inset = max(box.x for box in beside) - shift
            x, y = WIDTH - _UP - 14 - inset, beside[0].y
            boxes.append(Box(x, y, _UP, beside[-1].bottom - y, cut(up_block, _UP)))
    return boxes


def _mid_box(bottom: float, mids: Sequence[Slot], widest: int) -> Box:
    breadth = _breadth(mids[0], widest) if mids else _WIDEST
    label = f"{_mid_name(mids[0])} {_channels(mids[0])}" if mids else "mid"
    width = max(40 + breadth, len(label) * _LETTER + 32)
    return Box((_LANE + WIDTH - width) / 2, bottom + 18, width, 30, label)


def _mid_name(slot: Slot) -> str:
    """Some UNets have no mid block: the last skip goes straight to the up path."""
    return "mid" if slot.producer.startswith("mid") else "no mid block ·"


def _down(slot: Slot, told: Told, box: Box, ups: Sequence[Box]) -> SlotDrawing:
    up = next((each for each in ups if each.y <= box.middle <= each.bottom), None)
    skip = f"M{box.right:.1f} {box.middle:.1f}H{up.x:.1f}" if up else ""
    reason = None
    if told.status == "failed":
        left, right = box.right + 22, (up.x if up else WIDTH) - 22
        reason = _reason(told, left, right, box.middle)
    return _slot(slot, told, box, skip, reason)


def _mid(slot: Slot, told: Told, box: Box) -> SlotDrawing:
    reason = _reason(told, _LANE + 60, WIDTH - 60, box.bottom + 24) if told.status == "failed" else None
    return _slot(slot, told, box, "", reason)


def _slot(slot: Slot, told: Told, box: Box, skip: str, reason: Reason | None) -> SlotDrawing:
    number = SHAPECHECK.index(slot.name)
    label = cut(slot.name, 150) if number is None else "mid" if number == -1 else f"down {number:02d}"
    arrow = f"M{_LANE - 6} {box.middle:.1f}H{box.x - 11:.1f}"
    pooled = slot.spatial == "pooled"
    return SlotDrawing(
        slot.name,
        label,
        cut(slot.producer, 200),
        show(slot.shape),
        told,
        box,
        arrow,
        skip,
        _bars(told, box.middle),
        reason,
        pooled,
    )


def _bars(told: Told, y: float) -> tuple[Bar, ...]:
    if told.result is None or told.result.effect is None:
        return ()
    effect, path = told.result.effect, f"{told.path}.effect"
    return tuple(
        Bar(_BARS, y + shift, _BAR, _filled(value), _BAR / _FULL_BAR, f"{path}.{name}")
        for name, value, shift in (("strength", effect.strength, -8), ("cosine", effect.cosine, 3))
    )


def _filled(value: float) -> float:
    """The length of a bar; none for NaN and for what points the other way."""
    return _BAR * min(value / _FULL_BAR, 1.0) if value > 0 and not math.isnan(value) else 0.0


def _reason(told: Told, left: float, right: float, middle: float) -> Reason:
    """In the middle of the room there is, as wide as its words."""
    why = told.result.reason if told.result and told.result.reason else "failed"
    where = told.result.check.where if told.result else ""
    lines = _two_lines(why.removeprefix(where).lstrip(" :") or why, int((right - left - 20) / _SMALL_LETTER))
    width = min(max(map(len, lines)) * _SMALL_LETTER + 20, right - left)
    height = 6 + 12 * len(lines)
    return Reason(Box((left + right - width) / 2, middle - height / 2, width, height, ""), lines)


def _two_lines(text: str, letters: int) -> tuple[str, ...]:
    """At most two, of about the same length; an ellipsis where that is not all of it."""
    wanted = letters if len(text) <= letters else min(letters, len(text) // 2 + 8)
    return tuple(textwrap.wrap(text, wanted, max_lines=2, placeholder=" …"))


def cut(text: str, room: float) -> str:
    """As much of the text as fits into the room, with an ellipsis where that is not all of it."""
    most = max(int(room / _LETTER), 2)
    return text if len(text) <= most else text[: most - 1].rstrip() + "…"


def _flows(rows: Sequence[Box], mid: Box, ups: Sequence[Box]) -> list[str]:
    """Down the left, through mid, up the right."""
    down = [_bend(upper.x + 18, upper.bottom, lower.x + 18, lower.y) for upper, lower in pairwise(rows)]
    up = [_bend(lower.right - 18, lower.y, upper.right - 18, upper.bottom) for upper, lower in pairwise(ups)]
    if rows:
        down.append(_bend(rows[-1].x + 18, rows[-1].bottom, mid.x + 20, mid.y))
    if ups:
        up.append(_around(mid, ups[-1]))
    return down + up


def _bend(x: float, y: float, to_x: float, to_y: float) -> str:
    half = (y + to_y) / 2
    return f"M{x:.1f} {y:.1f}C{x:.1f} {half:.1f} {to_x:.1f} {half:.1f} {to_x:.1f} {to_y:.1f}"


def _around(mid: Box, up: Box) -> str:
    """From mid's right edge, up into the block above."""
    x = up.right - 18
    return f"M{mid.right:.1f} {mid.middle:.1f}H{x - 40:.1f}Q{x:.1f} {mid.middle:.1f} {x:.1f} {mid.y - 12:.1f}V{up.bottom:.1f}"


def _words(contract: Contract, told: Mapping[str, Told]) -> str:
    """For who cannot see the picture."""
    names: Callable[[Status], list[str]] = lambda status: [  # noqa: E731
        slot.name for slot in contract.slots if told.get(slot.name, Told()).status == status
    ]
    wrong = f": {', '.join(names('failed'))}" if names("failed") else ""
    return f"The UNet and its {len(contract.slots)} slots: {len(names('passed'))} passed, {len(names('failed'))} failed{wrong}."
