"""A probe file carried out and held to what it expects."""

from __future__ import annotations

from pathlib import Path

from shapecheck.observe import request as requests
from shapecheck.observe.progress import silent
from shapecheck.observe.request import Finding, Observations, Request


def carried_out(path: Path, observations: Observations | None = None) -> tuple[Request, Finding]:
    """The request in a `probes/*.toml` file, and what it came to. Raises ShapecheckError where it cannot be carried out.

    A model that is among `observations` is not observed again.
    """
    request = requests.read(path)
    return request, requests.carry_out(request, progress=silent, observations=observations)


def surprises(request: Request, finding: Finding, verdict: str) -> tuple[str, ...]:
    """In what a probe came to something else than its `[expect]` says; `verdict` is the report's."""
    found = {
        "verdict": verdict,
        "wrong": [f"{each.where} {each.kind}" for each in finding.mismatches],
        "cause": sorted({each.cause.split(";")[0] for each in finding.mismatches}),
    }
    expected = {"wrong": []} | dict(request.expect)
    if "cause" in expected:
        expected["cause"] = [expected["cause"]]
    return tuple(
        f"{key}: expected {wanted!r}, got {found.get(key, 'nothing')!r}"
        for key, wanted in expected.items()
        if found.get(key) != wanted
    )
