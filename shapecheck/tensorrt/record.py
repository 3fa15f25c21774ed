"""What travels beside an engine: its contract and profiles, all that tells two builds apart, and how a check of it came out."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from shapecheck.contract.contract import Contract
from shapecheck.contract.errors import ShapecheckError
from shapecheck.contract.geometry import Geometry
from shapecheck.contract.json_codec import TextFormat, decode, decode_record, encode, refuse_unprintable
from shapecheck.contract.records import Mismatch
from shapecheck.files import read_text, report_unreadable, require_regular
from shapecheck.tensorrt.profile_formats import refuse_count
from shapecheck.tensorrt.profiles import Profile, Range

Target = Literal["trt", "rtx"]
"""TensorRT, which needs the GPU it builds for; or TensorRT for RTX, which builds on any machine."""


MODULES = {"trt": "tensorrt", "rtx": "tensorrt_rtx"}
"""The Python module of each target."""


SIDECAR = ".shapecheck.json"
"""What is added to an engine's file name for its record; whose key "contract" holds the contract."""


ENGINES = (".plan", ".engine", ".trt")
"""How the name of an engine ends."""


Read = Literal["engine", "record"]
"""Whether TensorRT showed the engine's own inputs and profiles, or only the record beside it told them."""


_FORMAT = TextFormat(
    "shapecheck_engine", "an engine's record", writer="`shapecheck build`", remedy="build the engine again", largest=16 * 2**20
)


_LONGEST = 2000


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
        return _digest(encode(self) | {"contract": self.contract.digest})

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
        """Return JSON text, which `from_json` reads."""
        record = self._to_record()
        return json.dumps(record | {"checksum": _digest(record)}, indent=1, ensure_ascii=False) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Engine:
        """Read `to_json`'s text. Raises ShapecheckError on anything else, an edited file included."""
        record = _FORMAT.parse(text)
        claimed = record.pop("checksum", None)
        try:
            refuse_unprintable(record)
            request: Request = decode_record(Request, record)
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

    def _to_record(self) -> dict[str, Any]:
        file = {"digest": self.digest, "bytes": self.size}
        return {_FORMAT.key: _FORMAT.schema, "key": self.request.key, "engine": file, **encode(self.request)}


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


def record_of(engine: Path) -> Path:
    """Return the file that holds an engine's record."""
    return engine.with_name(engine.name + SIDECAR)


def is_engine(path: Path) -> bool:
    """Return whether a file's name is that of an engine."""
    return path.suffix.lower() in ENGINES


def read_engine(path: str | Path) -> Engine:
    """The record beside an engine: contract, profiles, and all that it was built from.

    Raises ShapecheckError, naming the file, where there is none, or it is damaged or was edited.
    """
    path = Path(path)
    beside = record_of(path)
    with report_unreadable(beside):
        beside = beside if beside.exists() else record_of(path.resolve())  # beside the file that a link stands for
        if not beside.exists():
            size_of_engine(path)
            raise ShapecheckError(
                f"{path} has no {beside.name} beside it, where an engine's contract is kept; "
                "copy both together, or build it again"
            )
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
        raise ShapecheckError(f"{beside}: {str(error)[:_LONGEST]}") from None


def size_of_engine(path: Path) -> int:
    """Return the bytes of an engine. Raises ShapecheckError if it is not a regular file: nothing may wait for a pipe."""
    with report_unreadable(path):
        return require_regular(path, f"{path} is {'a folder' if path.is_dir() else 'a pipe or a device'}, not an engine")


def _digest(value: Any) -> str:
    """Return the digest of a JSON value. Beside a record it shows a slip of an editor or a merge, not intent."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"))
    return "sha256:" + hashlib.sha256(text.encode()).hexdigest()
