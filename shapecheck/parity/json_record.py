"""A parity run as JSON values: what machines read, and where the page takes every number from."""

from __future__ import annotations

import json
import math
from dataclasses import asdict
from typing import Any

from shapecheck.parity.results import Divergence, Parity, Result, Side, Verdict
from shapecheck.report.numbers import named, storable

SCHEMA = 1


def record(parity: Parity) -> dict[str, Any]:
    """The whole run. JSON has no word for NaN and the infinities: they are the strings "NaN", "Infinity", "-Infinity"."""
    values = {
        "shapecheck_parity": SCHEMA,
        "verdict": parity.verdict.lower(),
        "model": parity.model,
        "contract_digest": parity.contract.digest,
        "reference": parity.reference,
        "times_own": parity.times_own,
        "seed": parity.seed,
        "geometries": [asdict(each) for each in parity.geometries],
        "sides": [_side(side) for side in parity.sides],
        "versions": dict(parity.versions),
        "contract": json.loads(parity.contract.to_json()),
    }
    return named(values)  # type: ignore[no-any-return]


def dumps(parity: Parity) -> str:
    """The record as text."""
    return storable(json.dumps(record(parity), indent=1, ensure_ascii=False, allow_nan=False)) + "\n"


def times_own(verdict: Verdict) -> float:
    """How many times as far from the reference as PyTorch itself: NaN where nothing was compared."""
    if verdict.absolute is None:
        return math.nan
    if verdict.own == 0:
        return math.nan if math.isnan(verdict.absolute.difference) else math.inf if verdict.absolute.difference else 0.0
    return verdict.absolute.difference / verdict.own


def _side(side: Side) -> dict[str, Any]:
    return {
        "backend": side.backend,
        "artefact": side.artefact,
        "ran": asdict(side.ran) if side.ran else None,
        "notes": list(side.notes),
        "results": [_result(each) for each in side.results],
        "divergence": _divergence(side.divergence) if side.divergence else None,
    }


def _result(result: Result) -> dict[str, Any]:
    return {
        "kind": result.check.kind,
        "where": result.check.where,
        "status": result.status,
        "reason": result.reason,
        "geometry": asdict(result.geometry) if result.geometry else None,
        "verdict": _verdict(result.verdict) if result.verdict else None,
        "effect": asdict(result.effect) if result.effect else None,
        "seconds": result.seconds,
    }


def _divergence(found: Divergence) -> dict[str, Any]:
    return asdict(found) | {"verdict": _verdict(found.verdict)}


def _verdict(verdict: Verdict) -> dict[str, Any]:
    derived = {"count": verdict.count, "share": verdict.share, "passes": verdict.passes, "times_own": times_own(verdict)}
    return asdict(verdict) | derived
