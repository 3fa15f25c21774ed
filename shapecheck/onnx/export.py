"""A UNet or ControlNet as an ONNX file: traced without weights, checked, then bound to the checkpoint's own weights."""

from __future__ import annotations

import json
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path

import onnx_ir as ir
from torch import nn

from shapecheck.contract import ShapecheckError
from shapecheck.contract.naming import ONNX_NUMBERS, find_scheme
from shapecheck.files import atomic_write, ensure_writable
from shapecheck.models import weights as checkpoints
from shapecheck.models.calibration_record import CalibratedModel, Calibration, choose_scale, read_calibration
from shapecheck.models.computation import describe_computation
from shapecheck.models.fp8_simulation import measure_magnitude
from shapecheck.models.safetensors import TensorLocation
from shapecheck.observe.subject import Subject, resolve_subject
from shapecheck.onnx import fp8_graph, postconditions, trace_graph
from shapecheck.onnx.file import COMPUTATION_KEY, CONTRACT_KEY, FP8_KEY, GRAPH_KEY, WEIGHTS_KEY, digest_graph
from shapecheck.onnx.records import Exported, Weights
from shapecheck.progress import Progress, silent
from shapecheck.version import __version__

_OPSETS = {"float32": (18, 20), "float16": (18, 20), "bfloat16": (22, 22)}
"""The oldest and the usual."""
_NEWEST_OPSET = 23


def export(
    model: str | Path | nn.Module,
    output: str | Path,
    *,
    weights: Weights | None = None,
    dtype: str | None = None,
    opset: int | None = None,
    control: bool = True,
    adapter: bool = False,
    naming: str = "shapecheck",
    fp8: Calibration | str | Path | None = None,
    variant: str | None = None,
    offline: bool = False,
    progress: Progress = silent,
) -> Exported:
    """Write `model` to the ONNX file `output`, right at every size the model accepts, without loading its weights.

    `model` is what `probe` takes, or a ControlNet: a UNet gets one input a slot, a ControlNet one output a slot. `output`
    ends in .onnx.
    `weights`: `link` points into the checkpoint's own safetensors, `copy` writes them to `output` + `.data`, `none` writes
    neither and leaves that file to be made later; by default they are linked if possible, else copied, and `reason` says why.
    `dtype` is by default the checkpoint's. `opset` is by default 20, for bfloat16 22.
    `control=False` exports a UNet without slots. With `adapter` it has an input for each feature of the T2I-Adapter that it
    implies, beside the slots or without them; zeros there mean no adapter. `naming` is a key of `contract.naming.SCHEMES`.
    `fp8` is what `calibrate` returned, or a file of it: products of the calibrated layers are then computed in fp8 by TensorRT,
    in a file of at least opset 19 whose weights are as before; `parity` shows what that costs.
    `variant` chooses among a checkpoint's files, such as fp16.

    Raises ShapecheckError if the model, the weights or the output cannot be used; nothing is left behind then.
    """
    target, names = find_target(Path(output)), find_scheme(naming)
    data = target.with_name(f"{target.name}.data")
    progress("reading the model")
    subject = resolve_subject(model, variant=variant, offline=offline)
    if subject.role == "controlnet" and adapter:
        raise ShapecheckError(f"--adapter is for UNets, which then take features, and {subject.name} is a ControlNet")
    if subject.role == "controlnet" and not control:
        raise ShapecheckError(f"--no-control is for UNets, which then take no residuals, and {subject.name} is a ControlNet")
    dtype, calibration = subject.dtype(dtype), read_calibration(fp8) if fp8 is not None else None
    opset = _choose_opset(opset, dtype, with_fp8=calibration is not None)
    mode, reason = choose_weights(weights, dtype, subject, target)
    if mode == "copy":
        ensure_writable(data)
    if mode == "none" and data.exists():
        raise ShapecheckError(f"--weights none: {data} exists and would be read as this model's weights; move it away")

    progress("observing the contract")
    contract = subject.contract(dtype, control=control, adapter=adapter)
    if nameless := [slot.name for slot in contract.residuals if not slot.producer and contract.role == "unet"]:
        raise ShapecheckError(
            f"{', '.join(nameless)} of {subject.name}: added to a tensor that no module returns first or alone, as diffusers' "
            "blocks do, so that nobody could tell in the file whether it is in its place: return it first, or export "
            "--no-control"
        )
    calibrated = calibration and calibration.find_model(contract)
    computation = describe_computation(subject.module)
    progress("tracing the graph: half a minute for SD1.5, two minutes for SDXL")
    traced = trace_graph.trace(subject.module, contract, opset)
    in_fp8 = _quantize(traced, subject, calibrated, progress) if calibrated else 0
    postconditions.check_graph(traced, contract)
    traced.graph.name = "shapecheck"
    for owner in (*traced.graph, *(value for node in traced.graph for value in node.outputs)):
        owner.metadata_props.clear()  # stack traces, with paths of this machine

    parameters = list(traced.graph.inputs[len(contract.input_rules) :])
    tensors = subject.tensors([str(value.name) for value in parameters], linked=mode == "link")
    linked = {name: stored for name, stored in tensors.items() if isinstance(stored, TensorLocation)}
    placed = linked if mode == "link" else checkpoints.plan_layout(tensors, dtype, data)
    _bind(traced, parameters, placed, target.parent)

    # Only the file has the slots under another project's names; the contract keeps ours.
    slots = [slot.name for slot in contract.slots]
    renamed = dict(zip(slots, names.names(len(slots) - 1), strict=True)) if slots else {}
    for value in (*traced.graph.inputs, *traced.graph.outputs):
        value.name = renamed.get(str(value.name), value.name)
    identity = "" if mode == "none" else checkpoints.digest(tensors, lambda *bytes_: progress("hashing the weights", *bytes_))
    traced.producer_name, traced.producer_version = "shapecheck", __version__
    libraries = ("torch", "diffusers", "onnxscript", "onnx", "onnx-ir")
    metadata = {
        CONTRACT_KEY: contract.to_json(),
        "shapecheck.digest": contract.digest,
        "shapecheck.naming": names.key,
        "shapecheck.sizes": "any" if contract.divisor == 1 else f"multiples of {contract.divisor}",
        WEIGHTS_KEY: identity,
        "shapecheck.versions": json.dumps({"shapecheck": __version__} | {name: version(name) for name in libraries}),
    }
    metadata |= {FP8_KEY: str(in_fp8)} if in_fp8 else {}
    proto = ir.to_proto(traced)
    metadata |= {COMPUTATION_KEY: "" if computation.unseen else f"sha256:{computation.digest}", GRAPH_KEY: digest_graph(proto)}
    for key, text in metadata.items():
        proto.metadata_props.add(key=key, value=text)

    with atomic_write(target) as partial:
        partial.write_bytes(proto.SerializeToString())
        # The weights come last: until every byte is there, no file of an earlier export changes.
        if mode == "copy":
            copied = lambda *bytes_: progress("copying the weights", *bytes_)  # noqa: E731
            checkpoints.copy_tensors(tensors, dtype, data, copied, outdated=target)
    files = (Path(output), *dict.fromkeys(stored.file for stored in placed.values()))
    return Exported(Path(output), contract, mode, reason, files, dtype, opset, naming, in_fp8)


def find_target(output: Path) -> Path:
    """Return where the file really goes. Raises ShapecheckError if no ONNX file can be written there."""
    if output.suffix.lower() != ".onnx":
        raise ShapecheckError(f"cannot write {output}: the name of an ONNX file ends in .onnx")
    target = output.resolve() if output.is_symlink() else output  # its weights lie beside the file, not beside the link
    if target.exists() and not target.is_file():
        raise ShapecheckError(f"cannot write {output}: it is a folder, a pipe or a device")
    ensure_writable(target)
    return target


def choose_weights(requested: Weights | None, dtype: str, subject: Subject, target: Path) -> tuple[Weights, str]:
    """Return whether to link or copy the weights; and why they are copied, if nobody requested that."""
    if requested == "none":
        return "none", ""
    if subject.live is None and subject.stored is None:
        raise ShapecheckError(
            f"no weights for {subject.name}: {subject.absent}; give a folder that holds them, or --weights none"
        )
    hindrance = subject.unlinkable(dtype, target.parent)
    if requested == "link" and hindrance:
        raise ShapecheckError(f"--weights link: {hindrance}; or use --weights copy")
    if requested == "copy":
        return "copy", ""
    return ("copy", hindrance) if hindrance else ("link", "")


def _choose_opset(requested: int | None, dtype: str, *, with_fp8: bool) -> int:
    """Return the requested opset, else the usual one. Raises ShapecheckError if it has not what the graph needs."""
    if dtype not in _OPSETS:
        raise ShapecheckError(f"no dtype {dtype!r}; known: {', '.join(_OPSETS)}")
    oldest, usual = _OPSETS[dtype]
    opset = usual if requested is None else requested
    if with_fp8:
        oldest = max(oldest, fp8_graph.FIRST_OPSET)
    if not oldest <= opset <= _NEWEST_OPSET:
        raise ShapecheckError(f"opset {opset} with {dtype}{' and fp8' * with_fp8}: expected {oldest} to {_NEWEST_OPSET}")
    return opset


def _quantize(model: ir.Model, subject: Subject, calibrated: CalibratedModel, progress: Progress) -> int:
    """Put the calibrated layers in fp8, the scales of their weights measured where these lie; return how many there are."""
    if subject.live is None and subject.stored is None:
        raise ShapecheckError(f"fp8 needs the weights of {subject.name}, whose magnitudes it measures: {subject.absent}")
    shapes = {name: tuple(tensor.shape) for name, tensor in subject.module.state_dict().items()}
    inputs = calibrated.choose_scales({module: shapes[f"{module}.weight"] for module in fp8_graph.find_weights(model)})
    if not inputs:
        raise ShapecheckError(
            f"no layer of this {subject.name} can be in fp8: each is delicate, narrower than the GPU's kernels, or never called"
        )
    weights = {}
    progress("measuring the weights that are to be in fp8")
    for name, tensor in subject.tensors([f"{module}.weight" for module in inputs], linked=False).items():
        magnitude = measure_magnitude(checkpoints.read_chunks(tensor))
        if not magnitude < float("inf"):
            raise ShapecheckError(f"{name} of {subject.name} is not finite: it cannot be in fp8")
        weights[name.removesuffix(".weight")] = choose_scale(magnitude)
    fp8_graph.quantize_products(model, inputs, weights)
    return len(inputs)


def _bind(model: ir.Model, parameters: list[ir.Value], placed: Mapping[str, TensorLocation], folder: Path) -> None:
    """Turn the parameters from inputs into initializers with their data in other files, under the same names."""
    for value in parameters:
        stored = placed[str(value.name)]
        model.graph.inputs.remove(value)
        value.const_value = ir.ExternalTensor(
            checkpoints.format_location(stored, folder), stored.offset, stored.nbytes, ir.DataType(ONNX_NUMBERS[stored.dtype]),
            shape=ir.Shape(stored.shape), name=str(value.name), base_dir=folder,
        )  # fmt: skip
        model.graph.register_initializer(value)
