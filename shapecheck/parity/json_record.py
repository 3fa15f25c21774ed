"""A parity run as JSON values: for machines, and for the page, which takes every number from them."""

from __future__ import annotations

import math
from dataclasses import asdict
from typing import Any

from shapecheck.parity.results import CheckKind, Parity, Side, Verdict
from shapecheck.report.numbers import encode_nonfinite

OUTPUTS: tuple[CheckKind, ...] = ("case", "switch", "cfg")
"""Checks of whole outputs."""


def record_parity(parity: Parity) -> dict[str, Any]:
    """Return the whole run. JSON has no word for NaN and the infinities: they are "NaN", "Infinity", "-Infinity"."""
    values = {
        "shapecheck_parity": 1,
        "verdict": parity.verdict.lower(),
        "unjudged": parity.unjudged,
        "model": parity.model,
        "contract_digest": parity.contract.digest,
        "reference": parity.reference,
        "times_own": parity.times_own,
        **({"fp8_least_psnr": parity.least_psnr} if parity.least_psnr is not None else {}),
        "seed": parity.seed,
        "geometries": [asdict(geometry) for geometry in parity.geometries],
        "sides": [_record_side(side) for side in parity.sides],
        "versions": dict(parity.versions),
        "contract": parity.contract.to_value(),
    }
    return encode_nonfinite(values)  # type: ignore[no-any-return]


def compare_with_torch(verdict: Verdict) -> float:
    """Return how many times as far from the reference as PyTorch itself it is: NaN if nothing was compared."""
    if verdict.absolute is None:
        return math.nan
    if verdict.own == 0:
        return math.nan if math.isnan(verdict.absolute.difference) else math.inf if verdict.absolute.difference else 0.0
    return verdict.absolute.difference / verdict.own


def _record_side(side: Side) -> dict[str, Any]:
    divergence = side.divergence
    return {
        "backend": side.backend,
        "artefact": side.artefact,
        "ran": asdict(side.ran) if side.ran else None,
        "notes": list(side.notes),
        "results": [
            {
                "kind": result.check.kind,
                "where": result.check.where,
                "status": result.status,
                "reason": result.reason,
                "geometry": asdict(result.geometry) if result.geometry else None,
                "verdict": _record_verdict(result.verdict) if result.verdict else None,
                "effect": asdict(result.effect) if result.effect else None,
                "rounding": asdict(result.rounding) | {"times_own": result.rounding.times_own} if result.rounding else None,
                "seconds": result.seconds,
            }
            for result in side.results
        ],
        "divergence": asdict(divergence) | {"verdict": _record_verdict(divergence.verdict)} if divergence else None,
    }


def _record_verdict(verdict: Verdict) -> dict[str, Any]:
    derived = {"count": verdict.count, "share": verdict.share, "passes": verdict.passes}
    return asdict(verdict) | derived | {"times_own": compare_with_torch(verdict)}
