"""The contract's own values inside an ONNX file: the outputs of its blocks, its skips, and the sums with the residuals."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import onnx
import onnx_ir as ir

from shapecheck.contract import Contract, ShapecheckError
from shapecheck.contract.errors import one_line
from shapecheck.onnx.file import LARGEST, OnnxFile
from shapecheck.onnx.node_locations import BLOCK, SCOPES, find_module
from shapecheck.onnx.sums import SAME_VALUE, SIZE_ONLY, find_sums

_OURS = re.compile(r"(?P<module>.+)\.out(?:\+(?P<slot>\w+))?")
"""Names of blocks' outputs and sums in files of our own exporter."""


@dataclass(frozen=True, slots=True)
class Inner:
    """One of the contract's own values in an ONNX file: the output of a module, or the sum of a skip and its residual."""

    value: str
    """Its name in the file; that of the bare skip if the file adds no residual to it."""
    module: str
    """Path of the PyTorch module that computes it; of a sum, the module that computes the skip."""
    slot: str = ""
    """The slot of a sum; empty for the output of a module."""

    @property
    def name(self) -> str:
        """Our own name, whatever the file calls it: `<module>.out`, or `<module>.out+<slot>`."""
        return f"{self.module}.out" + (f"+{self.slot}" if self.slot else "")


@dataclass(frozen=True, slots=True)
class _Sum:
    """An addition of a residual."""

    residual: str
    """The slot whose input it takes, which in a faulty file need not be the slot of its skip."""
    skip: ir.Value
    value: ir.Value


def find_values(file: OnnxFile, contract: Contract, names: Mapping[str, str]) -> tuple[Inner, ...]:
    """Return the values of an ONNX file that can be compared with the UNet's own, in the order of the graph.

    `names` is what the file calls the contract's inputs and slots that it has. Blocks' outputs are found by our own names,
    or by those that PyTorch's exporters derive from modules; skips and sums by the additions too. A skip tells the slot of
    its sum, so that exchanged residuals do not agree; a residual that the file ignores has the bare skip for its sum. Last
    comes the output, under `conv_out`.
    Raises ShapecheckError if the file is not a sound ONNX model.
    """
    graph, slots = file.make_ir().graph, contract.slots
    ranks = {value: rank for rank, value in enumerate(value for node in graph for value in node.outputs)}
    inputs = {value.name: value for value in graph.inputs}
    residuals = {slot.name: inputs[names[slot.name]] for slot in slots if names.get(slot.name) in inputs}
    matches = [(value, match) for value in ranks if (match := _OURS.fullmatch(value.name or ""))]
    known = {None, *(slot.name for slot in slots)}
    ours = {value: match for value, match in matches if match["slot"] in known}
    blocks = {match["module"]: value for value, match in ours.items() if not match["slot"]}
    if not ours:
        blocks = _find_block_outputs(graph)

    sums: dict[str, _Sum] = {}
    additions = _list_sums(graph, residuals, ranks, contract)
    for index, addition in enumerate(additions):
        # The slot is told by our own name, by the order of the skips if none is missing, or by the skip.
        name = ours[addition.value]["slot"] if addition.value in ours else None
        if not name and len(additions) == len(slots):
            name = slots[index].name
        if not name:
            same_skip = [slot.name for slot in slots if blocks.get(slot.producer) is addition.skip]
            name = addition.residual if addition.residual in same_skip or not same_skip else same_skip[0]
        sums.setdefault(name, addition)

    # The sum of a slot shows its block's bare output, unless a T2I-Adapter's feature was added before.
    fed = {feature.producer for feature in contract.features}
    bare = [slot for slot in slots if slot.name in sums and slot.producer not in fed]
    blocks = {slot.producer: sums[slot.name].skip for slot in bare} | blocks
    ranked = [(float(ranks[value]), Inner(value.name or "", module)) for module, value in blocks.items()]
    for index, slot in enumerate(slots):
        residual, skip = residuals.get(slot.name), blocks.get(slot.producer)
        is_read = residual is not None and any(node.op_type not in SIZE_ONLY for node in residual.consumers())
        if slot.name in sums:
            value = sums[slot.name].value
            ranked.append((ranks[value], Inner(value.name or "", slot.producer, slot.name)))
        elif skip is not None and not is_read:
            # The graph ignores the residual: its bare skip comes before the sum of the next slot that has one.
            later = [ranks[sums[slot.name].value] for slot in slots[index:] if slot.name in sums]
            rank = min(later) - 0.5 if later else ranks[skip] + 0.5
            ranked.append((rank, Inner(skip.name or "", slot.producer, slot.name)))
    values = [value for _, value in sorted(ranked, key=lambda pair: pair[0])]
    values += [Inner(value.name or "", "conv_out") for value in graph.outputs[:1]]
    return tuple(value for value in values if value.value in file.computed_names)


def name_output(value: str) -> str:
    """Return the name of the output that `add_outputs` makes of a value."""
    return f"shapecheck.marked/{value}"


def add_outputs(file: OnnxFile, values: Iterable[str]) -> bytes:
    """Return the bytes of an ONNX file that has these values, as float32, for further outputs, named by `name_output`.

    Weights in other files stay there and are not read: open the bytes with the file's folder.
    Raises ShapecheckError if the file has no such value, or would not fit into one message of protobuf (2 GiB).
    """
    values = tuple(dict.fromkeys(values))
    if unknown := [value for value in values if value not in file.computed_names]:
        raise ShapecheckError(f"{file} has no value {one_line(', '.join(unknown), 300)}")
    graph, addition = file.proto.graph, onnx.ModelProto()
    declared = {info.name: info.type.tensor_type.elem_type for info in (*graph.output, *graph.value_info)}
    for value in values:
        # float64 if the file declares the value so, or computes in it altogether
        is_double = declared.get(value, graph.output[0].type.tensor_type.elem_type) == onnx.TensorProto.DOUBLE
        element = onnx.TensorProto.DOUBLE if is_double else onnx.TensorProto.FLOAT
        addition.graph.node.append(onnx.helper.make_node("Cast", [value], [name_output(value)], to=element))
        addition.graph.output.append(onnx.helper.make_tensor_value_info(name_output(value), element, None))
    # Protobuf reads two messages in a row as one, with repeated fields joined: the file's own is neither changed nor copied.
    try:
        data = bytes(file.proto.SerializeToString() + addition.SerializeToString())
    except Exception as error:  # protobuf's own error class, or ValueError
        raise ShapecheckError(f"{file} cannot be given further outputs: {one_line(error, 200)}") from None
    if len(data) >= LARGEST:
        raise ShapecheckError(f"{file} cannot be given further outputs: it would exceed 2 GiB, the most protobuf holds")
    return data


def _list_sums(
    graph: ir.Graph, residuals: Mapping[str, ir.Value], ranks: Mapping[ir.Value, int], contract: Contract
) -> list[_Sum]:
    """Return the additions in the order of their skips; of a residual that is added twice in a row, only the second."""
    sums: dict[ir.Value, _Sum] = {}
    nodes = {node: rank for rank, node in enumerate(graph)}
    additions = [
        _Sum(slot, addition.skip, addition.value)
        for slot, residual in residuals.items()
        for addition in find_sums(residual, nodes)
        if addition.skip is not addition.value  # a skip that is laid out otherwise is not PyTorch's
    ]
    for addition in sorted(additions, key=lambda addition: ranks[addition.value]):
        before = sums.get(addition.skip)
        if before is not None and before.residual == addition.residual:
            del sums[addition.skip]
            addition = _Sum(addition.residual, before.skip, addition.value)
        sums[addition.value] = addition
    order = {slot.name: index for index, slot in enumerate(contract.slots)}
    return sorted(sums.values(), key=lambda addition: (ranks[addition.skip], order[addition.residual]))


def _find_block_outputs(graph: ir.Graph) -> dict[str, ir.Value]:
    """Return block → the value that leaves it, by the names that PyTorch's exporters derive.

    If several leave, as the activated time embedding does that all blocks share, the last is made from the others.
    """
    blocks: dict[ir.Node, str] = {}
    for node in graph:
        if node.outputs:
            module = find_module(node.name or "", node.outputs[0].name or "", node.metadata_props.get(SCOPES, ""))
            if match := BLOCK.match(module):
                blocks[node] = match[0]
    outputs: dict[str, ir.Value] = {}
    for node, block in blocks.items():
        makers = [value.producer() for value in node.inputs if value is not None and not value.is_initializer()]
        # A node that takes only weights or constants computes nothing of the inputs.
        is_computed = any(maker is None or maker.op_type != "Constant" for maker in makers)
        if is_computed and _leaves(node.outputs[0], block, blocks):
            outputs[block] = node.outputs[0]
    return outputs


def _leaves(value: ir.Value, block: str, blocks: Mapping[ir.Node, str]) -> bool:
    """Return whether something outside the block reads the value, and more than its size."""
    if value.is_graph_output():
        return True
    waiting = [value]
    for following in waiting:  # which grows on the way
        for node in following.consumers():
            if node.op_type in SAME_VALUE and node not in blocks:
                waiting += node.outputs[:1]
            elif node.op_type not in SIZE_ONLY and blocks.get(node) != block:
                return True
    return False
