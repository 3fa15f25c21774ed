"""A contract, or the mismatches that prevented one, as text, Markdown or JSON."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any, Literal

from shapecheck.contract import Contract, Geometry, Mismatch, Slot, show
from shapecheck.contract.naming import SHAPECHECK, is_feature
from shapecheck.observe import sizes
from shapecheck.presets.families import describe_families, find_families
from shapecheck.report.document import Document, Facts, Format, Heading, Part, Points, Table
from shapecheck.report.mismatches import count_mismatches, list_mismatches
from shapecheck.report.numbers import encode_nonfinite

Verdict = Literal["agree", "mismatch", "unet alone"]


def render_text(
    contract: Contract, mismatches: Sequence[Mismatch], geometry: Geometry, *, form: Format = "human", lines: bool = True
) -> str:
    """Return the whole report. `lines=False` leaves out what moves with the libraries' releases: line numbers and versions."""
    header = contract.header
    nets = " + ".join(net.source for net in header.controlnets) or "no ControlNet"
    title = f"{header.source} with {nets}" + (f" + {header.adapter}" if header.adapter else "")
    sites = {slot.name: [str(add) if lines else add.function for add in slot.adds] for slot in contract.residuals}
    shared_sites = _find_shared_sites({slot.name: sites[slot.name] for slot in contract.slots})
    facts = [
        ("identity", describe_families(contract)),
        ("model", f"{contract.class_name}, {header.parameters:,} parameters" if header.parameters else contract.class_name),
        ("sizes", _describe_sizes(contract)),
        ("shown at", f"{geometry} ({geometry.width * header.vae_factor}×{geometry.height * header.vae_factor} pixels)"),
        ("added at", shared_sites),
        ("features at", ", ".join(dict.fromkeys(site for slot in contract.features for site in sites[slot.name]))),
        *(("hand-over", sentence) for sentence in header.handover),
        ("digest", contract.digest),
        ("observed with", ", ".join(f"{name} {release}" for name, release in header.versions) if lines else ""),
    ]
    parts: list[Part] = [Facts(facts), Heading("Slots")]
    parts.append(_tabulate_slots(contract.slots, geometry, {} if shared_sites else sites))
    if contract.features:
        parts += [Heading("Features of the adapter"), _tabulate_slots(contract.features, geometry, {})]
    inputs = [
        (base.name, "×".join(map(str, base.shape)), show(base.shape_at(geometry)), base.dtype, base.argument)
        for base in contract.inputs
    ]
    parts += [Heading("Base inputs"), Table(("input", "rule", "shape", "dtype", "argument of forward"), inputs)]
    if mismatches:
        kinds = {is_feature(mismatch.where) for mismatch in mismatches}
        actual = "given" if len(kinds) > 1 else "adapter gives" if kinds == {True} else "ControlNet gives"
        parts += [Heading("Mismatches"), *list_mismatches(mismatches, actual)]
    parts.append(Points(header.notes, "note: "))
    slots = f"{len(contract.slots)} slots" + (f" and {len(contract.features)} features" if contract.features else "")
    verdicts = {
        "mismatch": f"MISMATCH: {count_mismatches(mismatches, 'place')}",
        "unet alone": f"UNET ALONE: {slots} observed, no ControlNet to compare",
        "agree": f"AGREE: {slots}, both sides observed",
    }
    return Document(title, parts, [verdicts[judge_probe(contract, mismatches)]]).render(form)


def judge_probe(contract: Contract, mismatches: Sequence[Mismatch]) -> Verdict:
    """Return the verdict of a probe."""
    if mismatches:
        return "mismatch"
    return "agree" if contract.slots and contract.header.controlnets else "unet alone"


def render_json(contract: Contract, mismatches: Sequence[Mismatch], geometry: Geometry) -> str:
    """Return the contract, as `Contract.from_json` reads it, with the result of this run under `report`."""
    report: dict[str, Any] = {
        "verdict": judge_probe(contract, mismatches),
        "claim": False,  # claimed shapes are explain's business
        "families": list(find_families(contract)),
        "geometry": asdict(geometry),
        "shapes": {slot.name: slot.shape_at(geometry) for slot in contract.residuals},
        "mismatches": [asdict(mismatch) for mismatch in mismatches],
    }
    # the contract as `to_json` writes it, with numbers that are not finite
    return json.dumps({"report": encode_nonfinite(report)} | contract.to_value(), indent=1, ensure_ascii=False) + "\n"


def _describe_sizes(contract: Contract) -> str:
    roundings = {rounding for slot in contract.slots for dim in slot.skip[2:] for rounding in dim.halvings}
    if contract.divisor > 1:
        accepted = f"multiples of {contract.divisor} were observed and work, others were refused"
    else:
        deepest = max((len(dim.halvings) for slot in contract.slots for dim in slot.skip[2:]), default=0)
        tried = [*sizes.list_survey_sizes(deepest), *map(sizes.odd_geometry, range(3, deepest))]
        shown = ", ".join(f"{at.height}×{at.width}" for at in tried)
        accepted = f"{shown} were observed and work"
    if len(roundings) <= 1:
        words = {"ceil": "halvings round up (ceil)", "floor": "halvings round down (floor)", "exact": "no odd size is halved"}
        return "; ".join([accepted, *(words[rounding] for rounding in roundings)])
    chains = ", ".join(dict.fromkeys(str(slot.skip[2]) for slot in contract.slots))
    return f"{accepted}; halvings are mixed: {chains}"


def _tabulate_slots(slots: Sequence[Slot], geometry: Geometry, sites: Mapping[str, Sequence[str]]) -> Table:
    rows = [
        (
            number,
            slot.name,
            slot.channels,
            slot.stride,
            show(slot.shape_at(geometry)) + ("" if slot.spatial == "full" else " pooled"),
            slot.producer,
            ", ".join(sites.get(slot.name, ())),
            slot.up_block,
        )
        for number, slot in enumerate(slots)
    ]
    return Table(("#", "slot", "channels", "stride", "shape", "skip from", "added at", "used by"), rows)


def _find_shared_sites(sites: Mapping[str, Sequence[str]]) -> str:
    """Return `unet_2d_condition.py:1165 (down), :1193 (mid)` if that says it of every slot, else nothing."""
    downs = {", ".join(added) for name, added in sites.items() if name != SHAPECHECK.mid}
    mids = {", ".join(added) for name, added in sites.items() if name == SHAPECHECK.mid}
    if len(downs | mids) == 1:
        return (downs | mids).pop()
    if (len(downs), len(mids)) != (1, 1) or "" in downs | mids:
        return ""
    down, mid = downs.pop(), mids.pop()
    file = down.partition(":")[0]
    return f"{down} (down), {mid.removeprefix(file) if mid.startswith(f'{file}:') else mid} (mid)"
