"""A contract, or the mismatches that prevented one, as text, Markdown or JSON."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any, Literal

from tabulate import tabulate

from shapecheck import presets
from shapecheck.contract import AddSite, Contract, Geometry, Mismatch, Slot, show
from shapecheck.contract.naming import SHAPECHECK
from shapecheck.presets.families import families

Format = Literal["human", "markdown"]
Verdict = Literal["agree", "mismatch", "unet alone"]
LINE = 100
"""Columns a person's text is wrapped at."""
_COLUMN = 40
_WRAPPED = ("ControlNet gives", "claimed", "the file has", "UNet takes", "likely cause")


def told(
    contract: Contract,
    mismatches: Sequence[Mismatch],
    geometry: Geometry,
    *,
    form: Format = "human",
    lines: bool = True,
    claim: bool = False,
) -> str:
    """The whole report.

    `lines=False` leaves out what moves with the libraries' releases: line numbers and versions.
    `claim`: the mismatches are those of claimed shapes, not of the ControlNet the contract was observed with.
    """
    verdict_line = _verdict_line(contract, mismatches, form, claim)
    parts = [_title(contract, form, claim), verdict_line, _facts(contract, geometry, form, lines=lines)]
    parts += [_heading("Slots", form), _slots(contract, geometry, form, lines=lines)]
    parts += [_heading("Base inputs", form), _inputs(contract, geometry, form)]
    if mismatches:
        parts += [_heading("Mismatches", form), _mismatch_table(mismatches, form, "claimed" if claim else "ControlNet gives")]
    parts += [_notes(contract, form), verdict_line if form == "human" else ""]
    return "\n\n".join(part for part in parts if part) + "\n"


def verdict(contract: Contract, mismatches: Sequence[Mismatch], claim: bool = False) -> Verdict:
    """What a probe came to; `claim` as in `told`."""
    if mismatches:
        return "mismatch"
    return "agree" if contract.slots and (claim or contract.header.controlnets) else "unet alone"


def as_json(contract: Contract, mismatches: Sequence[Mismatch], geometry: Geometry, *, claim: bool = False) -> str:
    """The same for machines: the contract, as `Contract.from_json` reads it, and under `report` what this run found."""
    report: dict[str, Any] = {
        "verdict": verdict(contract, mismatches, claim),
        "claim": claim,
        "families": list(families(contract)),
        "geometry": asdict(geometry),
        "shapes": {slot.name: slot.shape_at(geometry) for slot in contract.slots},
        "mismatches": [asdict(each) for each in mismatches],
    }
    return json.dumps({"report": report} | json.loads(contract.to_json()), indent=1, ensure_ascii=False) + "\n"


def _title(contract: Contract, form: Format, claim: bool) -> str:
    observed = " + ".join(net.source for net in contract.header.controlnets) or "no ControlNet"
    nets = "claimed shapes" if claim else observed
    title = f"{contract.header.source} with {nets}"
    return f"# {title}" if form == "markdown" else title


def _heading(text: str, form: Format) -> str:
    return f"## {text}" if form == "markdown" else text


def _facts(contract: Contract, geometry: Geometry, form: Format, *, lines: bool) -> str:
    header = contract.header
    fits = families(contract)
    known = ", ".join(dict.fromkeys(presets.load(name).family for name in fits))
    factor = header.vae_factor
    facts = [
        ("identity", f"{known} (presets: {', '.join(fits)})" if fits else "no known family"),
        ("model", f"{contract.unet}, {header.parameters:,} parameters" if header.parameters else contract.unet),
        ("sizes", _size_rule(contract)),
        ("shown at", f"{geometry} ({geometry.width * factor}×{geometry.height * factor} pixels)"),
        *([("added at", sites)] if (sites := _shared_sites(contract, lines)) else []),
        *(("hand-over", each) for each in header.handover),
        ("digest", contract.digest),
    ]
    if lines:
        facts.append(("observed with", ", ".join(f"{name} {release}" for name, release in header.versions)))
    if form == "markdown":
        return "\n".join(f"- {name}: {value}" for name, value in facts)
    return tabulate(facts, tablefmt="plain", disable_numparse=True)


_ROUNDED = {
    "ceil": "; halvings round up (ceil)",
    "floor": "; halvings round down (floor)",
    "exact": "; no odd size is halved",
}


def _size_rule(contract: Contract) -> str:
    roundings = {rounding for slot in contract.slots for dim in slot.skip[2:] for rounding in dim.halvings}
    if contract.divisor > 1:
        accepted = f"latent height and width must be multiples of {contract.divisor}"
    else:
        accepted = "every latent size, odd ones included"
    if len(roundings) <= 1:
        return accepted + "".join(_ROUNDED[rounding] for rounding in roundings)
    chains = ", ".join(dict.fromkeys(str(slot.skip[2]) for slot in contract.slots))
    return f"{accepted}; halvings are mixed: {chains}"


def _slots(contract: Contract, geometry: Geometry, form: Format, *, lines: bool) -> str:
    headers = ("#", "slot", "channels", "stride", "shape", "skip from", "added at", "used by")
    told_once = _shared_sites(contract, lines)
    rows = [
        (
            number,
            slot.name,
            slot.channels,
            slot.stride,
            _slot_shape(slot, geometry),
            slot.producer,
            "" if told_once else _sites(slot, lines),
            slot.up_block,
        )
        for number, slot in enumerate(contract.slots)
    ]
    return _table(*_without_empty_columns(rows, headers), form)


def _slot_shape(slot: Slot, geometry: Geometry) -> str:
    shape = show(slot.shape_at(geometry))
    return shape if slot.spatial == "full" else f"{shape} pooled"


def _sites(slot: Slot, lines: bool) -> str:
    return ", ".join(_site(add, lines) for add in slot.adds)


def _site(add: AddSite, lines: bool) -> str:
    return str(add) if lines else add.function


def _shared_sites(contract: Contract, lines: bool) -> str:
    """`unet_2d_condition.py:1165 (down), :1193 (mid)` where that says it of every slot, else nothing."""
    downs, mids = (
        {_sites(slot, lines) for slot in contract.slots if (slot.name == SHAPECHECK.mid) is mid} for mid in (False, True)
    )
    if len(downs | mids) == 1:
        return (downs | mids).pop()
    if (len(downs), len(mids)) != (1, 1) or "" in downs | mids:
        return ""
    down, mid = downs.pop(), mids.pop()
    file = down.partition(":")[0]
    return f"{down} (down), {mid.removeprefix(file) if mid.startswith(f'{file}:') else mid} (mid)"


def _inputs(contract: Contract, geometry: Geometry, form: Format) -> str:
    rows = [
        (each.name, "×".join(map(str, each.shape)), show(each.shape_at(geometry)), each.dtype, each.argument)
        for each in contract.inputs
    ]
    return _table(rows, ("input", "rule", "shape", "dtype", "argument of forward"), form)


def _mismatch_table(mismatches: Sequence[Mismatch], form: Format, given: str) -> str:
    """Every mismatch, less the cause that all of them share."""
    headers = ("where", "kind", given, "UNet takes", "UNet module", "ControlNet", "ControlNet module", "likely cause")
    shared = _shared_cause(mismatches)
    several = len({each.controlnet for each in mismatches}) > 1
    usual = form == "human" and all(map(_is_of_the_slot, mismatches))
    rows = [
        (
            each.where,
            each.kind,
            *_sides(each),
            each.unet_module,
            each.controlnet if several else "",
            "" if usual else each.controlnet_module,
            each.cause.removeprefix(shared).removeprefix("; ") if shared else each.cause,
        )
        for each in mismatches
    ]
    table = _table(*_without_empty_columns(rows, headers), form)
    at = next((each.geometry for each in mismatches if each.geometry), None)
    return f"{table}\n\nTold at {at}." if at else table


def _is_of_the_slot(mismatch: Mismatch) -> bool:
    """Whether the ControlNet's module is the one any reader expects."""
    number = SHAPECHECK.index(mismatch.where)
    module = "controlnet_mid_block" if number == -1 else f"controlnet_down_blocks.{number}"
    return mismatch.controlnet_module in ("", module)


def _sides(mismatch: Mismatch) -> tuple[str, str]:
    return tuple(value if isinstance(value, str) else show(value) for value in (mismatch.observed, mismatch.expected))  # type: ignore[return-value]


def _shared_cause(mismatches: Sequence[Mismatch]) -> str:
    """The cause that every mismatch names first, to be told once."""
    firsts = {each.cause.split("; ")[0] for each in mismatches}
    return firsts.pop() if len(firsts) == 1 and len(mismatches) > 1 else ""


def _without_empty_columns(
    rows: Sequence[Sequence[Any]], headers: Sequence[str]
) -> tuple[list[tuple[Any, ...]], tuple[str, ...]]:
    kept = [at for at, _ in enumerate(headers) if any(row[at] for row in rows)]
    return [tuple(row[at] for at in kept) for row in rows], tuple(headers[at] for at in kept)


def _notes(contract: Contract, form: Format) -> str:
    if form == "markdown":
        return "\n".join(f"- {note}" for note in contract.header.notes)
    return "\n".join(wrapped(f"note: {note}", "      ") for note in contract.header.notes)


def wrapped(text: str, indent: str) -> str:
    """For people: lines of at most LINE columns, but no path or address broken."""
    return textwrap.fill(text, LINE, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)


def _verdict_line(contract: Contract, mismatches: Sequence[Mismatch], form: Format, claim: bool) -> str:
    slots = f"{len(contract.slots)} slots"
    shared = _shared_cause(mismatches)
    texts = {
        "mismatch": f"MISMATCH: {len(mismatches)} {'place' if len(mismatches) == 1 else 'places'}",
        "agree": f"AGREE: the claimed shapes are those of the {slots}" if claim else f"AGREE: {slots}, both sides observed",
        "unet alone": f"UNET ALONE: {slots} observed, no ControlNet to compare",
    }
    text = texts[verdict(contract, mismatches, claim)] + (f"; likely cause: {shared}" if shared else "")
    return f"**{text}**" if form == "markdown" else text


def _table(rows: Sequence[Sequence[Any]], headers: Sequence[str], form: Format) -> str:
    if not rows:
        return "none"
    sides = ["right" if isinstance(cell, int) else "left" for cell in rows[0]]
    if form == "markdown":
        return tabulate(rows, headers, tablefmt="github", disable_numparse=True, colalign=sides)
    widest = [_COLUMN if header in _WRAPPED else None for header in headers]
    body = [headers, *rows]  # a header given as such is padded by two columns
    lines = tabulate(body, tablefmt="simple", disable_numparse=True, colalign=sides, maxcolwidths=widest).splitlines()
    return "\n".join([lines[1], lines[0], *lines[2:-1]])
