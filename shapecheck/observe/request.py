"""What to probe, as the command line or a probes/*.toml file asks for it, and carrying it out."""

from __future__ import annotations

import gc
import re
import tomllib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from shapecheck.contract import Contract, ContractError, Geometry, Mismatch, Shape, ShapecheckError
from shapecheck.observe import configs

_KEYS = {"story", "model", "controlnet", "size", "latent", "batch", "mapping", "expect"}
_LARGEST_FILE = 2**20


@dataclass(frozen=True, slots=True)
class Claim:
    """Residual shapes somebody says a UNet takes, (channels, height, width) each, in place of a ControlNet's."""

    downs: tuple[Shape, ...]
    mid: Shape | None


@dataclass(frozen=True, slots=True)
class Request:
    """A model, the ControlNets or the claimed shapes to hold against it, and the size to show."""

    model: str
    controlnets: tuple[str, ...] = ()
    size_px: tuple[int, int] | None = None
    """Width, height."""
    latent: tuple[int, int] | None = None
    """Height, width."""
    batch: int = 1
    claim: Claim | None = None
    story: str = ""
    expect: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Finding:
    """What a request came to."""

    contract: Contract
    mismatches: tuple[Mismatch, ...]
    geometry: Geometry


def carry_out(request: Request, *, offline: bool = False, progress: Callable[[str], None]) -> Finding:
    """Probe what is asked for. Raises ShapecheckError where it cannot be done; mismatches are part of the finding.

    Everything that can be refused by reading configurations is refused before torch is imported.
    """
    source = configs.find(request.model, "unet", offline=offline)
    for name in request.controlnets:
        configs.find(name, "controlnet", offline=offline)
    asked = _geometry(request, source.vae_factor)
    progress("importing torch and diffusers")
    with _no_collection():
        from shapecheck.observe.probe import probe
    try:
        nets = list(request.controlnets) or None
        contract = probe(request.model, nets, geometry=asked, offline=offline, progress=progress)
        found: tuple[Mismatch, ...] = ()
    except ContractError as error:
        if error.contract is None:
            raise
        contract, found = error.contract, error.mismatches
    if asked is not None:
        contract.require(asked)
    geometry = asked or Geometry(request.batch, *(contract.header.native or (64, 64)))
    if request.claim is not None:
        found = contract.mismatches(_residuals(request.claim, request.batch), geometry)
    return Finding(contract, found, geometry)


def read(path: Path) -> Request:
    """The request in a TOML file. Raises ShapecheckError naming the key that is wrong."""
    try:
        data = path.read_bytes()[: _LARGEST_FILE + 1]
        record = tomllib.loads(data.decode("utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError, RecursionError) as error:
        raise ShapecheckError(f"cannot read {path} as TOML: {error}") from None
    if unknown := sorted(record.keys() - _KEYS):
        raise ShapecheckError(f"{path}: unknown {', '.join(unknown)}; known: {', '.join(sorted(_KEYS))}")
    if not isinstance(record.get("model"), str):
        raise ShapecheckError(f"{path}: `model` must name the UNet to probe")
    nets = record.get("controlnet", [])
    try:
        return Request(
            model=record["model"],
            controlnets=(nets,) if isinstance(nets, str) else tuple(nets),
            size_px=parse_pair(record["size"], "WxH") if "size" in record else None,
            latent=parse_pair(record["latent"], "HxW") if "latent" in record else None,
            batch=record.get("batch", 1),
            claim=_claim(record["mapping"]) if "mapping" in record else None,
            story=record.get("story", ""),
            expect=record.get("expect", {}),
        )
    except (TypeError, KeyError, AttributeError) as error:
        raise ShapecheckError(f"{path}: not a probe: {error}") from None


def parse_pair(text: str, form: str) -> tuple[int, int]:
    """Two whole numbers out of `904x512`. Raises ShapecheckError showing the form expected."""
    match = re.fullmatch(r"([0-9]{1,6})[x×]([0-9]{1,6})", text.strip())
    if not match or not int(match[1]) or not int(match[2]):
        raise ShapecheckError(f"{text!r} is no size; expected {form}, two whole numbers such as 904x512")
    return int(match[1]), int(match[2])


def _geometry(request: Request, vae_factor: int) -> Geometry | None:
    if request.size_px is not None and request.latent is not None:
        raise ShapecheckError("a size in pixels and one in latent cells were given; give one of them")
    if request.size_px is not None:
        return Geometry.from_px(*request.size_px, batch=request.batch, vae_factor=vae_factor)
    return Geometry(request.batch, *request.latent) if request.latent is not None else None


def _claim(record: Mapping[str, Any]) -> Claim:
    return Claim(tuple(map(tuple, record["down"])), tuple(record["mid"]) if "mid" in record else None)


def _residuals(claim: Claim, batch: int) -> tuple[list[Shape], Shape | None]:
    return [(batch, *shape) for shape in claim.downs], (batch, *claim.mid) if claim.mid else None


@contextmanager
def _no_collection() -> Iterator[None]:
    """Import without the garbage collector walking the growing heap, and leave what was imported out of later walks."""
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()
