"""A contract, or the mismatches that prevented one, as text, Markdown or JSON."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any, Literal

from shapecheck.contract import AddSite, Contract, Geometry, Mismatch, Slot, show
from shapecheck.contract.naming import SHAPECHECK, is_feature
from shapecheck.presets.families import describe_families, find_families
from shapecheck.report.document import Document, Facts, Format, Heading, Part, Points, Table
from shapecheck.report.mismatches import count_mismatches, list_mismatches
from shapecheck.report.numbers import dump_json

Verdict = Literal["agree", "mismatch", "unet alone"]


def render_text(
    contract: Contract,
    mismatches: Sequence[Mismatch],
    geometry: Geometry,
    *,
    form: Format = "human",
    lines: bool = True,
) -> str:
    """Return the whole report.

    `lines=False` leaves out what moves with the libraries' releases: line numbers and versions.
    """
    header = contract.header
    nets = " + ".join(net.source for net in header.controlnets) or "no ControlNet"
    title = f"{header.source} with {nets}" + (f" + {header.adapter}" if header.adapter else "")
    shared_sites = _find_shared_sites(contract, lines)
    feature_sites = dict.fromkeys(_format_site(add, lines) for slot in contract.features for add in slot.adds)
    facts = [
        ("identity", describe_families(contract)),
        ("model", f"{contract.class_name}, {header.parameters:,} parameters" if header.parameters else contract.class_name),
        ("sizes", _describe_sizes(contract)),
        ("shown at", f"{geometry} ({geometry.width * header.vae_factor}×{geometry.height * header.vae_factor} pixels)"),
        ("added at", shared_sites),
        ("features at", ", ".join(feature_sites)),
        *(("hand-over", sentence) for sentence in header.handover),
        ("digest", contract.digest),
        ("observed with", ", ".join(f"{name} {release}" for name, release in header.versions) if lines else ""),
    ]
    parts: list[Part] = [Facts(facts), Heading("Slots"), _tabulate_slots(contract.slots, geometry, bool(shared_sites), lines)]
    if contract.features:
        parts += [Heading("Features of the adapter"), _tabulate_slots(contract.features, geometry, True, lines)]
    inputs = [
        (given.name, "×".join(map(str, given.shape)), show(given.shape_at(geometry)), given.dtype, given.argument)
        for given in contract.inputs
    ]
    parts += [Heading("Base inputs"), Table(("input", "rule", "shape", "dtype", "argument of forward"), inputs)]
    if mismatches:
        featured = {is_feature(mismatch.where) for mismatch in mismatches}
        giver = "given" if len(featured) > 1 else "adapter gives" if featured == {True} else "ControlNet gives"
        parts += [Heading("Mismatches"), *list_mismatches(mismatches, giver)]
    parts.append(Points(header.notes, "note: "))
    return Document(title, parts, [_describe_verdict(contract, mismatches)]).render(form)


def judge_probe(contract: Contract, mismatches: Sequence[Mismatch]) -> Verdict:
    """Return the verdict of a probe."""
    if mismatches:
        return "mismatch"
    return "agree" if contract.slots and contract.header.controlnets else "unet alone"


def render_json(contract: Contract, mismatches: Sequence[Mismatch], geometry: Geometry) -> str:
    """Return the contract, as `Contract.from_json` reads it, and under `report` what this run found."""
    report: dict[str, Any] = {
        "verdict": judge_probe(contract, mismatches),
        "claim": False,  # of claimed shapes explain speaks
        "families": list(find_families(contract)),
        "geometry": asdict(geometry),
        "shapes": {slot.name: slot.shape_at(geometry) for slot in contract.residuals},
        "mismatches": [asdict(mismatch) for mismatch in mismatches],
    }
    return dump_json({"report": report} | contract.to_value())


_ROUNDED = {
    "ceil": "; halvings round up (ceil)",
    "floor": "; halvings round down (floor)",
    "exact": "; no odd size is halved",
}


def _describe_sizes(contract: Contract) -> str:
    roundings = {rounding for slot in contract.slots for dim in slot.skip[2:] for rounding in dim.halvings}
    if contract.divisor > 1:
        accepted = f"latent height and width must be multiples of {contract.divisor}"
    else:
        accepted = "every latent size, odd ones included"
    if len(roundings) <= 1:
        return accepted + "".join(_ROUNDED[rounding] for rounding in roundings)
    chains = ", ".join(dict.fromkeys(str(slot.skip[2]) for slot in contract.slots))
    return f"{accepted}; halvings are mixed: {chains}"


def _tabulate_slots(slots: Sequence[Slot], geometry: Geometry, sites_are_told: bool, lines: bool) -> Table:
    rows = [
        (
            number,
            slot.name,
            slot.channels,
            slot.stride,
            show(slot.shape_at(geometry)) + ("" if slot.spatial == "full" else " pooled"),
            slot.producer,
            "" if sites_are_told else _list_sites(slot, lines),
            slot.up_block,
        )
        for number, slot in enumerate(slots)
    ]
    return Table(("#", "slot", "channels", "stride", "shape", "skip from", "added at", "used by"), rows)


def _list_sites(slot: Slot, lines: bool) -> str:
    return ", ".join(_format_site(add, lines) for add in slot.adds)


def _format_site(add: AddSite, lines: bool) -> str:
    return str(add) if lines else add.function


def _find_shared_sites(contract: Contract, lines: bool) -> str:
    """Return `unet_2d_condition.py:1165 (down), :1193 (mid)` if that says it of every slot, else nothing."""
    downs, mids = (
        {_list_sites(slot, lines) for slot in contract.slots if (slot.name == SHAPECHECK.mid) is mid} for mid in (False, True)
    )
    if len(downs | mids) == 1:
        return (downs | mids).pop()
    if (len(downs), len(mids)) != (1, 1) or "" in downs | mids:
        return ""
    down, mid = downs.pop(), mids.pop()
    file = down.partition(":")[0]
    return f"{down} (down), {mid.removeprefix(file) if mid.startswith(f'{file}:') else mid} (mid)"


def _describe_verdict(contract: Contract, mismatches: Sequence[Mismatch]) -> str:
    slots = f"{len(contract.slots)} slots" + (f" and {len(contract.features)} features" if contract.features else "")
    verdict = judge_probe(contract, mismatches)
    if verdict == "mismatch":
        return f"MISMATCH: {count_mismatches(mismatches, 'place')}"
    if verdict == "unet alone":
        return f"UNET ALONE: {slots} observed, no ControlNet to compare"
    return f"AGREE: {slots}, both sides observed"
