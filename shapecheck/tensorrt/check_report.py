"""The check of an engine, as text, Markdown or JSON."""

from __future__ import annotations

from dataclasses import asdict

from shapecheck.contract import Geometry, ShapecheckError
from shapecheck.contract.geometry import USUAL_TOKENS
from shapecheck.contract.json_codec import encode
from shapecheck.report.document import Document, Facts, Format, Heading, Lines, Part, Points
from shapecheck.report.mismatches import describe_fit, list_mismatches
from shapecheck.report.numbers import dump_json, format_count, format_pixels
from shapecheck.tensorrt.build_report import list_request_facts
from shapecheck.tensorrt.profile_report import describe_range
from shapecheck.tensorrt.record import EngineCheck, EngineInterface
from shapecheck.tensorrt.size_ranges import format_range


def render_text(checked: EngineCheck, form: Format = "human") -> str:
    """Return the whole report."""
    engine, fit = checked.engine, checked.fit
    source = "the engine itself, by TensorRT" if checked.read == "engine" else "the record beside it"
    if engine.record is None:
        source += "; no record is beside it"
    elif checked.unread:
        source += f"; the engine was not loaded: {checked.unread}"
    facts = list_request_facts(engine.record.request) if engine.record else _list_facts(engine)
    parts: list[Part] = [Facts([("read from", source), *facts])]
    if checked.mismatches:
        parts += [Heading("Faults"), *list_mismatches(checked.mismatches, "the engine has", "it should have")]
    if checked.misfits:
        title = f"ControlNet: {', '.join(checked.controlnets)}"
        parts += [Heading(title), *list_mismatches(checked.misfits, "ControlNet gives")]
    if fit and fit.profile is None:
        vae_factor, reasons = engine.contract.header.vae_factor, [*fit.reasons]
        if fit.nearest is not None:
            reasons.append(f"the nearest that fits: {_describe_size(fit.nearest, vae_factor)}")
        if fit.rebuilt is not None:
            reasons.append(f"or build for it: {format_range(fit.rebuilt, vae_factor)}")
        parts += [Heading("Why the size does not fit"), Lines(reasons)]
    parts += [Points(checked.notes, "note: ")] if checked.notes else []
    return Document(checked.path, parts, _list_verdicts(checked)).render(form)


def render_json(checked: EngineCheck) -> str:
    """Return the report for machines."""
    engine = checked.engine
    request = engine.record.request if engine.record else None
    record = {
        "file": checked.path,
        "verdict": "fine" if checked.is_fine else "broken" if checked.mismatches else "does not fit",
        "read_from": checked.read,
        "unread": checked.unread or None,
        "contract_digest": engine.contract.digest,
        "key": request.key if request else None,
        "target": request.options.target if request else "trt",
        "tensorrt": request.tensorrt if request else None,
        "gpu": request.gpu if request else None,
        "names": dict(engine.names),
        "profiles": encode(engine.profiles),
        "mismatches": [asdict(mismatch) for mismatch in checked.mismatches],
        "size": asdict(checked.fit) if checked.fit else None,
        "controlnets": list(checked.controlnets),
        "controlnet_mismatches": [asdict(misfit) for misfit in checked.misfits],
        "weights": asdict(checked.weights) if checked.weights else None,
        "notes": list(checked.notes),
    }
    return dump_json(record)


def _list_facts(engine: EngineInterface) -> list[tuple[str, str]]:
    """Return what is known of an engine that has no record."""
    contract = engine.contract
    slots = len({name for name, _ in engine.names} - {base.name for base in contract.inputs})
    try:
        ranges = [describe_range(sizes, contract.header.vae_factor) for sizes in engine.ranges]
    except ShapecheckError as error:
        ranges = [str(error)]
    return [
        ("held to", f"{contract.class_name} of {contract.header.source or 'no named model'}"),
        ("inputs", f"{len(engine.names) - slots} base inputs, {slots} slots"),
        *((f"profile {number}", sizes) for number, sizes in enumerate(ranges)),
        ("precision", contract.dtype),
    ]


def _list_verdicts(checked: EngineCheck) -> list[str]:
    known = "engine and record belong together" if checked.engine.record else "the engine is called as the model is"
    verdicts = [f"DOES NOT FIT: {known}, but not with what was asked about"]
    if checked.mismatches:
        verdicts = [f"BROKEN: {format_count(len(checked.mismatches), 'fault')}"]
    elif checked.is_fine:
        unloaded = "" if checked.read == "engine" else " (the engine itself was not loaded)"
        verdicts = [f"FINE: {known}{unloaded}"]
    if fit := checked.fit:
        size = _describe_size(fit.geometry, checked.engine.contract.header.vae_factor)
        verdicts.append(f"SIZE: {size} fits {'no profile' if fit.profile is None else f'profile {fit.profile}'}")
    if checked.controlnets:
        verdicts.append(describe_fit(checked.controlnets, checked.misfits))
    if weights := checked.weights:
        verdicts.append(f"WEIGHTS: {'' if weights.same else 'not '}built from {weights.name} ({weights.told})")
    return verdicts


def _describe_size(geometry: Geometry, vae_factor: int) -> str:
    tokens = f", {geometry.tokens} tokens" if geometry.tokens != USUAL_TOKENS else ""
    return f"{format_pixels(geometry, vae_factor)} pixels ({geometry}{tokens})"
