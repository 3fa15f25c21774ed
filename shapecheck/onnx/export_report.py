"""What an export wrote, as text or JSON."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from shapecheck.onnx.records import Agreement, Exported
from shapecheck.report.tables import fact_list


def told(exported: Exported, agreements: Sequence[Agreement] = ()) -> str:
    """For a person."""
    contract = exported.contract
    slots = f"{len(contract.slots)} slots" if contract.slots else "no slots"
    features = f", and {_counted(len(contract.features), 'feature')} of a T2I-Adapter" if contract.features else ""
    sizes = "every latent size" if contract.divisor == 1 else f"latent sizes that are multiples of {contract.divisor}"
    facts = [
        ("model", f"{contract.class_name} of {contract.header.source}"),
        ("inputs", ", ".join(each.name for each in contract.inputs)),
        (
            "residuals",
            f"{slots}, named as by {exported.naming}{features}" + (" (outputs)" if contract.role == "controlnet" else ""),
        ),
        ("precision", f"{exported.dtype}, opset {exported.opset}"),
        ("sizes", f"{sizes}, every batch"),
        ("weights", _weights(exported)),
        ("contract", contract.digest),
        *((f"at {each.geometry}", _agreement(each)) for each in _worst(agreements)),
    ]
    text = f"{exported.path}\n\n{fact_list(facts, 'human')}\n\nEXPORTED"
    if agreements:
        text += ": PyTorch and ONNX Runtime agree" if _agree(agreements) else ", and DISAGREES with PyTorch"
    return f"{text}\n"


def as_json(exported: Exported, agreements: Sequence[Agreement] = ()) -> str:
    """For machines."""
    contract = exported.contract
    record: dict[str, Any] = {
        "path": str(exported.path),
        "files": list(map(str, exported.files)),
        "role": contract.role,
        "inputs": [each.name for each in contract.inputs],
        "slots": len(contract.slots),
        "features": len(contract.features),
        "naming": exported.naming,
        "dtype": exported.dtype,
        "opset": exported.opset,
        "divisor": contract.divisor,
        "weights": exported.weights,
        "reason": exported.reason or None,
        "contract_digest": contract.digest,
        "verified": _agree(agreements) if agreements else None,
        "agreements": [
            {
                "output": each.output,
                "batch": each.geometry.batch,
                "height": each.geometry.height,
                "width": each.geometry.width,
                "difference": _number(each.difference),
                "allowed": _number(each.allowed),
                "agrees": each.agrees,
            }
            for each in agreements
        ],
    }
    return json.dumps(record, indent=1, ensure_ascii=False) + "\n"


def _counted(number: int, what: str) -> str:
    return f"{number} {what}" + ("" if number == 1 else "s")


def _number(value: float) -> float | None:
    return value if math.isfinite(value) else None  # JSON has no other


def _weights(exported: Exported) -> str:
    if exported.weights == "none":
        return f"none yet: they belong in {exported.files[-1].name}, at the places the file gives"
    names = [os.path.relpath(file, exported.path.parent) for file in exported.files[1:]]
    places = names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"
    if exported.weights == "link":
        return f"linked, where they lie: {Path(places).as_posix()}"
    return f"copied to {places}" + (f", because {exported.reason}" if exported.reason else "")


def _worst(agreements: Sequence[Agreement]) -> list[Agreement]:
    """The output that is furthest off at each size."""
    sizes = dict.fromkeys(each.geometry for each in agreements)
    return [max((one for one in agreements if one.geometry == size), key=_excess) for size in sizes]


def _excess(each: Agreement) -> tuple[bool, float]:
    return not each.agrees, each.difference - each.allowed


def _agreement(each: Agreement) -> str:
    return f"{each.output} differs by {each.difference:.2g} of its largest value, {each.allowed:.2g} allowed"


def _agree(agreements: Sequence[Agreement]) -> bool:
    return all(each.agrees for each in agreements)
