"""Exchange the weights of an exported file for those of another model with the same graph: nothing is traced again."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import onnx
import torch
from torch import nn

from shapecheck.contract import Contract, ShapecheckError
from shapecheck.contract.errors import one_line
from shapecheck.contract.naming import ONNX_NUMBERS
from shapecheck.files import atomic_write, ensure_writable
from shapecheck.logs import silence_logger
from shapecheck.models import weights as checkpoints
from shapecheck.models.computation import describe_computation
from shapecheck.models.safetensors import TensorLocation
from shapecheck.observe.subject import Subject, resolve_subject
from shapecheck.onnx.contract_metadata import contract_inside
from shapecheck.onnx.export import choose_weights, find_target
from shapecheck.onnx.file import COMPUTATION_KEY, CONTRACT_KEY, FP8_KEY, GRAPH_KEY, WEIGHTS_KEY, OnnxFile, digest_graph
from shapecheck.onnx.records import Exported
from shapecheck.progress import Progress, silent

_MOST_SHOWN = 5


def rebind(
    file: str | Path,
    model: str | Path | nn.Module,
    output: str | Path | None = None,
    *,
    variant: str | None = None,
    offline: bool = False,
    progress: Progress = silent,
) -> Exported:
    """Write the weights of `model` into a file that `export` wrote of one with the same graph, in seconds.

    `model` is what `export` takes: a folder, or a live UNet or ControlNet with other LoRAs, loaded or fused. `output` is by
    default the file itself; weights are linked if possible, else copied to `output` + `.data`, and each file appears when it
    is whole. The graph, its precision and its names stay.

    Raises ShapecheckError, with nothing changed, if an export of the model would be another graph, or the file is no longer
    the graph that was exported: a weight that another tool folded or transposed cannot be exchanged.
    """
    source = OnnxFile(file)
    target = find_target(Path(output if output is not None else file))
    progress("reading the model")
    subject, contract = resolve_subject(model, variant=variant, offline=offline), contract_inside(source)
    if contract is None:
        raise ShapecheckError(f"{source} holds no contract: it can be rebound if `shapecheck export` wrote it")
    names = _list_weights(source, subject)
    require_same_computation(subject, contract, source.metadata.get(COMPUTATION_KEY, ""), str(source))
    mode, reason = choose_weights(None, contract.dtype, subject, target)
    data = target.with_name(f"{target.name}.data")
    if mode == "copy":
        ensure_writable(data)

    tensors = subject.tensors(names, linked=mode == "link")
    linked = {name: stored for name, stored in tensors.items() if isinstance(stored, TensorLocation)}
    placed = linked if mode == "link" else checkpoints.plan_layout(tensors, contract.dtype, data)
    proto = _bind(source.proto, placed, target.parent)
    contract = replace(contract, header=replace(contract.header, source=subject.origin))

    with atomic_write(target) as partial:

        def save(values: Mapping[str, TensorLocation]) -> None:
            # Of what was written, if that is the same: LoRAs are merged once.
            is_converted = any(str(tensors[name].dtype).removeprefix("torch.") != values[name].dtype for name in values)
            hashed = lambda *bytes_: progress("hashing the weights", *bytes_)  # noqa: E731
            identity = checkpoints.digest(tensors if is_converted else values, hashed)
            onnx.helper.set_model_props(proto, {**source.metadata, CONTRACT_KEY: contract.to_json(), WEIGHTS_KEY: identity})
            partial.write_bytes(proto.SerializeToString())

        if mode == "copy":
            copied = lambda *bytes_: progress("copying the weights", *bytes_)  # noqa: E731
            checkpoints.copy_tensors(tensors, contract.dtype, data, copied, outdated=target, written=save)
        else:
            save(linked)
    files = (target, *dict.fromkeys(stored.file for stored in placed.values()))
    opset = next(entry.version for entry in proto.opset_import if not entry.domain)
    naming = one_line(source.metadata.get("shapecheck.naming", ""))
    return Exported(target, contract, mode, reason, files, contract.dtype, opset, naming)


def require_same_computation(subject: Subject, contract: Contract, expected: str, name: str) -> None:
    """Raise ShapecheckError unless a model is known to compute, its weights aside, what the file or engine was made of."""
    if subject.role != contract.role:
        raise ShapecheckError(f"{name} is of a {contract.class_name}, and {subject.name} is a {subject.role}")
    if not expected:
        raise ShapecheckError(
            f"{name} does not say what the model computed that it was made of, beside the weights: export the model again"
        )
    with silence_logger("diffusers"):
        module = subject.module.to(getattr(torch, contract.dtype))
    computation = describe_computation(module)
    if computation.unseen:
        raise ShapecheckError(
            f"{subject.name} may compute something else than {name}: {one_line(computation.unseen[0], longest=200)}; export it"
        )
    if f"sha256:{computation.digest}" != expected:
        raise ShapecheckError(
            f"{subject.name} is not the model that {name} was made of, with other weights: its configuration, classes, "
            "settings (attention processors), torch or diffusers are others; export it again"
        )


def _list_weights(file: OnnxFile, subject: Subject) -> list[str]:
    """Return the names of the weights. Raises ShapecheckError, naming those that are gone, if the graph was changed."""
    weights, state = file.weight_names, subject.module.state_dict()
    if file.metadata.get(FP8_KEY):
        raise ShapecheckError(
            f"{file} computes in fp8 with scales that were measured on its weights: export it again, with --fp8"
        )
    if file.metadata.get(GRAPH_KEY) != digest_graph(file.proto):
        gone = [name for name in state if name not in weights]
        first = f": {', '.join(map(one_line, gone[:_MOST_SHOWN]))}" + (", …" if len(gone) > _MOST_SHOWN else "")
        folded = f"; {len(gone)} weights are no longer in it as they were{first}" if gone else ""
        raise ShapecheckError(
            f"{file} is not the graph that `shapecheck export` wrote: an optimizer or converter may have folded or "
            f"transposed its weights, and where each of them went is unknown{folded}. Export the model again, or rebind the "
            "file as it was"
        )
    return [tensor.name for tensor in file.proto.graph.initializer if tensor.name in weights]


def _bind(proto: onnx.ModelProto, placed: Mapping[str, TensorLocation], folder: Path) -> onnx.ModelProto:
    """Return a copy of a model whose weights lie elsewhere, under the same names."""
    bound = onnx.ModelProto()
    bound.CopyFrom(proto)
    for tensor in bound.graph.initializer:
        stored = placed.get(tensor.name)
        if stored is None:
            continue
        if tensor.data_type != ONNX_NUMBERS[stored.dtype] or tuple(tensor.dims) != stored.shape:
            raise ShapecheckError(f"{one_line(tensor.name)} is {stored.dtype} {stored.shape} now: export the model again")
        del tensor.external_data[:]
        entries = {"location": checkpoints.format_location(stored, folder), "offset": stored.offset, "length": stored.nbytes}
        for key, value in entries.items():
            tensor.external_data.add(key=key, value=str(value))
    return bound
