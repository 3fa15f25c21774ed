"""The files of a parity run, before anything runs: which contract each has to keep, and what can be told by reading it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Protocol

from torch import nn

from shapecheck.contract import Contract, Geometry, Mismatch, ShapecheckError
from shapecheck.contract.naming import detect, is_feature
from shapecheck.observe.subject import TorchModel
from shapecheck.onnx import file as onnx_file
from shapecheck.onnx import weight_comparison
from shapecheck.onnx.check import check
from shapecheck.parity.plan import geometries_of
from shapecheck.parity.results import Check, Ran, Result
from shapecheck.runtime.onnx_session import PROVIDERS
from shapecheck.tensorrt.check import check_engine, compare_with_file
from shapecheck.tensorrt.profiles import Range, range_of
from shapecheck.tensorrt.record import Engine, read_engine

_TOLD = 3
"""How many names of a kind a reason gives."""


class File(Protocol):
    """What a backend runs, read and not yet opened."""

    contract: Contract
    """Of the model, in the precision of the file."""

    @property
    def path(self) -> Path:
        """Where it lies."""

    @property
    def names(self) -> Mapping[str, str]:
        """From the contract's name of an input to the file's, for those that it has."""

    @property
    def mismatches(self) -> tuple[Mismatch, ...]:
        """In what the file is not of its contract."""

    @property
    def graph(self) -> onnx_file.OnnxFile | None:
        """The ONNX file it is, or was built from; None where there is none, or it is not known."""

    @property
    def names_in_graph(self) -> Mapping[str, str]:
        """What that ONNX file calls the contract's inputs."""

    def geometries(self, ranges: tuple[Range, ...]) -> tuple[Geometry, ...]:
        """The sizes to run at."""

    def weights(self, module: nn.Module) -> str | None:
        """In what its weights are not the module's; empty where they are, None where that cannot be told."""

    def narrower(self) -> tuple[str, ...] | None:
        """What computes in less than its precision; None where that cannot be told."""


@dataclass(slots=True)
class Model:
    """The model itself, for a backend that is PyTorch."""

    contract: Contract
    path: Path = Path()
    mismatches: tuple[Mismatch, ...] = ()

    graph: None = None

    @property
    def names(self) -> Mapping[str, str]:
        """Its own."""
        return {name: name for name in self.contract.input_rules}

    @property
    def names_in_graph(self) -> Mapping[str, str]:
        """None has any."""
        return {}

    def geometries(self, ranges: tuple[Range, ...]) -> tuple[Geometry, ...]:
        """Those of the ranges, or three small ones."""
        return geometries_of(self.contract, ranges)

    def weights(self, module: nn.Module) -> str | None:
        """Its own."""
        return ""

    def narrower(self) -> tuple[str, ...] | None:
        """Nothing."""
        return ()


@dataclass
class OnnxFile:
    """An ONNX file."""

    graph: onnx_file.OnnxFile
    contract: Contract
    sizes: Mapping[str, int] = field(default_factory=dict)
    """Sizes of a call that the file declares as numbers."""

    @cached_property
    def _checked(self) -> tuple[dict[str, str], tuple[Mismatch, ...]]:
        found = check(self.graph, self.contract)
        return dict(found.names), found.mismatches

    @property
    def names(self) -> Mapping[str, str]:
        """From the contract's name of an input to the file's, for those that it has."""
        return self._checked[0]

    @property
    def mismatches(self) -> tuple[Mismatch, ...]:
        """What `shapecheck check` finds."""
        return self._checked[1]

    @property
    def path(self) -> Path:
        """Where it lies."""
        return self.graph.path

    @property
    def names_in_graph(self) -> Mapping[str, str]:
        """Its own."""
        return self.names

    def geometries(self, ranges: tuple[Range, ...]) -> tuple[Geometry, ...]:
        """Those of the ranges; without any, three small ones, or as far as the file fixes them, its own."""
        found = geometries_of(self.contract, ranges)
        return found if ranges else tuple(dict.fromkeys(geometry.with_sizes(self.sizes) for geometry in found))

    def weights(self, module: nn.Module) -> str | None:
        """In what its weights are not the module's; None where no tensor has a name that tells whose it is."""
        found = weight_comparison.compare_weights(self.graph, module.state_dict())
        if not found.different:
            return "" if found.same else None
        total = len(found.different) + found.same
        return f"{len(found.different)} of {total} tensors are not the model's: {_several(found.different)}"

    def narrower(self) -> tuple[str, ...] | None:
        """Casts, weights and operators of a narrower type than the image that goes in."""
        return weight_comparison.find_narrower(self.graph, self.contract.dtype)


@dataclass
class EngineFile:
    """An engine with its record."""

    path: Path
    record: Engine
    contract: Contract
    graph: onnx_file.OnnxFile | None = None
    """The ONNX file it was built from, where that is given."""

    @cached_property
    def names_in_graph(self) -> Mapping[str, str]:
        """What that ONNX file calls the contract's inputs."""
        return dict(check(self.graph, self.contract).names) if self.graph else {}

    @property
    def names(self) -> Mapping[str, str]:
        """The contract's: a session takes those."""
        return {name: name for name in self.contract.input_rules}

    @cached_property
    def mismatches(self) -> tuple[Mismatch, ...]:
        """What `shapecheck check` finds."""
        return check_engine(self.path, self.record, self.contract).mismatches

    def geometries(self, ranges: tuple[Range, ...]) -> tuple[Geometry, ...]:
        """Those of the ranges, or of every profile it has."""
        request = self.record.request
        return geometries_of(self.contract, ranges or tuple(range_of(request.contract, each) for each in request.profiles))

    def weights(self, module: nn.Module) -> str | None:
        """Whether it was built from this ONNX file's bytes and weights; None where there is none to ask."""
        if self.graph is None:
            return None
        return "" if compare_with_file(self.record, self.graph).same else f"it was not built from the weights of {self.graph}"

    def narrower(self) -> tuple[str, ...] | None:
        """An engine does not tell."""
        return None


def file_for(backend: str, model: TorchModel, onnx: Path | None, engine: Path | None) -> File:
    """What a backend runs. Raises ShapecheckError where it is not given or cannot be read."""
    if backend.startswith("torch"):
        return Model(model.contract(model.dtype(), control=True))
    if backend in ("trt", "rtx"):
        if engine is None:
            raise ShapecheckError(f"{backend} runs engines: give one with --engine (`shapecheck build` makes one)")
        record = read_engine(engine)
        own = record.request.contract
        _refuse_features(engine, [slot.name for slot in own.features])
        graph = onnx_file.OnnxFile(onnx) if onnx is not None else None
        return EngineFile(engine, record, model.contract(own.dtype, control=bool(own.slots)), graph)
    if onnx is None:
        raise ShapecheckError(f"{backend} runs ONNX files: give one with --onnx (`shapecheck export` makes one)")
    return _onnx_file(onnx_file.OnnxFile(onnx), model)


def judged(check: Check, file: File, ran: Ran, weights: str | None) -> Result:
    """What reading a file proves, and what really ran it; `weights` is what `File.weights` said."""
    if check.kind == "provider":
        wanted = PROVIDERS.get(check.backend, ran.provider)
        return _told(check, "" if ran.provider == wanted else f"{ran.provider} runs, where {check.backend} is {wanted}")
    if check.kind == "contract":
        return _told(check, "; ".join(map(str, file.mismatches)))
    if check.kind == "weights":
        return _told(check, weights, "no tensor of the file has a name that tells which of the model's it is")
    lower = file.narrower()
    told = None if lower is None else f"{len(lower)} in less than {ran.precision}: {_several(lower)}" if lower else ""
    return _told(check, told, "an engine does not tell in what it computes; its numbers do")


def _told(check: Check, fault: str | None, unknown: str = "") -> Result:
    if fault is None:
        return Result(check, "not run", unknown)
    return Result(check, "failed" if fault else "passed", fault)


def _onnx_file(file: onnx_file.OnnxFile, model: TorchModel) -> OnnxFile:
    found = file.reading
    _refuse_features(file.path, [each.name for each in found.inputs if is_feature(each.name)])
    image = next((each for each in found.inputs if each.name == "sample"), None)
    image = image or next((each for each in found.inputs if each.is_image and not each.adds), None)
    if image is None:
        raise ShapecheckError(f"{file} takes no image (batch, channels, height, width); is it a UNet?")
    control = any(each.adds for each in found.inputs) or detect(each.name for each in found.inputs) is not None
    contract = model.contract(image.dtype, control=control)
    axes = zip(("batch", "", "h", "w"), image.dims or (), strict=False)
    return OnnxFile(file, contract, {symbol: dim for symbol, dim in axes if symbol and isinstance(dim, int)})


def _refuse_features(path: Path, features: Sequence[str]) -> None:
    if features:
        raise ShapecheckError(
            f"{path} takes a T2I-Adapter's features ({', '.join(features)}), which a parity run does not give yet; "
            "`shapecheck export --adapter --verify` compares its numbers with PyTorch's"
        )


def _several(names: tuple[str, ...]) -> str:
    more = f" and {len(names) - _TOLD} more" if len(names) > _TOLD else ""
    return ", ".join(names[:_TOLD]) + more
