"""A contract, or the mismatches that prevented one, as text, Markdown or JSON."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any, Literal

from shapecheck.contract import AddSite, Contract, Geometry, Mismatch, Slot, show
from shapecheck.contract.naming import SHAPECHECK, is_feature
from shapecheck.presets.families import families, identity
from shapecheck.report.tables import Format, fact_list, heading, mismatch_table, note_list, shared_cause, table

Verdict = Literal["agree", "mismatch", "unet alone"]


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
    parts += [
        heading("Slots", form),
        _slots(contract.slots, geometry, form, told_once=_shared_sites(contract, lines), lines=lines),
    ]
    if contract.features:
        parts += [
            heading("Features of the adapter", form),
            _slots(contract.features, geometry, form, told_once="above", lines=lines),
        ]
    parts += [heading("Base inputs", form), _inputs(contract, geometry, form)]
    if mismatches:
        parts += [heading("Mismatches", form), mismatch_table(mismatches, form, "claimed" if claim else _giver(mismatches))]
    parts += [note_list(contract.header.notes, form), verdict_line if form == "human" else ""]
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
        "shapes": {slot.name: slot.shape_at(geometry) for slot in contract.residuals},
        "mismatches": [asdict(each) for each in mismatches],
    }
    return json.dumps({"report": report} | json.loads(contract.to_json()), indent=1, ensure_ascii=False) + "\n"


def _title(contract: Contract, form: Format, claim: bool) -> str:
    observed = " + ".join(net.source for net in contract.header.controlnets) or "no ControlNet"
    nets = "claimed shapes" if claim else observed
    title = f"{contract.header.source} with {nets}" + (f" + {contract.header.adapter}" if contract.header.adapter else "")
    return f"# {title}" if form == "markdown" else title


def _facts(contract: Contract, geometry: Geometry, form: Format, *, lines: bool) -> str:
    header = contract.header
    factor = header.vae_factor
    facts = [
        ("identity", identity(contract)),
        ("model", f"{contract.class_name}, {header.parameters:,} parameters" if header.parameters else contract.class_name),
        ("sizes", _size_rule(contract)),
        ("shown at", f"{geometry} ({geometry.width * factor}×{geometry.height * factor} pixels)"),
        *([("added at", sites)] if (sites := _shared_sites(contract, lines)) else []),
        *([("features at", _feature_sites(contract, lines))] if contract.features else []),
        *(("hand-over", each) for each in header.handover),
        ("digest", contract.digest),
    ]
    if lines:
        facts.append(("observed with", ", ".join(f"{name} {release}" for name, release in header.versions)))
    return fact_list(facts, form)


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


def _giver(mismatches: Sequence[Mismatch]) -> str:
    featured = {is_feature(each.where) for each in mismatches}
    return "given" if len(featured) > 1 else "adapter gives" if featured == {True} else "ControlNet gives"


def _slots(slots: Sequence[Slot], geometry: Geometry, form: Format, *, told_once: str, lines: bool) -> str:
    headers = ("#", "slot", "channels", "stride", "shape", "skip from", "added at", "used by")
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
        for number, slot in enumerate(slots)
    ]
    return table(rows, headers, form)


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


def _feature_sites(contract: Contract, lines: bool) -> str:
    return ", ".join(dict.fromkeys(_site(add, lines) for slot in contract.features for add in slot.adds))


def _inputs(contract: Contract, geometry: Geometry, form: Format) -> str:
    rows = [
        (each.name, "×".join(map(str, each.shape)), show(each.shape_at(geometry)), each.dtype, each.argument)
        for each in contract.inputs
    ]
    return table(rows, ("input", "rule", "shape", "dtype", "argument of forward"), form)


def _verdict_line(contract: Contract, mismatches: Sequence[Mismatch], form: Format, claim: bool) -> str:
    slots = f"{len(contract.slots)} slots" + (f" and {len(contract.features)} features" if contract.features else "")
    shared = shared_cause(mismatches)
    texts = {
        "mismatch": f"MISMATCH: {len(mismatches)} {'place' if len(mismatches) == 1 else 'places'}",
        "agree": f"AGREE: the claimed shapes are those of the {slots}" if claim else f"AGREE: {slots}, both sides observed",
        "unet alone": f"UNET ALONE: {slots} observed, no ControlNet to compare",
    }
    text = texts[verdict(contract, mismatches, claim)] + (f"; likely cause: {shared}" if shared else "")
    return f"**{text}**" if form == "markdown" else text
