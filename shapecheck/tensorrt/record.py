"""What travels beside an engine: its contract and profiles, and all that tells two builds apart."""

from __future__ import annotations

import hashlib
import json
import stat
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from shapecheck.contract.contract import Contract, rules_of
from shapecheck.contract.errors import ShapecheckError
from shapecheck.contract.geometry import Geometry
from shapecheck.contract.records import Mismatch
from shapecheck.tensorrt import profile_formats
from shapecheck.tensorrt.profiles import Profile, Range

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
        "profiles": profile_formats.as_json(request.profiles),
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
        profiles=profile_formats.from_json(record["profiles"]),
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


Read = Literal["engine", "record"]
"""Whether TensorRT showed the engine's own inputs and profiles, or only the record beside it told them."""


@dataclass(frozen=True, slots=True)
class Fit:
    """Whether a size fits."""

    geometry: Geometry
    profile: int | None
    """The number of the profile that serves it."""
    reasons: tuple[str, ...]
    """Why none does."""
    nearest: Geometry | None
    """The nearest size that one serves."""
    rebuilt: Range | None
    """The range to build for that the size would fit in."""


@dataclass(frozen=True, slots=True)
class Weights:
    """Whether an engine was built from given weights."""

    name: str
    same: bool
    told: str


@dataclass(frozen=True, slots=True)
class EngineCheck:
    """An engine, how it was read, and everything that is wrong with it or does not fit."""

    path: str
    engine: Engine
    read: Read
    unread: str
    """Why the engine itself was not read; empty where it was, or where its file is another's."""
    mismatches: tuple[Mismatch, ...]
    fit: Fit | None
    controlnets: tuple[str, ...]
    misfits: tuple[Mismatch, ...]
    weights: Weights | None

    @property
    def is_fine(self) -> bool:
        """Whether nothing is wrong and all that was asked about fits."""
        fits = self.fit is None or self.fit.profile is not None
        return fits and not self.mismatches and not self.misfits and (self.weights is None or self.weights.same)


SIDECAR = ".shapecheck.json"
"""What is added to an engine's file name for its record; whose key "contract" holds the contract."""


ENGINES = (".plan", ".engine", ".trt")
"""How the name of an engine ends."""


_LARGEST = 16 * 2**20


_LONGEST = 2000


def record_of(engine: Path) -> Path:
    """The file that holds an engine's record."""
    return engine.with_name(engine.name + SIDECAR)


def is_engine(path: Path) -> bool:
    """Whether a file's name is that of an engine."""
    return path.suffix.lower() in ENGINES


def read_engine(path: str | Path) -> Engine:
    """The record beside an engine: contract, profiles, and all that it was built from.

    Raises ShapecheckError, naming the file, where there is none, or it is damaged or was edited.
    """
    beside = record_of(Path(path))
    try:
        beside = beside if beside.exists() else record_of(Path(path).resolve())  # beside the file that a link stands for
        if not stat.S_ISREG(beside.stat().st_mode):
            raise ShapecheckError(f"{beside} is no regular file, as an engine's record is")
        with beside.open("rb") as file:
            text = file.read(_LARGEST + 1).decode("utf-8-sig")
    except FileNotFoundError:
        size_of_engine(Path(path))
        raise ShapecheckError(
            f"{path} has no {beside.name} beside it, where an engine's contract is kept; copy both together, or build it again"
        ) from None
    except OSError as error:
        raise ShapecheckError(f"cannot read {beside}: {error.strerror or error}") from None
    except UnicodeError:
        raise ShapecheckError(f"{beside} is not UTF-8 text, as an engine's record is; build the engine again") from None
    try:
        return Engine.from_json(text)
    except ShapecheckError as error:
        raise ShapecheckError(f"{beside}: {str(error)[:_LONGEST]}") from None


def size_of_engine(path: Path) -> int:
    """Bytes of an engine. Raises ShapecheckError where it is no regular file: nothing may wait for a pipe."""
    try:
        status = path.stat()
    except OSError as error:
        raise ShapecheckError(f"cannot read {path}: {error.strerror or error}") from None
    if not stat.S_ISREG(status.st_mode):
        raise ShapecheckError(f"{path} is {'a folder' if stat.S_ISDIR(status.st_mode) else 'no regular file'}, not an engine")
    return status.st_size
