"""The report on an export, as text or JSON."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from pathlib import Path

from shapecheck.onnx.records import Agreement, Exported
from shapecheck.report.document import Document, Facts, Paragraph
from shapecheck.report.numbers import dump_json, format_count


def render_text(exported: Exported, agreements: Sequence[Agreement] = (), verdict: str = "EXPORTED") -> str:
    """Return the report for a person."""
    contract = exported.contract
    slots = f"{len(contract.slots)} slots" if contract.slots else "no slots"
    features = f", and {format_count(len(contract.features), 'feature')} of a T2I-Adapter" if contract.features else ""
    sizes = "every latent size" if contract.divisor == 1 else f"latent sizes that are multiples of {contract.divisor}"
    facts = [
        ("model", f"{contract.class_name} of {contract.header.source}"),
        ("inputs", ", ".join(base.name for base in contract.inputs)),
        ("residuals", f"{slots}, named as by {exported.naming}{features}{' (outputs)' * (contract.role == 'controlnet')}"),
        ("precision", f"{exported.dtype}, opset {exported.opset}"),
        *([("fp8", f"{format_count(exported.fp8, 'layer')}, by the calibration")] if exported.fp8 else []),
        ("sizes", f"{sizes}, every batch"),
        ("weights", _describe_weights(exported)),
        ("contract", contract.digest),
    ]
    for geometry in dict.fromkeys(agreement.geometry for agreement in agreements):
        # At each size, the output that is furthest off.
        outputs = [agreement for agreement in agreements if agreement.geometry == geometry]
        worst = max(outputs, key=lambda output: (not output.agrees, output.difference - output.allowed))
        difference = f"{worst.difference:.2g} of its largest value, {worst.allowed:.2g} allowed"
        facts.append((f"at {geometry}", f"{worst.output} differs by {difference}"))
    if agreements:
        agree = all(agreement.agrees for agreement in agreements)
        verdict += ": PyTorch and ONNX Runtime agree" if agree else ", and DISAGREES with PyTorch"
    return Document(str(exported.path), [Facts(facts), Paragraph(verdict)]).render("human")


def render_json(exported: Exported, agreements: Sequence[Agreement] = ()) -> str:
    """Return the same report as JSON."""
    contract = exported.contract
    record = {
        "path": str(exported.path),
        "files": list(map(str, exported.files)),
        "role": contract.role,
        "inputs": [base.name for base in contract.inputs],
        "slots": len(contract.slots),
        "features": len(contract.features),
        "naming": exported.naming,
        "dtype": exported.dtype,
        "opset": exported.opset,
        **({"fp8_layers": exported.fp8} if exported.fp8 else {}),
        "divisor": contract.divisor,
        "weights": exported.weights,
        "reason": exported.reason or None,
        "contract_digest": contract.digest,
        "verified": all(agreement.agrees for agreement in agreements) if agreements else None,
        "agreements": [
            {
                "output": agreement.output,
                "batch": agreement.geometry.batch,
                "height": agreement.geometry.height,
                "width": agreement.geometry.width,
                "difference": _drop_nonfinite(agreement.difference),
                "allowed": _drop_nonfinite(agreement.allowed),
                "agrees": agreement.agrees,
            }
            for agreement in agreements
        ],
    }
    return dump_json(record)


def _drop_nonfinite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _describe_weights(exported: Exported) -> str:
    if exported.weights == "none":
        return f"none yet: write them to {exported.files[-1].name}, at the offsets that the file states"
    names = [os.path.relpath(file, exported.path.parent) for file in exported.files[1:]]
    places = names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"
    if exported.weights == "link":
        return f"linked, where they lie: {Path(places).as_posix()}"
    return f"copied to {places}" + (f", because {exported.reason}" if exported.reason else "")
