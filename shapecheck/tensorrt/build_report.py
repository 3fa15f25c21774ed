"""An engine that was built or found, or the faults that kept one from being built, as text or JSON."""

from __future__ import annotations

from dataclasses import asdict

from shapecheck.contract import ContractError
from shapecheck.contract.json_codec import encode
from shapecheck.report.document import Document, Facts, Heading, Paragraph, Points
from shapecheck.report.mismatches import count_mismatches, list_mismatches
from shapecheck.report.numbers import dump_json
from shapecheck.tensorrt.profile_report import describe_range
from shapecheck.tensorrt.profiles import range_of
from shapecheck.tensorrt.record import BuildRequest, Built, record_of


def render_text(built: Built, verdict: str = "") -> str:
    """Return the report for a person."""
    engine = built.engine
    facts = [*list_request_facts(engine.request), ("size", f"{engine.size / 1e6:.1f} MB"), ("digest", engine.digest)]
    result = verdict or ("FOUND: unchanged since it was built" if built.found else f"BUILT: in {built.seconds:.0f} s")
    return Document(str(built.path), [Facts(facts), Points(built.notes, "note: "), Paragraph(result)]).render("human")


def render_json(built: Built) -> str:
    """Return the report for machines."""
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
        "profiles": encode(request.profiles),
        "options": asdict(request.options),
        "tensorrt": request.tensorrt,
        "gpu": request.gpu,
        "messages": list(built.notes),
    }
    return dump_json(record)


def render_refusal(error: ContractError, form: str) -> str:
    """Return the faults that kept an engine from being built, or a profile from being made."""
    if form == "json":
        mismatches = [asdict(mismatch) for mismatch in error.mismatches]
        return dump_json({"verdict": "refused", "subject": error.subject, "mismatches": mismatches})
    table = list_mismatches(error.mismatches, "given", "it should be")
    verdict = f"REFUSED: {error.subject}: {count_mismatches(error.mismatches, 'fault')}"
    return Document("", [Heading("Faults"), *table, Paragraph(verdict)]).render("human")


def list_request_facts(request: BuildRequest) -> list[tuple[str, str]]:
    """Return what an engine is built from and for."""
    contract, options = request.contract, request.options
    ranges = [describe_range(range_of(contract, profile), contract.header.vae_factor) for profile in request.profiles]
    builder = [f"{'TensorRT' if options.target == 'trt' else 'TensorRT for RTX'} {request.tensorrt}"]
    builder += [f"level {options.optimization_level}"] if options.optimization_level is not None else []
    builder += [f"workspace {options.workspace >> 20} MiB"] if options.workspace is not None else []
    builder += [name for name in ("refittable", "version_compatible") if getattr(options, name)]
    builder += [] if options.tf32 else ["no TF32"]
    return [
        ("model", f"{contract.class_name} of {contract.header.source or 'no named model'}"),
        ("inputs", f"{len(contract.inputs)} base inputs, {len(request.names) - len(contract.inputs)} slots"),
        *((f"profile {number}", sizes) for number, sizes in enumerate(ranges)),
        ("precision", request.profiles[0].inputs[0].dtype),
        ("built by", ", ".join(builder)),
        ("for GPU", request.gpu),
        ("contract", contract.digest),
        ("weights", request.weights),
    ]
