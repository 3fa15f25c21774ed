"""A contract as JSON: strict on the way in, so that a contract that loads is one that was saved."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, get_args

from shapecheck.contract.config import Config
from shapecheck.contract.dims import Dim
from shapecheck.contract.errors import ShapecheckError
from shapecheck.contract.records import AddSite, ControlNetInfo, Header, Input, Role, Slot, Spatial

if TYPE_CHECKING:
    from shapecheck.contract.contract import Contract


SCHEMA = 1


_LARGEST_TEXT = 4 * 2**20


def identity(contract: Contract) -> dict[str, Any]:
    """The part that counts in equality, as JSON values."""
    return _record(contract, sites=False)


def _record(contract: Contract, *, sites: bool) -> dict[str, Any]:
    """What is not the header; features are left out where there are none, as in files older than they are."""
    features = [_slot(each, sites=sites) for each in contract.features]
    return {
        "class_name": contract.class_name,
        "role": contract.role,
        "divisor": contract.divisor,
        "inputs": [_input(each) for each in contract.inputs],
        "slots": [_slot(each, sites=sites) for each in contract.slots],
        **({"features": features} if features else {}),
        "config": contract.config.to_json(),
    }


def digest(contract: Contract) -> str:
    """`sha256:…` of the identity, the same on every machine."""
    text = json.dumps(identity(contract), sort_keys=True, separators=(",", ":"))
    return "sha256:" + hashlib.sha256(text.encode()).hexdigest()


def dumps(contract: Contract) -> str:
    """JSON text of the whole contract, header included, stable from run to run."""
    record = {"shapecheck_contract": SCHEMA, "digest": digest(contract), "header": _header(contract.header)}
    record |= _record(contract, sites=True)
    return json.dumps(record, indent=1, ensure_ascii=False) + "\n"


def fields(text: str) -> tuple[dict[str, Any], str]:
    """The arguments of the Contract in `text`, and the digest it claims. Raises ShapecheckError on anything else."""
    if not isinstance(text, str):
        raise ShapecheckError(f"not a contract: expected JSON text, got {type(text).__name__}")
    if len(text) > _LARGEST_TEXT:
        raise ShapecheckError(f"not a contract: {len(text)} characters, more than the {_LARGEST_TEXT} allowed")
    try:
        record = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ShapecheckError(f"not a contract: not JSON ({error})") from None
    if not isinstance(record, dict) or "shapecheck_contract" not in record:
        raise ShapecheckError("not a contract: no key 'shapecheck_contract'; `shapecheck probe MODEL --format json` writes one")
    if type(record["shapecheck_contract"]) is not int or record["shapecheck_contract"] != SCHEMA:
        raise ShapecheckError(
            f"contract of schema {record['shapecheck_contract']!r}; this release reads schema {SCHEMA}: probe the model again"
        )
    try:
        return _read(record), _text(record["digest"])
    except (KeyError, TypeError, ValueError, AttributeError, IndexError, RecursionError) as error:
        raise ShapecheckError(f"a damaged contract: {type(error).__name__}: {error}") from None


def _input(each: Input) -> dict[str, Any]:
    return {"name": each.name, "shape": list(map(str, each.shape)), "dtype": each.dtype, "argument": each.argument}


def _slot(slot: Slot, *, sites: bool) -> dict[str, Any]:
    adds = [asdict(add) if sites else {"owner": add.owner, "function": add.function} for add in slot.adds]
    return {
        "name": slot.name,
        "channels": slot.channels,
        "stride": slot.stride,
        "skip": list(map(str, slot.skip)),
        "spatial": slot.spatial,
        "producer": slot.producer,
        "up_block": slot.up_block,
        "adds": adds,
    }


def _header(header: Header) -> dict[str, Any]:
    record = asdict(header) | {"versions": dict(header.versions)}
    return record if header.adapter else {key: value for key, value in record.items() if key != "adapter"}


def _read(record: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "class_name": _text(record["class_name"]),
        "role": _choice(record["role"], Role),
        "inputs": tuple(map(_read_input, _list(record["inputs"]))),
        "slots": tuple(map(_read_slot, _list(record["slots"]))),
        "features": tuple(map(_read_slot, _list(record.get("features", [])))),
        "config": Config(_table(record["config"])),
        "divisor": _whole(record["divisor"]),
        "header": _read_header(_table(record["header"])),
    }


def _read_input(record: Mapping[str, Any]) -> Input:
    name, dtype, argument = (_text(record[key]) for key in ("name", "dtype", "argument"))
    return Input(name, _dims(record["shape"]), dtype, argument)


def _read_slot(record: Mapping[str, Any]) -> Slot:
    slot = Slot(
        name=_text(record["name"]),
        skip=_dims(record["skip"]),
        spatial=_choice(record["spatial"], Spatial),
        producer=_text(record["producer"]),
        up_block=_text(record["up_block"]),
        adds=tuple(map(_read_site, _list(record["adds"]))),
    )
    if len(slot.skip) != 4 or slot.skip[1].symbol is not None:
        raise ValueError(f"slot {slot.name}: a skip is (batch, channels, height, width), got {record['skip']}")
    if (slot.channels, slot.stride) != (_whole(record["channels"]), _whole(record["stride"])):
        raise ValueError(f"slot {slot.name}: channels and stride do not agree with its shape {record['skip']}")
    return slot


def _read_site(record: Mapping[str, Any]) -> AddSite:
    owner, function, file = (_text(record[key]) for key in ("owner", "function", "file"))
    return AddSite(owner, function, file, _whole(record["line"], least=0))


def _read_header(record: Mapping[str, Any]) -> Header:
    native, parameters = record["native"], record["parameters"]
    return Header(
        source=_text(record["source"]),
        vae_factor=_whole(record["vae_factor"]),
        native=None if native is None else _pair(native),
        parameters=None if parameters is None else _whole(parameters, least=0),
        controlnets=tuple(map(_read_controlnet, _list(record["controlnets"]))),
        adapter=_text(record.get("adapter", "")),
        handover=tuple(map(_text, _list(record["handover"]))),
        notes=tuple(map(_text, _list(record["notes"]))),
        versions=tuple(sorted((package, _text(release)) for package, release in _table(record["versions"]).items())),
    )


def _read_controlnet(record: Mapping[str, Any]) -> ControlNetInfo:
    width, pooled = record["cross_attention_dim"], record["pooled"]
    if not isinstance(pooled, bool):
        raise TypeError(f"expected true or false, got {pooled!r}")
    source, class_name = _text(record["source"]), _text(record["class_name"])
    return ControlNetInfo(source, class_name, _whole(record["base_channels"]), None if width is None else _whole(width), pooled)


def _dims(texts: Any) -> tuple[Dim, ...]:
    return tuple(Dim.parse(_text(text)) for text in _list(texts))


def _pair(value: Any) -> tuple[int, int]:
    first, second = map(_whole, _list(value))
    return first, second


def _whole(value: Any, least: int = 1) -> int:
    if type(value) is not int or value < least:
        raise TypeError(f"expected a whole number of at least {least}, got {value!r:.60}")
    return value


def _choice(value: Any, kinds: Any) -> Any:
    if value not in get_args(kinds):
        raise ValueError(f"{value!r:.60} is none of {', '.join(get_args(kinds))}")
    return value


def _list(value: Any) -> list[Any]:
    if not isinstance(value, list):
        raise TypeError(f"expected a list, got {value!r:.60}")
    return value


def _table(value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise TypeError(f"expected an object, got {value!r:.60}")
    return value


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"expected text, got {value!r:.60}")
    return value
