"""The record beside an engine: its contract and profiles, all that tells two builds apart; and the result of a check."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from shapecheck.contract.contract import Contract
from shapecheck.contract.errors import ShapecheckError
from shapecheck.contract.geometry import Geometry
from shapecheck.contract.json_codec import OPTIONAL, TextFormat, decode, decode_record, encode, refuse_unprintable
from shapecheck.contract.records import Mismatch
from shapecheck.files import read_text, report_unreadable, require_regular
from shapecheck.tensorrt.profile_formats import refuse_count
from shapecheck.tensorrt.profiles import Profile, Range, range_of, sample_range

Target = Literal["trt", "rtx"]
"""TensorRT, which needs the GPU it builds for; or TensorRT for RTX, which builds on any machine."""
MODULES = {"trt": "tensorrt", "rtx": "tensorrt_rtx"}
ENGINES = (".plan", ".engine", ".trt")
Read = Literal["engine", "record"]
"""The source of an engine's inputs and profiles: TensorRT for the engine itself, or only the record beside it."""
_FORMAT = TextFormat(
    "shapecheck_engine", "an engine's record", writer="`shapecheck build`", remedy="build the engine again", largest=16 * 2**20
)


@dataclass(frozen=True, slots=True)
class BuildOptions:
    """The options of a build. Precision is not one: that is the dtype of the ONNX graph."""

    target: Target = "trt"
    optimization_level: int | None = None
    """TensorRT's builder optimisation level, 0 to 5; None for its default."""
    workspace: int | None = None
    """Bytes of scratch memory that a layer may use; None for all there are."""
    refittable: bool = False
    """Weights can be exchanged in the engine, by `refit`."""
    version_compatible: bool = False
    tf32: bool = True
    """Let float32 products be computed in TF32, as TensorRT does by default."""
    compute_capabilities: tuple[str, ...] = ()
    """For TensorRT for RTX: the GPUs to build for, such as `8.9`, sorted; none for every one it supports."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "compute_capabilities", tuple(sorted(set(self.compute_capabilities))))


@dataclass(frozen=True, slots=True)
class BuildRequest:
    """Everything an engine depends on: two requests that differ in any of it never share an engine."""

    contract: Contract
    profiles: tuple[Profile, ...]
    """In the contract's names."""
    names: tuple[tuple[str, str], ...]
    """Every input: its name in the contract, and in the ONNX file and the engine."""
    outputs: tuple[str, ...]
    onnx: str
    weights: str
    checkpoint: str
    """Digests, `sha256:…`: of the ONNX file, of its tensors, and of the checkpoint that it names as its origin, or empty."""
    options: BuildOptions
    tensorrt: str
    gpu: str
    """The GPU it was built on, or those it was built for."""
    graph: str = field(default="", metadata=OPTIONAL)
    computation: str = field(default="", metadata=OPTIONAL)
    """Digests by which it is refitted: of the ONNX file's graph, and of what the model computes that it was exported from."""

    @property
    def key(self) -> str:
        return _digest(encode(self) | {"contract": self.contract.digest})

    @property
    def engine_names(self) -> dict[str, str]:
        return dict(self.names)


@dataclass(frozen=True, slots=True)
class Engine:
    """The request for an engine, and the file that was built for it."""

    request: BuildRequest
    digest: str
    size: int
    """`sha256:…` and bytes of the engine file."""

    @property
    def interface(self) -> EngineInterface:
        request = self.request
        return EngineInterface(request.contract, request.names, request.outputs, request.profiles, self)

    def to_json(self) -> str:
        file = {"digest": self.digest, "bytes": self.size}
        record = {_FORMAT.key: _FORMAT.schema, "key": self.request.key, "engine": file, **encode(self.request)}
        return json.dumps(record | {"checksum": _digest(record)}, indent=1, ensure_ascii=False) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Engine:
        """Read `to_json`'s text. Raises ShapecheckError on anything else, an edited file included."""
        record = _FORMAT.parse(text)
        claimed = record.pop("checksum", None)
        try:
            refuse_unprintable(record)
            request: BuildRequest = decode_record(BuildRequest, record)
            refuse_count(request.profiles)
            names = request.engine_names
            if names.keys() != request.contract.input_rules.keys() or len(set(names.values())) != len(names):
                raise ValueError("it does not name each input of its contract once")
            file = decode(dict, record.get("engine"), "engine")
            digest, size = decode(str, file.get("digest"), "engine.digest"), decode(int, file.get("bytes"), "engine.bytes")
        except (ValueError, RecursionError) as error:
            raise ShapecheckError(f"a damaged engine's record: {error!s:.200}") from None
        if _digest(record) != claimed or request.key != record.get("key"):
            raise ShapecheckError("an edited engine's record: its checksum is not that of its contents; build the engine again")
        return cls(request, digest, size)


@dataclass(frozen=True, slots=True)
class EngineInterface:
    """All that a call of an engine needs: from its record, or from the engine itself and the contract of its model."""

    contract: Contract
    names: tuple[tuple[str, str], ...]
    """Every input: its name in the contract, and in the engine."""
    outputs: tuple[str, ...]
    """The engine's names, of a ControlNet's in the order of the slots if its names tell it."""
    profiles: tuple[Profile, ...]
    """In the contract's names. Without a record each has every input, and slots may differ from the sample in range."""
    record: Engine | None = None

    @property
    def ranges(self) -> tuple[Range, ...]:
        """Return the geometries of each profile. Raises ShapecheckError if its inputs do not show them."""
        read = range_of if self.record is not None else sample_range
        return tuple(read(self.contract, profile) for profile in self.profiles)


@dataclass(frozen=True, slots=True)
class Built:
    """The engine for a request: built, or found unchanged where it was built before."""

    path: Path
    engine: Engine
    found: bool
    seconds: float
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        return f"{self.path}: {'found, unchanged' if self.found else f'built in {self.seconds:.0f} s'}"


@dataclass(frozen=True, slots=True)
class SizeFit:
    """The profile of an engine that serves a size; without one the reasons, and sizes that would fit."""

    geometry: Geometry
    profile: int | None
    reasons: tuple[str, ...] = ()
    nearest: Geometry | None = None
    rebuilt: Range | None = None
    """The nearest size that a profile serves, and the range to build for that the size would fit in."""


@dataclass(frozen=True, slots=True)
class WeightsCheck:
    """The comparison of the weights in an engine with those in a file or model."""

    name: str
    same: bool
    told: str


@dataclass(frozen=True, slots=True)
class EngineCheck:
    """An engine, how it was read, and everything that is wrong with it or does not fit."""

    path: str
    engine: EngineInterface
    read: Read
    unread: str
    """The reason why the engine itself was not read; empty if it was, or if its file is another's."""
    mismatches: tuple[Mismatch, ...]
    fit: SizeFit | None
    controlnets: tuple[str, ...]
    misfits: tuple[Mismatch, ...]
    weights: WeightsCheck | None
    notes: tuple[str, ...] = ()

    @property
    def is_fine(self) -> bool:
        fits = self.fit is None or self.fit.profile is not None
        return fits and not self.mismatches and not self.misfits and (self.weights is None or self.weights.same)


def record_of(engine: Path) -> Path:
    """Return the file beside an engine that holds its record."""
    return engine.with_name(f"{engine.name}.shapecheck.json")


def is_engine(path: Path) -> bool:
    """Return whether a file's name is that of an engine."""
    return path.suffix.lower() in ENGINES


def read_engine(path: str | Path) -> Engine:
    """Return the record beside an engine: contract, profiles, and everything that it was built from.

    Raises ShapecheckError, naming the file, if there is none, or it is damaged or was edited.
    """
    engine = find_record(path)
    if engine is None:
        raise ShapecheckError(
            f"{path} has no {record_of(Path(path)).name} beside it, where an engine's contract is kept; copy both together, or "
            "say which model it is, with --model of `shapecheck check` or model= of shapecheck.load: TensorRT tells its inputs"
        )
    return engine


def find_record(path: str | Path) -> Engine | None:
    """Return the record beside an engine, or None if there is none.

    Raises ShapecheckError, naming the file, if it is damaged or was edited, or there is no engine either.
    """
    path = Path(path)
    beside = record_of(path)
    with report_unreadable(beside):
        beside = beside if beside.exists() else record_of(path.resolve())  # beside the file that a link stands for
        if not beside.exists():
            size_of_engine(path)  # the engine itself may be missing
            return None
        require_regular(beside, f"{beside} is not a regular file, as an engine's record is")
        text = read_text(
            beside,
            _FORMAT.largest,
            too_large=f"{beside} is larger than {_FORMAT.largest >> 20} MiB: not an engine's record; build the engine again",
            not_text=f"{beside} is not UTF-8 text, as an engine's record is; build the engine again",
        )
    try:
        return Engine.from_json(text)
    except ShapecheckError as error:
        raise ShapecheckError(f"{beside}: {str(error)[:2000]}") from None


def size_of_engine(path: Path) -> int:
    """Return the bytes of an engine. Raises ShapecheckError if it is not a regular file: nothing may wait for a pipe."""
    with report_unreadable(path):
        return require_regular(path, f"{path} is {'a folder' if path.is_dir() else 'a pipe or a device'}, not an engine")


def _digest(value: Any) -> str:
    # Beside a record it shows a slip of an editor or a merge, not intent.
    text = json.dumps(value, sort_keys=True, separators=(",", ":"))
    return "sha256:" + hashlib.sha256(text.encode()).hexdigest()
