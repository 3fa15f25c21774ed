"""The layout of the picture of a UNet and its slots: plain numbers, which a template turns into SVG."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby, pairwise

from shapecheck.contract import Contract, Slot, show
from shapecheck.contract.naming import SHAPECHECK
from shapecheck.parity.results import Result, Status

WIDTH = 1160
_TOP, _ROW, _BOX, _LEVEL_HEAD, _GAP, _INSET = 52, 34, 24, 22, 12, 26
_LANE = 312
"""The column of residuals ends here, and the UNet begins."""
_PATH = _LANE + 34
"""The boxes of the first level begin here."""
_NARROWEST, _WIDEST, _UP, _BAR = 58, 124, 106, 64
_FULL_BAR = 1.25
"""The strength at which a bar is full; a greater one is drawn no longer."""
_LETTER, _SMALL_LETTER = 6.3, 6.0
"""Width of an average letter of a label, and of a reason."""


@dataclass(frozen=True, slots=True)
class Box:
    """A rectangle with a word in it; `y` is its upper edge."""

    x: float
    y: float
    width: float
    height: float
    label: str = ""

    @property
    def middle(self) -> float:
        return self.y + self.height / 2

    @property
    def right(self) -> float:
        return self.x + self.width

    @property
    def bottom(self) -> float:
        return self.y + self.height


@dataclass(frozen=True, slots=True)
class SlotDrawing:
    """One slot: its name, bars and arrow on the left, its box, and the line along which its sum travels."""

    slot: Slot
    label: str
    producer: str
    status: Status
    reason: str
    box: Box
    arrow: str
    skip: str
    bars: tuple[tuple[str, float, float], ...]
    """The name of the number, the upper edge, and how far the bar is filled."""
    strip: Box | None
    """Holds the reason of a slot that failed, in one line or two."""
    lines: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Drawing:
    """The whole picture; `flows` are the paths of the UNet's own U."""

    height: float
    slots: tuple[SlotDrawing, ...]
    levels: tuple[Box, ...]
    ups: tuple[Box, ...]
    flows: tuple[str, ...]
    entry: tuple[float, float]
    """The point where the sample comes in; at `exit` the prediction leaves."""
    exit: tuple[float, float]
    words: str
    """The picture in a sentence, for readers who cannot see it."""
    width: float = WIDTH
    lane: float = _LANE
    """The right edge of the column of residuals."""
    bar: float = _BAR
    tick: float = _BAR / _FULL_BAR
    """Length of a bar, and where on it the right value is."""


def draw_unet(contract: Contract, results: Mapping[str, Result]) -> Drawing | None:
    """Return the picture of a UNet and what the checks of its slots came to, by slot name; None if it has no slots."""
    if not contract.slots:
        return None
    downs = [slot for slot in contract.slots if slot.name != SHAPECHECK.mid]
    mids = [slot for slot in contract.slots if slot.name == SHAPECHECK.mid]
    widest = max(slot.channels for slot in contract.slots)
    boxes, levels, bottom = _place_downs(downs, widest)
    ups = _place_ups(downs, boxes)
    mid = _place_mid(bottom, mids, widest)
    slots = []
    for slot, box in zip(downs, boxes, strict=True):
        up = next((up for up in ups if up.y <= box.middle <= up.bottom), None)
        skip = f"M{box.right:.1f} {box.middle:.1f}H{up.x:.1f}" if up else ""
        room = box.right + 22, (up.x if up else WIDTH) - 22
        slots.append(_draw_slot(slot, results.get(slot.name), box, skip, *room, box.middle))
    slots += [_draw_slot(slot, results.get(slot.name), mid, "", _LANE + 60, WIDTH - 60, mid.bottom + 24) for slot in mids]
    left = boxes[0] if boxes else mid
    right = ups[0] if ups else Box(WIDTH - _UP, _TOP, _UP, 0)
    passed = sum(drawn.status == "passed" for drawn in slots)
    failed = [drawn.slot.name for drawn in slots if drawn.status == "failed"]
    wrong = f": {', '.join(failed)}" if failed else ""
    return Drawing(
        height=mid.bottom + (46 if failed else 20),
        slots=tuple(slots),
        levels=tuple(levels),
        ups=tuple(ups),
        flows=tuple(_draw_flows(boxes, mid, ups)),
        entry=(left.x + 18, left.y),
        exit=(right.right - 18, right.y),
        words=f"The UNet and its {len(slots)} slots: {passed} passed, {len(failed)} failed{wrong}.",
    )


def _place_downs(downs: Sequence[Slot], widest: int) -> tuple[list[Box], list[Box], float]:
    """Return the boxes of the down path, the bands of its levels, and where the last band ends."""
    boxes, levels, y = list[Box](), list[Box](), float(_TOP)
    for depth, (stride, group) in enumerate(groupby(downs, key=lambda slot: slot.stride)):
        level, start = list(group), y
        y += _LEVEL_HEAD
        for slot in level:
            x = _PATH + _INSET * min(depth, 4)
            boxes.append(Box(x, y + (_ROW - _BOX) / 2, _measure(slot, widest), _BOX, _count_channels(slot)))
            y += _ROW
        label = f"stride {stride}  ·  {show(level[0].skip[-2:])}"
        levels.append(Box(_LANE + 14, start, WIDTH - _LANE - 14, y - start + 6, label))
        y += 6 + _GAP
    return boxes, levels, y


def _measure(slot: Slot, widest: int) -> float:
    """Return the width of a slot's box, which grows with its channels."""
    return _NARROWEST + (_WIDEST - _NARROWEST) * slot.channels / widest


def _count_channels(slot: Slot) -> str:
    return f"{slot.channels} · 1×1" if slot.spatial == "pooled" else str(slot.channels)


def _place_ups(downs: Sequence[Slot], boxes: Sequence[Box]) -> list[Box]:
    """Return a box for each run of slots that one up block consumes, beside them."""
    ups: list[Box] = []
    for up_block, run in groupby(zip(downs, boxes, strict=True), key=lambda pair: pair[0].up_block):
        beside = [box for _, box in run]
        if up_block:
            inset = max(box.x for box in beside) - _PATH
            x, y = WIDTH - _UP - 14 - inset, beside[0].y
            ups.append(Box(x, y, _UP, beside[-1].bottom - y, _cut(up_block, _UP)))
    return ups


def _place_mid(bottom: float, mids: Sequence[Slot], widest: int) -> Box:
    breadth, label = float(_WIDEST), "mid"
    if mids:
        # Some UNets have no mid block: the last skip goes straight to the up path.
        name = "mid" if mids[0].producer.startswith("mid") else "no mid block ·"
        breadth, label = _measure(mids[0], widest), f"{name} {_count_channels(mids[0])}"
    width = max(40 + breadth, len(label) * _LETTER + 32)
    return Box((_LANE + WIDTH - width) / 2, bottom + 18, width, 30, label)


def _draw_slot(slot: Slot, result: Result | None, box: Box, skip: str, left: float, right: float, middle: float) -> SlotDrawing:
    """Return a slot; if it failed, the reason stands between `left` and `right` about the height `middle`."""
    number = SHAPECHECK.index(slot.name)
    label = _cut(slot.name, 150) if number is None else "mid" if number == -1 else f"down {number:02d}"
    strip, lines = _place_reason(result, left, right, middle) if result and result.status == "failed" else (None, ())
    effect = result.effect if result else None
    bars = (("strength", effect.strength, -8), ("cosine", effect.cosine, 3)) if effect else ()
    return SlotDrawing(
        slot=slot,
        label=label,
        producer=_cut(slot.producer, 200),
        status=result.status if result else "not run",
        reason=result.reason if result else "",
        box=box,
        arrow=f"M{_LANE - 6} {box.middle:.1f}H{box.x - 11:.1f}",
        skip=skip,
        # Nothing is filled for NaN, nor for what points the other way.
        bars=tuple(
            (name, box.middle + shift, _BAR * min(value / _FULL_BAR, 1.0) if value > 0 else 0.0) for name, value, shift in bars
        ),
        strip=strip,
        lines=lines,
    )


def _place_reason(result: Result, left: float, right: float, middle: float) -> tuple[Box, tuple[str, ...]]:
    """Return a strip in the middle of the room, as wide as its words: at most two lines of about the same length."""
    why = result.reason or "failed"
    text = why.removeprefix(result.check.where).lstrip(" :") or why
    most = int((right - left - 20) / _SMALL_LETTER)
    letters = most if len(text) <= most else min(most, len(text) // 2 + 8)
    lines = tuple(textwrap.wrap(text, letters, max_lines=2, placeholder=" …"))
    width = min(max(map(len, lines)) * _SMALL_LETTER + 20, right - left)
    height = 6 + 12 * len(lines)
    return Box((left + right - width) / 2, middle - height / 2, width, height), lines


def _cut(text: str, room: float) -> str:
    """Return as much of the text as fits into the room, with an ellipsis if that is not all of it."""
    most = max(int(room / _LETTER), 2)
    return text if len(text) <= most else text[: most - 1].rstrip() + "…"


def _draw_flows(boxes: Sequence[Box], mid: Box, ups: Sequence[Box]) -> list[str]:
    """Return the paths down the left, through mid, up the right."""
    down = [_bend(upper.x + 18, upper.bottom, lower.x + 18, lower.y) for upper, lower in pairwise(boxes)]
    up = [_bend(lower.right - 18, lower.y, upper.right - 18, upper.bottom) for upper, lower in pairwise(ups)]
    if boxes:
        down.append(_bend(boxes[-1].x + 18, boxes[-1].bottom, mid.x + 20, mid.y))
    if ups:
        # From mid's right edge, up into the block above.
        x, y = ups[-1].right - 18, mid.middle
        curve = f"Q{x:.1f} {y:.1f} {x:.1f} {mid.y - 12:.1f}"
        up.append(f"M{mid.right:.1f} {y:.1f}H{x - 40:.1f}{curve}V{ups[-1].bottom:.1f}")
    return down + up


def _bend(x: float, y: float, to_x: float, to_y: float) -> str:
    half = (y + to_y) / 2
    return f"M{x:.1f} {y:.1f}C{x:.1f} {half:.1f} {to_x:.1f} {half:.1f} {to_x:.1f} {to_y:.1f}"
