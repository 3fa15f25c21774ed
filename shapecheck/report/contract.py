"""A contract, or the mismatches that prevented one, as text, Markdown or JSON."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any, Literal

from tabulate import tabulate

from shapecheck import presets
from shapecheck.contract import Contract, Geometry, Mismatch, Slot, show
from shapecheck.presets.families import families

Format = Literal["human", "markdown"]
_STYLE = {"human": "simple", "markdown": "github"}


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
    parts = [_title(contract, form, claim), _facts(contract, geometry, form, lines=lines)]
    parts += [_heading("Slots", form), _slots(contract, geometry, form, lines=lines)]
    parts += [_heading("Base inputs", form), _inputs(contract, geometry, form)]
    if mismatches:
        parts += [_heading("Mismatches", form), _mismatches(mismatches, form, "claimed" if claim else "ControlNet gives")]
    parts += [_notes(contract, form), _verdict(contract, mismatches, form, claim)]
    return "\n\n".join(part for part in parts if part) + "\n"


def as_json(contract: Contract, mismatches: Sequence[Mismatch], geometry: Geometry) -> str:
    """The same for machines: the contract, as `Contract.from_json` reads it, and under `report` what this run found."""
    report: dict[str, Any] = {
        "verdict": "mismatch" if mismatches else "agree" if contract.header.controlnets else "unet alone",
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
        *(("hand-over", each) for each in header.handover),
        ("digest", contract.digest),
    ]
    if lines:
        facts.append(("observed with", ", ".join(f"{name} {release}" for name, release in header.versions)))
    if form == "markdown":
        return "\n".join(f"- {name}: {value}" for name, value in facts)
    return tabulate(facts, tablefmt="plain", disable_numparse=True)


def _size_rule(contract: Contract) -> str:
    roundings = {rounding for slot in contract.slots for dim in slot.skip[2:] for rounding in dim.halvings}
    if contract.divisor > 1:
        accepted = f"latent height and width must be multiples of {contract.divisor}"
    else:
        accepted = "every latent size, odd ones included"
    if len(roundings) == 1:
        return f"{accepted}; halvings round {'up (ceil)' if roundings == {'ceil'} else 'down (floor)'}"
    chains = ", ".join(dict.fromkeys(str(slot.skip[2]) for slot in contract.slots))
    return f"{accepted}; halvings are mixed: {chains}"


def _slots(contract: Contract, geometry: Geometry, form: Format, *, lines: bool) -> str:
    headers = ("#", "slot", "channels", "stride", "shape", "skip from", "added at", "used by")
    rows = [
        (
            number,
            slot.name,
            slot.channels,
            slot.stride,
            _slot_shape(slot, geometry),
            slot.producer,
            _sites(slot, lines),
            slot.up_block,
        )
        for number, slot in enumerate(contract.slots)
    ]
    return _table(rows, headers, form)


def _slot_shape(slot: Slot, geometry: Geometry) -> str:
    shape = show(slot.shape_at(geometry))
    return shape if slot.spatial == "full" else f"{shape} pooled"


def _sites(slot: Slot, lines: bool) -> str:
    return ", ".join(str(add) if lines else add.function for add in slot.adds)


def _inputs(contract: Contract, geometry: Geometry, form: Format) -> str:
    rows = [
        (each.name, "×".join(map(str, each.shape)), show(each.shape_at(geometry)), each.dtype, each.argument)
        for each in contract.inputs
    ]
    return _table(rows, ("input", "rule", "shape", "dtype", "argument of forward"), form)


def _mismatches(mismatches: Sequence[Mismatch], form: Format, given: str) -> str:
    rows = [(each.where, each.kind, *_sides(each), each.unet_module, each.controlnet_module, each.cause) for each in mismatches]
    headers = ("where", "kind", given, "UNet takes", "UNet module", "ControlNet module", "likely cause")
    shared = _shared_cause(mismatches)
    if shared:
        rows = [(*row[:-1], row[-1].removeprefix(shared).removeprefix("; ")) for row in rows]
    table = _table(*_without_empty_columns(rows, headers), form)
    at = next((each.geometry for each in mismatches if each.geometry), None)
    return "\n\n".join(filter(None, (table, f"Told at {at}." if at else "", f"Likely cause: {shared}." if shared else "")))


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
    bullet = "- " if form == "markdown" else "note: "
    return "\n".join(f"{bullet}{note}" for note in contract.header.notes)


def _verdict(contract: Contract, mismatches: Sequence[Mismatch], form: Format, claim: bool) -> str:
    if claim and not mismatches:
        text = f"AGREE: the claimed shapes are those of the {len(contract.slots)} slots"
    elif mismatches:
        text = f"MISMATCH: {len(mismatches)} {'place' if len(mismatches) == 1 else 'places'}"
    elif contract.header.controlnets:
        text = f"AGREE: {len(contract.slots)} slots, both sides observed"
    else:
        text = f"UNET ALONE: {len(contract.slots)} slots observed, no ControlNet to compare"
    return f"**{text}**" if form == "markdown" else text


def _table(rows: Sequence[Sequence[Any]], headers: Sequence[str], form: Format) -> str:
    sides = ["right" if isinstance(cell, int) else "left" for cell in rows[0]]
    return tabulate(rows, headers, tablefmt=_STYLE[form], disable_numparse=True, colalign=sides)
