"""Requests for a probe, from the command line or a probes/*.toml file, and the probe itself."""

from __future__ import annotations

import gc
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from shapecheck.contract import Contract, ContractError, Geometry, Mismatch, ShapecheckError
from shapecheck.contract.errors import one_line
from shapecheck.contract.geometry import parse_pair
from shapecheck.files import read_bytes
from shapecheck.models import hub, lookup
from shapecheck.progress import Progress

_MOST_IN_BATCH = 65_536
_KEYS = {"story", "model", "controlnet", "adapter", "size", "latent", "batch", "mapping", "expect"}


@dataclass(frozen=True, slots=True)
class ProbeRequest:
    """A model, the ControlNets, T2I-Adapter or claimed shapes to compare it with, and the size to show.

    `size_px` is (width, height), `latent` is (height, width). `mapping` has the residual shapes that somebody says the UNet
    takes, under `down` and `mid`, in place of a ControlNet's.
    """

    model: str
    controlnets: tuple[str, ...] = ()
    adapter: str | None = None
    size_px: tuple[int, int] | None = None
    latent: tuple[int, int] | None = None
    batch: int = 1
    mapping: Mapping[str, Any] | None = None
    story: str = ""
    expect: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class ProbeResult:
    """A contract, everything that disagrees with it, and the size to show both at."""

    contract: Contract
    mismatches: tuple[Mismatch, ...]
    geometry: Geometry


def run_probe(request: ProbeRequest, *, offline: bool = False, progress: Progress) -> ProbeResult:
    """Observe the model and the ControlNets of a request. Mismatches are part of the result; its `mapping` is not looked at.

    Everything that can be refused by reading configurations is refused before torch is imported. Raises ShapecheckError if it
    cannot be done.
    """
    source = lookup.find(request.model, "unet", offline=offline)
    for name in request.controlnets:
        lookup.find(name, "controlnet", offline=offline)
    if request.adapter is not None:
        lookup.find(request.adapter, "adapter", offline=offline)
    requested = resolve_geometry(request, source.vae_factor)
    progress("importing torch and diffusers")
    # The garbage collector would walk the growing heap again and again; later it leaves out what was imported.
    gc.disable()
    try:
        from shapecheck.observe.probe import probe
    finally:
        gc.freeze()
        gc.enable()
    mismatches: tuple[Mismatch, ...] = ()
    try:
        nets = list(request.controlnets) or None
        contract = probe(request.model, nets, adapter=request.adapter, geometry=requested, offline=offline, progress=progress)
    except ContractError as error:
        if error.contract is None:
            raise
        contract, mismatches = error.contract, error.mismatches
    if requested is not None:
        contract.require(requested)
    return ProbeResult(contract, mismatches, requested or Geometry(request.batch, *contract.header.usual))


def read_request(path: Path) -> ProbeRequest:
    """Read the request in a TOML file. Raises ShapecheckError naming the key that is wrong."""
    try:
        record = tomllib.loads(read_bytes(path, hub.LARGEST_FILE, too_large=f"{path} is too large for a probe").decode("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ShapecheckError(f"cannot read {path} as TOML: {error}") from None
    if unknown := sorted(record.keys() - _KEYS):
        raise ShapecheckError(f"{path}: unknown {one_line(', '.join(unknown))}; known: {', '.join(sorted(_KEYS))}")
    try:
        return _parse_request(record)
    except ShapecheckError as error:
        raise ShapecheckError(f"{path}: {error}") from None


def _parse_request(record: Mapping[str, Any]) -> ProbeRequest:
    nets = record.get("controlnet", [])
    nets = [nets] if isinstance(nets, str) else nets
    if not (isinstance(nets, list) and all(isinstance(net, str) for net in nets)):
        raise ShapecheckError("`controlnet` must be a name or a list of names")
    if other := next((key for key in ("controlnet", "adapter") if record.get(key) and "mapping" in record), None):
        raise ShapecheckError(f"`mapping` stands in place of what a {other} gives; drop it or `{other}`")
    expect = record.get("expect", {})
    if not isinstance(expect, dict):
        raise ShapecheckError("`expect` must be a table")
    texts = {"model": record.get("model"), "story": record.get("story", "")}
    texts |= {key: record[key] for key in ("adapter", "size", "latent") if key in record}
    for key, value in texts.items():
        if not isinstance(value, str):
            raise ShapecheckError(f"`{key}` must be text, got {one_line(value)}")
    return ProbeRequest(
        texts["model"],
        tuple(nets),
        texts.get("adapter"),
        parse_pair(texts["size"], "WxH") if "size" in texts else None,
        parse_pair(texts["latent"], "HxW") if "latent" in texts else None,
        check_batch(record.get("batch", 1), "`batch`"),
        _parse_mapping(record["mapping"]) if "mapping" in record else None,
        texts["story"],
        expect,
    )


def _parse_mapping(record: Any) -> dict[str, Any]:
    downs, mid = (record.get("down"), record.get("mid")) if isinstance(record, dict) else (None, None)
    for shape in [*downs, *([] if mid is None else [mid])] if isinstance(downs, list) else [None]:
        if not (isinstance(shape, list) and len(shape) == 3 and all(type(size) is int and size > 0 for size in shape)):
            raise ShapecheckError("`mapping` must have `down`, a list of [channels, height, width], and may have `mid`")
    return {"down": downs, "mid": mid}


def check_batch(value: object, name: str) -> int:
    """Return a batch given under `name`. Raises ShapecheckError if it is not a whole number, or an absurd one."""
    if type(value) is not int or not 1 <= value <= _MOST_IN_BATCH:
        raise ShapecheckError(f"{name} must be a whole number from 1 to {_MOST_IN_BATCH}, got {one_line(value)}")
    return value


def resolve_geometry(request: ProbeRequest, vae_factor: int) -> Geometry | None:
    """Return the requested size, if any. Raises ShapecheckError if there are two, or pixels fill no whole cells."""
    if request.size_px is not None and request.latent is not None:
        raise ShapecheckError("got a size in pixels and one in latent cells; give one of them")
    if request.size_px is not None:
        return Geometry.from_px(*request.size_px, batch=request.batch, vae_factor=vae_factor)
    return Geometry(request.batch, *request.latent) if request.latent is not None else None


def list_surprises(request: ProbeRequest, mismatches: Sequence[Mismatch], verdict: str) -> tuple[str, ...]:
    """Return every difference between the result of a probe and what its `[expect]` says; `verdict` is the report's."""
    actual = {
        "verdict": verdict,
        "wrong": [f"{mismatch.where} {mismatch.kind}" for mismatch in mismatches],
        "cause": sorted({mismatch.cause.split(";")[0] for mismatch in mismatches}),
    }
    expected = {"wrong": []} | dict(request.expect)
    if "cause" in expected:
        expected["cause"] = [expected["cause"]]
    return tuple(
        f"{key}: expected {value!r}, got {actual.get(key, 'nothing')!r}"
        for key, value in expected.items()
        if actual.get(key) != value
    )
