"""The files of a parity run, before anything runs: the contract that each has to keep, and what reading it shows."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, partial
from math import lcm
from pathlib import Path

import torch
from torch import Tensor, nn

from shapecheck.contract import Contract, Geometry, Mismatch, ShapecheckError
from shapecheck.contract.geometry import AXES
from shapecheck.contract.naming import detect_output_scheme
from shapecheck.contract.size_request import SizeRequest
from shapecheck.models.diffusers_models import embed_numbers
from shapecheck.observe.subject import TorchModel
from shapecheck.onnx import weight_comparison
from shapecheck.onnx.check import check
from shapecheck.onnx.file import CONTRACT_KEY, OnnxFile
from shapecheck.onnx.foreign_inputs import TEXT, TIMES, TIMESTEP, adapt_timestep, measure_joined
from shapecheck.onnx.fp8_graph import is_in_fp8
from shapecheck.onnx.input_roles import STRENGTH, Roles, assign_roles, match_inputs, name_outputs
from shapecheck.onnx.records import FileCheck
from shapecheck.parity.cases import ForwardCase, InputGenerator
from shapecheck.parity.plan import choose_geometries
from shapecheck.parity.request import ParityRequest
from shapecheck.parity.results import Check, CheckKind, Ran, Result
from shapecheck.runtime.onnx_session import PROVIDERS
from shapecheck.runtime.torch_session import OUTPUT, output_names
from shapecheck.tensorrt.check import check_engine, compare_with_file
from shapecheck.tensorrt.profiles import Range, range_of
from shapecheck.tensorrt.record import Engine

ENGINE_BACKENDS = ("trt", "rtx")
Join = Callable[[Mapping[str, Tensor]], Tensor]
_SHOWN_NAMES = 3
_USUAL_MULTIPLE = 8


@dataclass(frozen=True)
class ParityFile:
    """A file that a backend runs, read and not yet opened. PyTorch itself runs the model, and has no file."""

    contract: Contract
    """The contract of the model, in the precision of the file."""
    names: Mapping[str, str]
    """From the contract's name of an input to the session's, for those that it has."""
    outputs: Mapping[str, str]
    """From the contract's name of an output to the session's, for those that it has."""
    path: Path = Path()
    graph: OnnxFile | None = None
    """The ONNX file that it is, or was built from, if that is known."""
    names_in_graph: Mapping[str, str] = field(default_factory=dict)
    """From the contract's name of an input to that ONNX file's."""
    record: Engine | None = None
    ranges: tuple[Range, ...] = ()
    """The sizes that it was made for."""
    find_check: Callable[[], FileCheck | None] = lambda: None
    """Returns the check of an ONNX file, with the sizes that it takes; None for anything else."""
    find_mismatches: Callable[[], tuple[Mismatch, ...]] = tuple
    """Returns everything in which it breaks its contract."""
    compare_weights: Callable[[nn.Module], str | None] | None = lambda module: ""
    """Returns how its weights differ from the module's, or None if their names do not tell; None if it does not show them."""
    find_narrower: Callable[[], tuple[str, ...]] | None = tuple
    """Returns what computes in less than its precision; None if it does not show that, but in its numbers."""
    joins: Mapping[str, Join] = field(default_factory=dict)
    """From the session's name of an input to what makes it of several of the contract's."""
    strength: float = 1.0
    """The strength that is baked into a ControlNet's file; 1 if it is an input."""
    taken_strength: float = 1.0
    """The strength that is baked into a UNet's file: PyTorch gets residuals times it."""
    notes: tuple[str, ...] = ()

    def give(self, generate: InputGenerator, case: ForwardCase) -> dict[str, Tensor]:
        """Return a call's inputs by the contract's names, the residuals before the file's own strength, and its joined ones."""
        values = generate(case, before_strength=self.taken_strength != 1)
        return values | self.join(values)

    def join(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the session's inputs that several of the contract's, given by its names, are joined to."""
        return {name: join(values) for name, join in self.joins.items()}

    @property
    def unshown(self) -> tuple[CheckKind, ...]:
        """Return the kinds of checks that cannot apply to it."""
        kinds: dict[CheckKind, object] = {"weights": self.compare_weights, "precision": self.find_narrower}
        return tuple(kind for kind, find in kinds.items() if find is None)

    def geometries(self, requested: SizeRequest) -> tuple[Geometry, ...]:
        """Return the requested sizes; what is not requested is its own, else small and what it takes."""
        geometries = choose_geometries(self.contract, self.ranges)
        if requested.symbols < set(AXES) and (checked := self.find_check()) is not None:
            limits = checked.limits
            if checked.unchecked:  # nearly everybody traces at such a size, and a graph may work at its multiples alone
                limits = replace(limits, divisor=lcm(_USUAL_MULTIPLE, self.contract.divisor))
            geometries = tuple(dict.fromkeys(limits.fit(geometry) for geometry in geometries))
        return requested.list_geometries(geometries, self.contract.divisor)

    def describe_limits(self, requested: SizeRequest) -> tuple[str, ...]:
        """Return in words what it does not take, or that this is not known, if not all of the size was requested."""
        if (checked := self.find_check()) is None:
            return ()
        if requested.symbols == set(AXES):
            return (f"takes {'; '.join(checked.input_limits)}",) if checked.input_limits else ()
        if checked.unchecked:
            tried = f"only multiples of {_USUAL_MULTIPLE} cells and what was requested are tried"
            limits = (f"takes {'; '.join(checked.input_limits)}",) if checked.input_limits else ()
            return (*limits, f"which sizes it takes was not checked ({checked.unchecked}): {tried}")
        return (f"takes {'; '.join(checked.narrower)}",) if checked.narrower else ()


def read_files(request: ParityRequest, model: TorchModel, requested: SizeRequest | None = None) -> dict[str, ParityFile]:
    """Return what each backend runs, every file read once. Raises ShapecheckError if one is missing or cannot be read."""
    graph = OnnxFile(request.onnx) if request.onnx is not None else None
    if graph is not None and request.calibration is not None and not is_in_fp8(graph):
        raise ShapecheckError(f"{graph} computes nothing in fp8: compare it without --fp8, or export it with that")
    read: dict[str, ParityFile] = {}
    files: dict[str, ParityFile] = {}
    for backend in request.what_runs:
        if backend in ENGINE_BACKENDS:
            if request.engine is None or request.record is None:
                raise ShapecheckError(f"{backend} runs engines: give one with --engine (`shapecheck build` makes one)")
            engine = read.get("engine") or _read_engine(Path(request.engine), request.record, model, graph)
            files[backend] = read["engine"] = engine
        elif backend in PROVIDERS:
            if graph is None:
                raise ShapecheckError(f"{backend} runs ONNX files: give one with --onnx (`shapecheck export` makes one)")
            files[backend] = read["onnx"] = read.get("onnx") or _read_onnx(graph, model, requested)
        else:
            if "torch" not in read:
                contract = model.contract(model.dtype(), control=True)
                names = _keep_names(contract.input_rules), _keep_names(output_names(contract))
                read["torch"] = ParityFile(contract, *names)
            files[backend] = read["torch"]
    return files


def _read_onnx(file: OnnxFile, model: TorchModel, requested: SizeRequest | None) -> ParityFile:
    roles = assign_roles(file.reading)
    image = roles.sample or next((tensor for tensor in roles.base if tensor.is_image), None)
    if image is None:
        raise ShapecheckError(f"{file} takes no image (batch, channels, height, width); is it a UNet?")
    _require_role(file.path, "controlnet" if roles.is_controlnet else "unet", model)
    if roles.pictures:
        pictures = ", ".join(tensor.name for tensor in roles.pictures)
        raise ShapecheckError(
            f"{file} makes its residuals inside: it holds a ControlNet ({pictures}), so that none can be exchanged "
            f"and {model.name} alone does not show its numbers; compare the two models' own files instead"
        )
    dtype = weight_comparison.find_precision(file, image.dtype)
    contract = model.contract(dtype, control=bool(roles.slots) or roles.is_controlnet, adapter=bool(roles.features))
    notes, strength = [], 1.0
    if dtype != image.dtype:
        notes.append(f"it takes {image.dtype} and computes in {dtype}: it is compared as a file in {dtype}")
    matching = match_inputs(roles, contract)
    if any(base.name == STRENGTH and tensor is None for base, tensor in matching.inputs):
        # The model is run at strength 1, and what the file gives is divided by its own.
        strength = roles.strength or 1.0
        contract = replace(contract, inputs=tuple(base for base in contract.inputs if base.name != STRENGTH))
        notes.append(f"a strength of {strength:.3g} is baked into it: its residuals are compared at that strength")
    taken = roles.strength if not roles.is_controlnet and CONTRACT_KEY not in file.metadata else None
    if taken not in (None, 1.0):
        notes.append(f"a strength of {taken:.3g} is baked in: it is compared with PyTorch at that strength")
    names = {ours.name: tensor.name for ours, tensor in matching.pairs}
    find_check = cache(partial(check, file, contract, requested))  # of the model's own contract
    if form := find_check().other_form:
        raise ShapecheckError(f"{file} is no UNet with slots, and cannot be compared with one: {form}")
    joins = {name: _create_join(contract, file, name) for name in names.values() if list(names.values()).count(name) > 1}
    joins |= {tensor.name: partial(_fill, tensor.dims or (), tensor.dtype) for tensor in matching.unused}
    timestep = next((tensor for base, tensor in matching.inputs if base.name == TIMESTEP), None)
    if timestep is not None:
        contract = adapt_timestep(contract, timestep, (image.dims or (None,))[0], timestep.taken_as)
    outputs = _name_outputs(file, roles, contract)

    def compare_weights(module: nn.Module) -> str | None:
        compared = weight_comparison.compare_weights(file, module.state_dict())
        if not compared.different:
            return "" if compared.same else None
        total = len(compared.different) + compared.same
        return f"{len(compared.different)} of {total} tensors are not the model's: {_list_names(compared.different)}"

    return ParityFile(
        contract,
        names,
        outputs,
        file.path,
        file,
        names | {name: name for name in joins},
        find_check=find_check,
        find_mismatches=lambda: find_check().mismatches,
        compare_weights=compare_weights,
        find_narrower=cache(lambda: weight_comparison.find_narrower(file, dtype, with_fp8=model.calibration is not None)),
        joins=joins,
        strength=strength,
        taken_strength=taken or 1.0,
        notes=tuple(notes),
    )


def _fill(dims: Sequence[int | str | None], dtype: str, values: Mapping[str, Tensor]) -> Tensor:
    """Return zeros for an input without effect: where the file leaves a size open, the call's if its name says which."""
    batch, _, height, width = values["sample"].shape
    sizes = {"batch": batch, "h": height, "w": width}
    return torch.zeros([dim if isinstance(dim, int) else sizes.get(dim or "", 1) for dim in dims], dtype=getattr(torch, dtype))


def _name_outputs(file: OnnxFile, roles: Roles, contract: Contract) -> dict[str, str]:
    if roles.is_controlnet and roles.naming is None:
        return name_outputs(roles, contract)
    if not roles.is_controlnet and file.reading.image is not None:
        return {OUTPUT: file.reading.image.name}
    return _match_outputs(file.path, contract, [output.name for output in file.reading.outputs])


def _create_join(contract: Contract, file: OnnxFile, name: str) -> Join:
    """Return what makes one tensor of SDXL's pooled text and size numbers, as the file takes it."""
    (dims,) = (tensor.dims or () for tensor in file.reading.inputs if tensor.name == name)
    is_plain = dims[-1:] == (measure_joined(contract).get("plain"),)

    def join(values: Mapping[str, Tensor]) -> Tensor:
        text, numbers = values[TEXT], values[TIMES]
        if not is_plain:
            numbers = embed_numbers(numbers, contract.config)
        return torch.cat([text, numbers.to(text.dtype)], -1)

    return join


def _read_engine(path: Path, record: Engine, model: TorchModel, graph: OnnxFile | None) -> ParityFile:
    request, built = record.request, record.request.contract
    _require_role(path, built.role, model)
    contract = model.contract(built.dtype, control=bool(built.slots), adapter=bool(built.features))

    def compare_weights(module: nn.Module) -> str:
        assert graph is not None
        return "" if compare_with_file(record, graph).same else f"it was not built from the weights of {graph}"

    pairs = match_inputs(assign_roles(graph.reading), contract).pairs if graph is not None else []
    names_in_graph = {ours.name: tensor.name for ours, tensor in pairs}
    return ParityFile(
        contract,
        _keep_names(contract.input_rules),  # a session takes the contract's names
        _match_outputs(path, contract, request.outputs),
        path,
        graph,
        names_in_graph,
        record,
        ranges=tuple(range_of(built, profile) for profile in request.profiles),
        find_mismatches=cache(lambda: check_engine(path, record, contract).mismatches),
        compare_weights=compare_weights if graph is not None else None,
        find_narrower=None,
    )


def _require_role(path: Path, role: str, model: TorchModel) -> None:
    if role != model.role:
        names = {"unet": "a UNet", "controlnet": "a ControlNet"}
        raise ShapecheckError(f"{path} is {names[role]} and {model.name} {names[model.role]}: give the model it was made of")


def _match_outputs(path: Path, contract: Contract, outputs: Sequence[str]) -> dict[str, str]:
    """Return the file's names of the outputs that it has: residuals by their names if those are known, else by their order.

    Raises ShapecheckError if it has none: nothing would be compared.
    """
    ours, scheme = output_names(contract), detect_output_scheme(outputs)
    if contract.role == "unet" or scheme is None:
        return dict(zip(ours, outputs, strict=False))
    names = {name: own for name, own in zip(ours, scheme.names(len(ours) - 1), strict=True) if own in outputs}
    if not names:
        raise ShapecheckError(f"{path} has no output that is a residual of the model; is it of another ControlNet?")
    return names


def _keep_names(names: Iterable[str]) -> dict[str, str]:
    return {name: name for name in names}


def evaluate_file(check: Check, file: ParityFile, ran: Ran, weights: str | None) -> Result:
    """Return the result of a check that needs no call: of the file, or of what really ran it.

    `weights` is the answer of the file's `compare_weights`.
    """
    fault = weights
    if check.kind == "provider":
        expected = PROVIDERS.get(check.backend, ran.provider)
        fault = "" if ran.provider == expected else f"{ran.provider} runs, where {check.backend} is {expected}"
    elif check.kind == "contract":
        fault = "; ".join(map(str, file.find_mismatches()))
    elif check.kind == "precision":
        narrower = file.find_narrower() if file.find_narrower is not None else ()
        fault = f"{len(narrower)} in less than {ran.precision}: {_list_names(narrower)}" if narrower else ""
    if fault is None:
        return Result(check, "not run", "no tensor of the file has a name that tells which of the model's it is")
    return Result(check, "failed" if fault else "passed", fault)


def _list_names(names: tuple[str, ...]) -> str:
    more = f" and {len(names) - _SHOWN_NAMES} more" if len(names) > _SHOWN_NAMES else ""
    return ", ".join(names[:_SHOWN_NAMES]) + more
