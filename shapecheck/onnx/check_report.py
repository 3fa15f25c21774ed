"""The report on an exported file that was checked, as text, Markdown or JSON."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict

from shapecheck.contract import Mismatch
from shapecheck.onnx.records import FileCheck
from shapecheck.presets.families import describe_families, find_families
from shapecheck.report.document import Document, Facts, Format, Heading, Part, Points, Table
from shapecheck.report.mismatches import count_mismatches, describe_fit, list_mismatches
from shapecheck.report.numbers import dump_json


def render_text(
    checked: FileCheck, *, form: Format = "human", controlnets: Sequence[str] = (), misfits: Sequence[Mismatch] = ()
) -> str:
    """Return the whole report; `misfits` are the mismatches between UNet and ControlNets, apart from the file's own faults."""
    source = checked.contract.header.source or checked.contract.digest
    bases = {
        "given": f"the contract of {source}",
        "inside": f"the contract inside the file ({source})",
        "preset": "the preset it fits best",
        "none": "itself alone: no preset fits; name its UNet with --model",
    }
    naming = f"named as by {checked.naming}" if checked.naming else "found by graph walk"
    facts = [
        ("held to", bases[checked.basis]),
        ("identity", describe_families(checked.contract)),
        ("exporter", checked.exporter or "not stated"),
        ("slots", f"{len(checked.slots)}, {naming}" if checked.slots else ""),
        ("sizes", _describe_sizes(checked)),
    ]
    parts: list[Part] = [Facts(facts)]
    if checked.slots:
        rows = []
        for number, slot in enumerate(checked.slots):
            other_name = "" if slot.slot == slot.name else slot.slot or "none"
            rows.append((number, slot.name, slot.shape, slot.skip or "nothing", slot.producer, other_name))
        headers = ("#", "input", "declared shape", "is added to", "made by", "slot")
        parts += [Heading("Slots as the file has them"), Table(headers, rows)]
    inputs = [(declared.name, declared.shape, declared.dtype) for declared in checked.inputs]
    parts += [Heading("Base inputs"), Table(("input", "declared shape", "dtype"), inputs)]
    if checked.mismatches:
        parts += [Heading("Faults"), *list_mismatches(checked.mismatches, "the file has", "it should have")]
    if misfits:
        parts += [Heading(f"ControlNet: {', '.join(controlnets)}"), *list_mismatches(misfits, "ControlNet gives")]
    notes = (*checked.notes, checked.unchecked) if checked.mismatches and checked.unchecked else checked.notes
    parts.append(Points(notes, "note: "))
    fit = [describe_fit(controlnets, misfits)] if controlnets else []
    return Document(checked.path, parts, [_describe_verdict(checked), *fit]).render(form)


def render_json(checked: FileCheck, *, controlnets: Sequence[str] = (), misfits: Sequence[Mismatch] = ()) -> str:
    """Return the same report as JSON."""
    verdict = "not checked" if checked.unchecked else "fine"
    record = {
        "file": checked.path,
        "verdict": "broken" if checked.mismatches or misfits else verdict,
        "unchecked": checked.unchecked or None,
        "basis": checked.basis,
        "presets": list(find_families(checked.contract)),
        "digest": checked.contract.digest,
        "exporter": checked.exporter,
        "naming": checked.naming or None,
        "sizes": {"divisor": checked.divisor, "fixed": dict(checked.fixed)},
        "geometry": asdict(checked.geometry) if checked.geometry else None,
        "inputs": [asdict(declared) for declared in checked.inputs],
        "slots": [asdict(slot) for slot in checked.slots],
        "mismatches": [asdict(mismatch) for mismatch in checked.mismatches],
        "controlnets": list(controlnets),
        "controlnet_mismatches": [asdict(misfit) for misfit in misfits],
        "notes": list(checked.notes),
    }
    return dump_json(record)


def _describe_sizes(checked: FileCheck) -> str:
    fixed = dict(checked.fixed)
    works = "every latent size" if checked.divisor == 1 else f"multiples of {checked.divisor} only"
    if checked.divisor == 0:
        works = "works at none that was tried"
    elif {"h", "w"} <= fixed.keys():
        works = "one"
    return f"{works}; fixed: {', '.join(f'{symbol}={size}' for symbol, size in fixed.items())}" if fixed else works


def _describe_verdict(checked: FileCheck) -> str:
    if checked.mismatches:
        return f"BROKEN: {count_mismatches(checked.mismatches, 'fault')}"
    if checked.unchecked:
        return f"NOT CHECKED: {checked.unchecked}"
    outputs = 0 if checked.slots else len(checked.contract.slots)
    slots = f"{outputs} outputs" if outputs else f"{len(checked.slots)} slots"
    if checked.makes_residuals:
        slots = "residuals made inside"
    at = f" at {checked.geometry}" if checked.geometry else ""
    return f"FINE: {slots} and {len(checked.inputs)} base inputs{at}"
