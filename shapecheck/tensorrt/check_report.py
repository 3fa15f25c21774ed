"""What an engine came to when it was checked, as text, Markdown or JSON."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict

from shapecheck.contract import Geometry
from shapecheck.report.tables import Format, fact_list, heading, mismatch_table, shared_cause
from shapecheck.tensorrt import profile_formats as forms
from shapecheck.tensorrt.build_report import request_facts
from shapecheck.tensorrt.profile_report import in_pixels
from shapecheck.tensorrt.record import EngineCheck, Fit
from shapecheck.tensorrt.size_ranges import USUAL_TOKENS, written


def told(checked: EngineCheck, form: Format = "human") -> str:
    """The whole report."""
    lines = [*_verdicts(checked)]
    verdict = "\n\n".join(f"**{line}**" for line in lines) if form == "markdown" else "\n".join(lines)
    parts = [f"# {checked.path}" if form == "markdown" else checked.path, verdict, fact_list(_facts(checked), form)]
    if checked.mismatches:
        parts += [heading("Faults", form), mismatch_table(checked.mismatches, form, "the engine has", "it should have")]
    if checked.misfits:
        title = f"ControlNet: {', '.join(checked.controlnets)}"
        parts += [heading(title, form), mismatch_table(checked.misfits, form, "ControlNet gives")]
    if checked.fit and checked.fit.profile is None:
        parts += [
            heading("Why the size does not fit", form),
            _why(checked.fit, checked.engine.request.contract.header.vae_factor),
        ]
    parts += [verdict if form == "human" else ""]
    return "\n\n".join(part for part in parts if part) + "\n"


def as_json(checked: EngineCheck) -> str:
    """The same for machines."""
    request, fit = checked.engine.request, checked.fit
    record = {
        "file": checked.path,
        "verdict": "fine" if checked.is_fine else "broken" if checked.mismatches else "does not fit",
        "read_from": checked.read,
        "unread": checked.unread or None,
        "contract_digest": request.contract.digest,
        "key": request.key,
        "target": request.options.target,
        "tensorrt": request.tensorrt,
        "gpu": request.gpu,
        "profiles": forms.as_json(request.profiles),
        "mismatches": [asdict(each) for each in checked.mismatches],
        "size": asdict(fit) if fit else None,
        "controlnets": list(checked.controlnets),
        "controlnet_mismatches": [asdict(each) for each in checked.misfits],
        "weights": asdict(checked.weights) if checked.weights else None,
    }
    return json.dumps(record, indent=1, ensure_ascii=False) + "\n"


def _facts(checked: EngineCheck) -> list[tuple[str, str]]:
    how = "the engine itself, by TensorRT" if checked.read == "engine" else "the record beside it"
    if checked.unread:
        how += f"; the engine was not loaded: {checked.unread}"
    return [("read from", how), *request_facts(checked.engine.request)]


def _verdicts(checked: EngineCheck) -> Iterator[str]:
    count = len(checked.mismatches)
    if count:
        yield f"BROKEN: {count} fault{'' if count == 1 else 's'}"
    elif checked.is_fine:
        seen = "" if checked.read == "engine" else " (the engine itself was not loaded)"
        yield f"FINE: engine and record belong together{seen}"
    else:
        yield "DOES NOT FIT: engine and record belong together, but not with what was asked about"
    if checked.fit:
        size = _size(checked.fit, checked.engine.request.contract.header.vae_factor)
        fits = checked.fit.profile
        yield f"SIZE: {size} fits profile {fits}" if fits is not None else f"SIZE: {size} fits no profile"
    if checked.controlnets:
        count = len(checked.misfits)
        cause = shared_cause(checked.misfits)
        places = f"{count} place{'' if count == 1 else 's'}{f'; likely cause: {cause}' if cause else ''}"
        fit = f"does not fit: {places}" if count else "fits"
        yield f"CONTROLNET: {', '.join(checked.controlnets)} {fit}"
    if checked.weights:
        yield f"WEIGHTS: {'' if checked.weights.same else 'not '}built from {checked.weights.name} ({checked.weights.told})"


def _size(fit: Fit, vae_factor: int) -> str:
    return _in_words(fit.geometry, vae_factor)


def _in_words(geometry: Geometry, vae_factor: int) -> str:
    tokens = f", {geometry.tokens} tokens" if str(geometry.tokens) != USUAL_TOKENS else ""
    return f"{in_pixels(geometry, vae_factor)} pixels ({geometry}{tokens})"


def _why(fit: Fit, vae_factor: int) -> str:
    lines = [*fit.reasons]
    if fit.nearest is not None:
        lines.append(f"the nearest that fits: {_in_words(fit.nearest, vae_factor)}")
    if fit.rebuilt is not None:
        lines.append(f"or build for it: {written(fit.rebuilt, vae_factor)}")
    return "\n".join(lines)
