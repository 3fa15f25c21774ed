"""What an exported file came to, as text, Markdown or JSON."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict

from shapecheck.contract import Mismatch
from shapecheck.onnx.records import Check
from shapecheck.presets.families import families, identity
from shapecheck.report.tables import Format, fact_list, heading, mismatch_table, note_list, shared_cause, table


def told(checked: Check, *, form: Format = "human", controlnets: Sequence[str] = (), misfits: Sequence[Mismatch] = ()) -> str:
    """The whole report; `misfits` is what is wrong between the UNet and these ControlNets, apart from the file's own faults."""
    verdict = _verdict(checked, form, controlnets, misfits)
    parts = [f"# {checked.path}" if form == "markdown" else checked.path, verdict, _facts(checked, form)]
    if checked.slots:
        parts += [heading("Slots as the file has them", form), _slots(checked, form)]
    inputs = [(each.name, each.shape, each.dtype) for each in checked.inputs]
    parts += [heading("Base inputs", form), table(inputs, ("input", "declared shape", "dtype"), form)]
    if checked.mismatches:
        parts += [heading("Faults", form), mismatch_table(checked.mismatches, form, "the file has", "it should have")]
    if misfits:
        parts += [heading(f"ControlNet: {', '.join(controlnets)}", form), mismatch_table(misfits, form, "ControlNet gives")]
    notes = (*checked.notes, checked.unchecked) if checked.mismatches and checked.unchecked else checked.notes
    parts += [note_list(notes, form), verdict if form == "human" else ""]
    return "\n\n".join(part for part in parts if part) + "\n"


def as_json(checked: Check, *, controlnets: Sequence[str] = (), misfits: Sequence[Mismatch] = ()) -> str:
    """The same for machines."""
    verdict = "not checked" if checked.unchecked else "fine"
    record = {
        "file": checked.path,
        "verdict": "broken" if checked.mismatches or misfits else verdict,
        "unchecked": checked.unchecked or None,
        "basis": checked.basis,
        "presets": list(families(checked.contract)),
        "digest": checked.contract.digest,
        "exporter": checked.exporter,
        "naming": checked.naming or None,
        "sizes": {"divisor": checked.divisor, "fixed": dict(checked.fixed)},
        "geometry": asdict(checked.geometry) if checked.geometry else None,
        "inputs": [asdict(each) for each in checked.inputs],
        "slots": [asdict(each) for each in checked.slots],
        "mismatches": [asdict(each) for each in checked.mismatches],
        "controlnets": list(controlnets),
        "controlnet_mismatches": [asdict(each) for each in misfits],
        "notes": list(checked.notes),
    }
    return json.dumps(record, indent=1, ensure_ascii=False) + "\n"


def _facts(checked: Check, form: Format) -> str:
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
        ("identity", identity(checked.contract)),
        ("exporter", checked.exporter or "not said"),
    ]
    if checked.slots:
        facts.append(("slots", f"{len(checked.slots)}, {naming}"))
    return fact_list([*facts, ("sizes", _sizes(checked))], form)


def _sizes(checked: Check) -> str:
    fixed = dict(checked.fixed)
    if checked.divisor == 0:
        works = "works at none that was tried"
    elif {"h", "w"} <= fixed.keys():
        works = "one"
    else:
        works = "every latent size" if checked.divisor == 1 else f"multiples of {checked.divisor} only"
    return f"{works}; fixed: {', '.join(f'{symbol}={size}' for symbol, size in fixed.items())}" if fixed else works


def _slots(checked: Check, form: Format) -> str:
    headers = ("#", "input", "declared shape", "is added to", "made by", "slot")
    rows = [
        (
            number,
            each.name,
            each.shape,
            each.skip or "nothing",
            each.producer,
            "" if each.slot == each.name else each.slot or "none",
        )
        for number, each in enumerate(checked.slots)
    ]
    return table(rows, headers, form)


def _verdict(checked: Check, form: Format, controlnets: Sequence[str], misfits: Sequence[Mismatch]) -> str:
    if checked.mismatches:
        lines = [f"BROKEN: {_counted(checked.mismatches, 'fault')}"]
    elif checked.unchecked:
        lines = [f"NOT CHECKED: {checked.unchecked}"]
    else:
        emitted = len(checked.contract.slots)
        slots = f"{emitted} outputs" if emitted and not checked.slots else f"{len(checked.slots)} slots"
        where = f" at {checked.geometry}" if checked.geometry else ""
        lines = [f"FINE: {slots} and {len(checked.inputs)} base inputs{where}"]
    if controlnets:
        fit = f"does not fit: {_counted(misfits, 'place')}" if misfits else "fits"
        lines.append(f"CONTROLNET: {', '.join(controlnets)} {fit}")
    return "\n\n".join(f"**{line}**" for line in lines) if form == "markdown" else "\n".join(lines)


def _counted(found: Sequence[Mismatch], one: str) -> str:
    """How many there are, and what the table leaves out because every row would say it."""
    cause = shared_cause(found)
    return f"{len(found)} {one}{'' if len(found) == 1 else 's'}{f'; likely cause: {cause}' if cause else ''}"
