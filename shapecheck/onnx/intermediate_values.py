"""The contract's own values inside of an ONNX file: what its blocks give, its skips, and the sums with the residuals."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import onnx
import onnx_ir as ir

from shapecheck.contract import Contract, ShapecheckError
from shapecheck.contract.errors import one_line
from shapecheck.onnx.file import LARGEST, OnnxFile
from shapecheck.onnx.node_locations import BLOCK, SCOPES, module_in
from shapecheck.onnx.reading import SAME_VALUE, SIZE_ONLY, find_sums

LAST = "conv_out"
"""Path of the module that gives the UNet's output."""


_OURS = re.compile(r"(?P<module>.+)\.out(?:\+(?P<slot>\w+))?")
"""As our own exporter names blocks' outputs and sums."""


@dataclass(frozen=True, slots=True)
class Inner:
    """One of the contract's own values in an ONNX file: what a module gives, or the sum of a skip and its residual."""

    value: str
    """Its name in the file; that of the bare skip where the file adds no residual to it."""
    module: str
    """Path of the PyTorch module that gives it; for a sum, that gives the skip."""
    slot: str = ""
    """For a sum its slot; empty for what a module gives."""

    @property
    def name(self) -> str:
        """What it is called here, whatever the file calls it: `<module>.out`, or `<module>.out+<slot>`."""
        return f"{self.module}.out" + (f"+{self.slot}" if self.slot else "")


@dataclass(frozen=True, slots=True)
class _Sum:
    """An addition of a residual."""

    residual: str
    """The slot whose input it takes, which in a faulty file need not be the slot where it is."""
    skip: ir.Value
    value: ir.Value


def find_values(file: OnnxFile, contract: Contract, names: Mapping[str, str]) -> tuple[Inner, ...]:
    """Return the values of an ONNX file that can be compared with the UNet's own, in the order of the graph.

    `names` is what the file calls the contract's inputs and slots, of those it has. Blocks' outputs are found by our own
    names, or by those that PyTorch's exporters derive from modules; skips and sums by the additions too. A slot's place is
    told by its skip, so that exchanged residuals do not agree; a residual that the file ignores has the bare skip for its
    sum. Last comes the output, under `conv_out`.
    Raises ShapecheckError if the file is no sound ONNX model.
    """
    values = _Finder(file.make_ir().graph, contract, names).values()
    return tuple(value for value in values if value.value in file.computed_names)


def name_output(value: str) -> str:
    """Return what `add_outputs` calls the output that shows a value."""
    return f"shapecheck.marked/{value}"


def add_outputs(file: OnnxFile, values: Iterable[str]) -> bytes:
    """Return an ONNX file whose further outputs, named by `name_output`, are these of its values as float32.

    Weights in other files stay there and are not read: the bytes are to be opened with the file's folder. Raises
    ShapecheckError if the file has no such value, or if it would not fit into one message of protobuf (2 GiB).
    """
    values = tuple(dict.fromkeys(values))
    if unknown := [value for value in values if value not in file.computed_names]:
        raise ShapecheckError(f"{file} has no value {one_line(', '.join(unknown), 300)}")
    graph, further = file.proto.graph, onnx.ModelProto()
    declared = {info.name: info.type.tensor_type.elem_type for info in (*graph.output, *graph.value_info)}
    for value in values:
        # float64 if the file says so of the value, or computes in it altogether
        is_double = declared.get(value, graph.output[0].type.tensor_type.elem_type) == onnx.TensorProto.DOUBLE
        element = onnx.TensorProto.DOUBLE if is_double else onnx.TensorProto.FLOAT
        further.graph.node.append(onnx.helper.make_node("Cast", [value], [name_output(value)], to=element))
        further.graph.output.append(onnx.helper.make_tensor_value_info(name_output(value), element, None))
    # Protobuf reads two messages in a row as one, with repeated fields joined: the file's own is neither changed nor copied.
    data = bytes(file.proto.SerializeToString() + further.SerializeToString())
    if len(data) >= LARGEST:
        raise ShapecheckError(f"{file} cannot be given further outputs: it would exceed 2 GiB, the most protobuf holds")
    return data


class _Finder:
    """Finds the contract's values in one graph."""

    def __init__(self, graph: ir.Graph, contract: Contract, names: Mapping[str, str]) -> None:
        self._graph, self._contract = graph, contract
        self._ranks = {value: rank for rank, value in enumerate(value for node in graph for value in node.outputs)}
        inputs = {value.name: value for value in graph.inputs}
        wanted = {slot.name: inputs.get(names.get(slot.name, "")) for slot in contract.slots}
        self._residuals = {slot: value for slot, value in wanted.items() if value is not None}
        ours = [match for value in self._ranks if (match := _OURS.fullmatch(value.name or ""))]
        self._ours = {match[0]: match for match in ours if match["slot"] is None or match["slot"] in wanted}
        named = {value.name: value for value in self._ranks}
        own_blocks = {match["module"]: named[name] for name, match in self._ours.items() if match["slot"] is None}
        self._blocks = own_blocks if self._ours else _module_outputs(graph)

    def values(self) -> Iterator[Inner]:
        sums = self._placed_sums()
        fed = {feature.producer for feature in self._contract.features}  # their skips have a feature added already
        bare = [slot for slot in self._contract.slots if slot.name in sums and slot.producer not in fed]
        skips = {slot.producer: sums[slot.name].skip for slot in bare}
        blocks = skips | self._blocks
        found = [(float(self._ranks[value]), Inner(value.name or "", module)) for module, value in blocks.items()]
        found += [(float(self._ranks[each.value]), self._inner(each.value, slot)) for slot, each in sums.items()]
        found += self._ignored(sums, blocks)
        yield from (each for _, each in sorted(found, key=lambda pair: pair[0]))
        yield from (Inner(value.name or "", LAST) for value in self._graph.outputs[:1])

    def _inner(self, value: ir.Value, slot: str) -> Inner:
        return Inner(value.name or "", self._contract.slot(slot).producer, slot)

    def _placed_sums(self) -> dict[str, _Sum]:
        """The additions by the slot where each is: by its own name; by the order of the skips where none is missing."""
        sums = self._sums()
        order = [slot.name for slot in self._contract.slots] if len(sums) == len(self._contract.slots) else []
        found: dict[str, _Sum] = {}
        for index, each in enumerate(sums):
            own = self._ours.get(each.value.name or "")
            slot = own["slot"] if own and own["slot"] else order[index] if order else self._slot_by_skip(each)
            found.setdefault(slot, each)
        return found

    def _slot_by_skip(self, each: _Sum) -> str:
        """The slot whose skip this is, as far as names tell; else the one whose residual is added."""
        slots = [slot.name for slot in self._contract.slots if self._blocks.get(slot.producer) is each.skip]
        return each.residual if each.residual in slots or not slots else slots[0]

    def _sums(self) -> list[_Sum]:
        """The additions in the order of their skips; a residual that is added twice in a row counts once, as it goes on."""
        found: dict[ir.Value, _Sum] = {}
        additions = [
            _Sum(slot, skip, value)
            for slot, residual in self._residuals.items()
            for skip, _, value in find_sums(residual)
            if {skip, value} <= self._ranks.keys()  # not those in a branch
        ]
        for each in sorted(additions, key=lambda each: self._ranks[each.value]):
            before = found.get(each.skip)
            if before is not None and before.residual == each.residual:
                del found[each.skip]
                found[each.value] = _Sum(each.residual, before.skip, each.value)
            else:
                found[each.value] = each
        order = {slot.name: index for index, slot in enumerate(self._contract.slots)}
        return sorted(found.values(), key=lambda each: (self._ranks[each.skip], order[each.residual]))

    def _ignored(self, sums: Mapping[str, _Sum], blocks: Mapping[str, ir.Value]) -> Iterator[tuple[float, Inner]]:
        """The skips whose residuals the graph ignores, each before the sum of the next slot that has one."""
        slots = self._contract.slots
        for index, slot in enumerate(slots):
            skip, residual = blocks.get(slot.producer), self._residuals.get(slot.name)
            is_read = residual is not None and any(node.op_type not in SIZE_ONLY for node in residual.consumers())
            if slot.name in sums or skip is None or is_read:
                continue
            later = [self._ranks[sums[each.name].value] for each in slots[index:] if each.name in sums]
            yield (min(later) - 0.5 if later else self._ranks[skip] + 0.5), self._inner(skip, slot.name)


def _module_outputs(graph: ir.Graph) -> dict[str, ir.Value]:
    """Block → the value that leaves it, by the names that PyTorch's exporters give.

    Where several leave, as the activated time embedding does that all blocks share, the last is made from the others.
    """
    blocks = {node: block for node in graph if node.outputs and (block := _block_of(node))}
    leaving: dict[str, ir.Value] = {}
    for node, block in blocks.items():
        if _is_computed(node) and _leaves(node.outputs[0], block, blocks):
            leaving[block] = node.outputs[0]
    return leaving


def _block_of(node: ir.Node) -> str:
    """The block that a node is in; empty where no name tells."""
    texts = (node.name or "", node.outputs[0].name or "", node.metadata_props.get(SCOPES, ""))
    module = next(filter(None, map(module_in, texts)), "")
    match = BLOCK.match(module)
    return match[0] if match else ""


def _is_computed(node: ir.Node) -> bool:
    """Whether it makes something of inputs, not of weights or constants alone."""
    given = [value for value in node.inputs if value is not None and not value.is_initializer()]
    return any(value.producer() is None or value.producer().op_type != "Constant" for value in given)  # type: ignore[union-attr]


def _leaves(value: ir.Value, block: str, blocks: Mapping[ir.Node, str]) -> bool:
    """Whether something outside of the block takes the value, and more than its size."""
    if value.is_graph_output():
        return True
    waiting = [value]
    for each in waiting:  # which grows on the way
        for node in each.consumers():
            if node.op_type in SAME_VALUE and node not in blocks:
                waiting += node.outputs[:1]
            elif node.op_type not in SIZE_ONLY and blocks.get(node) != block:
                return True
    return False
