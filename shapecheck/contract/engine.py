"""What travels beside an engine: its contract and profiles, and all that tells two builds apart."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from shapecheck.contract import profile_forms
from shapecheck.contract.contract import Contract
from shapecheck.contract.errors import ShapecheckError
from shapecheck.contract.profiles import Profile, rules_of

Target = Literal["trt", "rtx"]
"""TensorRT, which needs the GPU it builds for; or TensorRT for RTX, which builds on any machine."""

MODULES = {"trt": "tensorrt", "rtx": "tensorrt_rtx"}
"""The Python module of each target."""

SCHEMA = 1
_LARGEST_TEXT = 16 * 2**20


@dataclass(frozen=True, slots=True)
class BuildOptions:
    """How an engine is built. Precision is none of it: that is the dtype of the ONNX graph."""

    target: Target = "trt"
    optimization_level: int | None = None
    """TensorRT's builder optimisation level, 0 to 5; None for its default."""
    workspace: int | None = None
    """Bytes of scratch memory that a layer may use; None for all there are."""
    refittable: bool = False
    version_compatible: bool = False
    tf32: bool = True
    """Whether float32 products may be computed in TF32, as TensorRT does by default."""
    compute_capabilities: tuple[str, ...] = ()
    """For TensorRT for RTX: the GPUs to build for, such as `8.9`; none for every one it supports. Kept in order, once each."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "compute_capabilities", tuple(sorted(set(self.compute_capabilities))))


@dataclass(frozen=True, slots=True)
class Request:
    """Everything an engine depends on: two requests that differ in any of it never share an engine."""

    contract: Contract
    profiles: tuple[Profile, ...]
    """In the contract's names."""
    names: tuple[tuple[str, str], ...]
    """Every input: its name in the contract, and in the ONNX file and the engine."""
    outputs: tuple[str, ...]
    onnx: str
    """`sha256:…` of the ONNX file."""
    weights: str
    """`sha256:…` over every tensor as it was built in."""
    checkpoint: str
    """`sha256:…` of the checkpoint that the ONNX file says it was exported from; empty where it does not."""
    options: BuildOptions
    tensorrt: str
    gpu: str
    """The GPU it was built on, or those it was built for."""

    @property
    def key(self) -> str:
        """`sha256:…` over all of it."""
        text = json.dumps(_identity(self), sort_keys=True, separators=(",", ":"))
        return "sha256:" + hashlib.sha256(text.encode()).hexdigest()

    @property
    def engine_names(self) -> dict[str, str]:
        """From the contract's name of an input to the engine's."""
        return dict(self.names)


@dataclass(frozen=True, slots=True)
class Engine:
    """An engine that was built: what was asked for, and the file that came of it."""

    request: Request
    digest: str
    """`sha256:…` of the engine file."""
    size: int
    """Its bytes."""

    def to_json(self) -> str:
        """JSON text; `from_json` is the inverse."""
        record = {"shapecheck_engine": SCHEMA} | _record(self)
        return json.dumps(record | {"checksum": _checksum(record)}, indent=1, ensure_ascii=False) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Engine:
        """Read `to_json`'s text. Raises ShapecheckError on anything else, an edited file included."""
        if len(text) > _LARGEST_TEXT:
            raise ShapecheckError(f"not an engine's record: {len(text)} characters, more than the {_LARGEST_TEXT} allowed")
        try:
            record = json.loads(text)
            if not isinstance(record, dict) or record.get("shapecheck_engine") != SCHEMA:
                raise ShapecheckError(f"not an engine's record of schema {SCHEMA}; build the engine again")
            claimed = record.pop("checksum")
            _refuse_unprintable(record)
            engine = cls(_request(record), _text(record["engine"]["digest"]), _whole(record["engine"]["bytes"]))
        except (KeyError, TypeError, ValueError, RecursionError) as error:
            raise ShapecheckError(f"a damaged engine's record: {type(error).__name__}: {error!s:.200}") from None
        if _checksum(record) != claimed or _record(engine)["key"] != record["key"]:
            raise ShapecheckError("an edited engine's record: its checksum is not that of its contents; build the engine again")
        return engine


@dataclass(frozen=True, slots=True)
class Built:
    """What a request came to."""

    path: Path
    engine: Engine
    found: bool
    """Whether the engine was there already, unchanged."""
    seconds: float
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        return f"{self.path}: {'found, unchanged' if self.found else f'built in {self.seconds:.0f} s'}"


def _identity(request: Request) -> dict[str, Any]:
    return {
        "contract": request.contract.digest,
        "profiles": profile_forms.as_json(request.profiles),
        "names": dict(request.names),
        "outputs": list(request.outputs),
        "onnx": request.onnx,
        "weights": request.weights,
        "checkpoint": request.checkpoint,
        "options": asdict(request.options) | {"compute_capabilities": list(request.options.compute_capabilities)},
        "tensorrt": request.tensorrt,
        "gpu": request.gpu,
    }


def _record(engine: Engine) -> dict[str, Any]:
    request = engine.request
    return {
        "key": request.key,
        "engine": {"digest": engine.digest, "bytes": engine.size},
        **_identity(request),
        "contract": json.loads(request.contract.to_json()),
    }


def _checksum(record: Mapping[str, Any]) -> str:
    """Of all that is in a record, so that a slip of an editor or a merge is noticed; no proof against intent."""
    text = json.dumps(record, sort_keys=True, separators=(",", ":"))
    return "sha256:" + hashlib.sha256(text.encode()).hexdigest()


def _request(record: Mapping[str, Any]) -> Request:
    contract = Contract.from_json(json.dumps(record["contract"]))
    names = tuple((_text(ours), _text(theirs)) for ours, theirs in dict(record["names"]).items())
    if dict(names).keys() != rules_of(contract).keys() or len({theirs for _, theirs in names}) != len(names):
        raise ValueError("it does not name each input of its contract once")
    return Request(
        contract=contract,
        profiles=profile_forms.from_json(record["profiles"]),
        names=names,
        outputs=tuple(map(_text, record["outputs"])),
        options=_options(record["options"]),
        **{field: _text(record[field]) for field in ("onnx", "weights", "checkpoint", "tensorrt", "gpu")},
    )


def _options(record: Mapping[str, Any]) -> BuildOptions:
    if record["target"] not in get_args(Target):
        raise ValueError(f"no target {record['target']!r:.40}")
    return BuildOptions(
        target=record["target"],
        optimization_level=_whole_or_none(record["optimization_level"]),
        workspace=_whole_or_none(record["workspace"]),
        refittable=_flag(record["refittable"]),
        version_compatible=_flag(record["version_compatible"]),
        tf32=_flag(record["tf32"]),
        compute_capabilities=tuple(map(_text, record["compute_capabilities"])),
    )


def _refuse_unprintable(value: Any) -> None:
    """Anybody may have written it, and reports show it."""
    if isinstance(value, str) and not value.isprintable():
        raise ValueError(f"{value!r:.60} cannot be printed")
    for each in [*value, *value.values()] if isinstance(value, dict) else value if isinstance(value, list) else ():
        _refuse_unprintable(each)


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"expected text, got {value!r:.60}")
    return value


def _whole(value: Any) -> int:
    if type(value) is not int or value < 0:
        raise TypeError(f"expected a whole number, got {value!r:.60}")
    return value


def _whole_or_none(value: Any) -> int | None:
    return None if value is None else _whole(value)


def _flag(value: Any) -> bool:
    if not isinstance(value, bool):
        raise TypeError(f"expected true or false, got {value!r:.60}")
    return value
