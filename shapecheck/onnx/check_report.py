"""The report on an exported file that was checked, as text, Markdown or JSON."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict

from shapecheck.contract import Mismatch
from shapecheck.contract.records import format_observed
from shapecheck.onnx.records import FileCheck
from shapecheck.presets.families import describe_families, find_families
from shapecheck.report.document import Document, Facts, Format, Heading, Paragraph, Part, Points, Table
from shapecheck.report.mismatches import describe_fit, list_mismatches
from shapecheck.report.numbers import dump_json, format_count, list_some

_SHOWN = 5
"""So many of the sizes that work are named."""
_PLACE = "this is the place of "
_ALIEN = ("channels", "missing", "surplus", "rank", "size", "rounding")
"""Kinds of faults that most slots have if the file is another model's."""
_WORDS = {
    "baked": "baked in, so that every call gets the same",
    "missing": "missing",
    "unused": "without effect on the output",
    "broadcast": "of one cell, which is broadcast",
    "order": "added elsewhere",
    "name": "named otherwise",
    "surplus": "unknown to the model",
}
_WORDS_OF_SEVERAL = {
    "batch": "added in another number of rows than the batch has",
    "channels": "of other channels",
    "rank": "of another rank",
    "size": "of another size",
    "rounding": "rounded otherwise",
    "dtype": "of another dtype",
}
_ORDER = {kind: place for place, kind in enumerate(("channels", "baked", "missing", "unused", "order", "broadcast", "rank"))}


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
        ("latents", _describe_latents(checked)),
        ("batch", _describe_tried(checked, "batch", checked.limits.batches)),
        ("tokens", _describe_tried(checked, "tokens", checked.limits.tokens)),
        ("requested", ", ".join(map(str, checked.requested))),
        ("numbers", "not checked: no weights are read"),
    ]
    parts: list[Part] = [Paragraph(f"next: {advise(checked)}", "    "), Facts(facts, 88)]
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
        "sizes": {
            "divisor": checked.limits.divisor,
            "fixed": dict(checked.limits.fixed),
            "latents": [list(latent) for latent in checked.limits.latents],
            "batches": [batch for batch, works in checked.limits.batches.items() if works],
            "tokens": [length for length, works in checked.limits.tokens.items() if works],
        },
        "limits": list(checked.narrower),
        "requested": [asdict(geometry) for geometry in checked.requested],
        "inputs": [asdict(declared) for declared in checked.inputs],
        "slots": [asdict(slot) for slot in checked.slots],
        "mismatches": [asdict(mismatch) for mismatch in checked.mismatches],
        "controlnets": list(controlnets),
        "controlnet_mismatches": [asdict(misfit) for misfit in misfits],
        "notes": list(checked.notes),
        "next": advise(checked),
    }
    return dump_json(record)


def _describe_latents(checked: FileCheck) -> str:
    """Return at which heights and widths it was tried, and what came of it."""
    limits = checked.limits
    if checked.unchecked:
        return f"not checked: {checked.unchecked}"
    fails = f"; fails at {limits.refused.height}×{limits.refused.width}: {limits.reason}" if limits.refused else ""
    tried = ", ".join(f"{height}×{width}" for height, width in limits.latents[:_SHOWN])
    tried += ", …" if len(limits.latents) > _SHOWN else ""
    if not limits.divisor:
        return f"{f'only {tried} of those that were tried works' if tried else 'none that was tried works'}{fails}"
    if {"h", "w"} <= limits.fixed.keys():
        return f"{limits.fixed['h']}×{limits.fixed['w']} alone"
    step = f"multiples of {limits.divisor}: " if limits.divisor > 1 else ""
    return f"{step}{tried} {'were tried and work' if len(limits.latents) > 1 else 'was tried and works'}{fails}"


def _describe_tried(checked: FileCheck, symbol: str, tried: Mapping[int, bool]) -> str:
    """Return which batches or numbers of tokens were tried, and what came of it; nothing for a model without text."""
    if (only := checked.limits.fixed.get(symbol)) is not None:
        return f"{only} alone"
    if not any(dim.symbol == symbol for entry in checked.contract.inputs for dim in entry.shape):
        return ""
    if checked.unchecked or not tried:
        why = "" if symbol == "batch" or not checked.limits.divisor else ": no input is known as the text"
        return f"not checked{f': {checked.unchecked}' if checked.unchecked else why}"
    works, fails = (", ".join(str(size) for size, is_fine in tried.items() if is_fine is wanted) for wanted in (True, False))
    return f"{works} of those tried; not {fails}" if fails else f"{works} were tried and work"


def _describe_verdict(checked: FileCheck) -> str:
    if checked.mismatches:
        findings = list_findings(checked)
        more = f"; and {len(findings) - 2} more" if len(findings) > 2 else ""
        return f"BROKEN: {format_count(len(findings), 'fault')}: {'; '.join(findings[:2])}{more}"
    if checked.unchecked:
        return f"NOT CHECKED: {checked.unchecked}"
    outputs = 0 if checked.slots else len(checked.contract.slots)
    slots = f"{outputs} outputs" if outputs else f"{len(checked.slots)} slots"
    if checked.makes_residuals:
        slots = "residuals made inside"
    count = len(checked.requested)
    at = f" at {checked.requested[0] if count == 1 else f'{count} requested sizes'}" if count else ""
    limits = f"; takes {'; '.join(checked.narrower)}" if checked.narrower else ""
    return f"FINE: {slots} and {len(checked.inputs)} base inputs{at}{limits}"


def list_findings(checked: FileCheck) -> tuple[str, ...]:
    """Return what is wrong in words, what matters most first: a symptom and its consequences are one finding."""
    faults, findings = list(checked.mismatches), [checked.other_form] if checked.other_form else []
    faults = [] if findings else faults
    slots = {slot.name for slot in checked.contract.slots} | {slot.name for slot in checked.slots}
    alien = [fault for fault in faults if fault.kind in _ALIEN and fault.where in slots]
    if alien and not checked.slots and {fault.kind for fault in alien} == {"missing"}:
        findings.append("it takes no residuals: it was exported without control")
        faults = [fault for fault in faults if fault not in alien]
    elif len({fault.where for fault in alien}) * 2 >= len(checked.contract.slots) >= 4:
        source = checked.contract.header.source or "the model"
        findings.append(f"most slots are not those of {source}: it is probably another model's file")
        faults = [fault for fault in faults if fault not in alien]
    places = {fault.where: fault.cause.removeprefix(_PLACE) for fault in faults if fault.cause.startswith(_PLACE)}
    for name, other in places.items():
        if places.get(other) == name and name < other:
            findings.append(f"{name} and {other} are exchanged")
    faults = [fault for fault in faults if places.get(places.get(fault.where, "")) != fault.where]
    groups: dict[str, list[Mismatch]] = {}
    for fault in faults:
        groups.setdefault(fault.kind, []).append(fault)
    for kind, alike in sorted(groups.items(), key=lambda group: _ORDER.get(group[0], len(_ORDER))):
        names = list_some([fault.where for fault in alike])
        first = alike[0]
        if kind == "sizes":
            at = f" at {first.geometry}" if first.geometry else ""
            findings.append(f"{first.observed}{at}: {first.cause}" if first.cause else f"{first.observed}{at}")
        elif kind in _WORDS:
            findings.append(f"{names} {'is' if len(alike) == 1 else 'are'} {_WORDS[kind]}")
        elif len(alike) > 1:
            findings.append(f"{names} are {_WORDS_OF_SEVERAL.get(kind, f'wrong ({kind})')}")
        else:
            observed, expected = format_observed(first.observed), format_observed(first.expected)
            findings.append(f"{names}: {kind} {observed}, expected {expected}")
    return tuple(findings)


def advise(checked: FileCheck) -> str:
    """Return what to do next, with the command that does it."""
    file, kinds = checked.path, {mismatch.kind for mismatch in checked.mismatches}
    parity = f"`shapecheck parity MODEL --onnx {file}`"
    divisor, vae_factor = checked.limits.divisor, checked.contract.header.vae_factor
    if checked.other_form:
        return "write one with `shapecheck export MODEL`, or run it with the program that it was made for"
    if checked.mismatches and checked.basis in ("preset", "none"):
        return f"say which UNet it should be, if it is another: `shapecheck check {file} --model MODEL`"
    if kinds == {"sizes"} and divisor > checked.contract.divisor:
        return (
            f"ask for what it takes with --multiple-of {divisor * vae_factor}, or export it from a trace at an odd size, such "
            "as a latent of 17×25; `shapecheck export MODEL` does"
        )
    if kinds == {"order"}:
        return f"{parity} compares the values, which decide"
    if kinds:
        return f"mend the export, or write the file with `shapecheck export MODEL -o {file}`"
    return f"{parity} compares its numbers with PyTorch's"
