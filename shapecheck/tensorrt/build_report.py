"""An engine that was built or found, or what kept one from being built, as text or JSON."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict

from shapecheck.contract import ContractError, Mismatch
from shapecheck.report.tables import fact_list, heading, mismatch_table, note_list, shared_cause
from shapecheck.tensorrt import profile_formats as forms
from shapecheck.tensorrt.profile_report import in_words
from shapecheck.tensorrt.profiles import range_of
from shapecheck.tensorrt.record import Built, Request, record_of

_RUNTIMES = {"trt": "TensorRT", "rtx": "TensorRT for RTX"}


def told(built: Built) -> str:
    """For a person."""
    engine = built.engine
    facts = [*request_facts(engine.request), ("size", f"{engine.size / 1e6:.1f} MB"), ("digest", engine.digest)]
    parts = [str(built.path), fact_list(facts, "human"), note_list(built.notes, "human")]
    done = "FOUND: unchanged since it was built" if built.found else f"BUILT: in {built.seconds:.0f} s"
    return "\n\n".join(part for part in [*parts, done] if part) + "\n"


def as_json(built: Built) -> str:
    """For machines."""
    request = built.engine.request
    record = {
        "path": str(built.path),
        "record": str(record_of(built.path)),
        "found": built.found,
        "seconds": round(built.seconds, 3),
        "key": request.key,
        "engine_digest": built.engine.digest,
        "bytes": built.engine.size,
        "contract_digest": request.contract.digest,
        "onnx_digest": request.onnx,
        "weights_digest": request.weights,
        "profiles": forms.as_json(request.profiles),
        "options": asdict(request.options),
        "tensorrt": request.tensorrt,
        "gpu": request.gpu,
        "messages": list(built.notes),
    }
    return json.dumps(record, indent=1, ensure_ascii=False) + "\n"


def refused(error: ContractError, form: str) -> str:
    """What kept an engine from being built, or a profile from being made."""
    found: Sequence[Mismatch] = error.mismatches
    if form == "json":
        record = {"verdict": "refused", "subject": error.subject, "mismatches": [asdict(each) for each in found]}
        return json.dumps(record, indent=1, ensure_ascii=False) + "\n"
    parts = [heading("Faults", "human"), mismatch_table(found, "human", "given", "it should be")]
    cause = shared_cause(found)
    count = f"{len(found)} fault{'' if len(found) == 1 else 's'}{f'; likely cause: {cause}' if cause else ''}"
    verdict = f"REFUSED: {error.subject}: {count}"
    return "\n\n".join([*parts, verdict]) + "\n"


def request_facts(request: Request) -> list[tuple[str, str]]:
    """What an engine is, one fact a line."""
    contract, options = request.contract, request.options
    facts = [
        ("model", f"{contract.class_name} of {contract.header.source or 'no named model'}"),
        ("inputs", f"{len(contract.inputs)} base inputs, {len(request.names) - len(contract.inputs)} slots"),
    ]
    for number, profile in enumerate(request.profiles):
        facts.append((f"profile {number}", in_words(range_of(contract, profile), contract.header.vae_factor)))
    settings = [f"level {options.optimization_level}"] if options.optimization_level is not None else []
    settings += [f"workspace {options.workspace >> 20} MiB"] if options.workspace is not None else []
    settings += [name for name in ("refittable", "version_compatible") if getattr(options, name)]
    settings += [] if options.tf32 else ["no TF32"]
    return [
        *facts,
        ("precision", request.profiles[0].inputs[0].dtype),
        ("built by", f"{_RUNTIMES[options.target]} {request.tensorrt}" + (f", {', '.join(settings)}" if settings else "")),
        ("for GPU", request.gpu),
        ("contract", contract.digest),
        ("weights", request.weights),
    ]
