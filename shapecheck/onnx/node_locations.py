"""Locations of an exported graph's nodes in the UNet: the module that a node computes for, and the slot nearby."""

from __future__ import annotations

import re
from collections.abc import Mapping

import onnx_ir as ir

from shapecheck.contract import Contract

SCOPES = "pkg.torch.onnx.name_scopes"
"""Key under which torch's newer exporter leaves the modules of a node, outermost first."""
BLOCK = re.compile(r"conv_in|down_blocks\.\d+\.\w+\.\d+|mid_block|up_blocks\.\d+")
"""Modules whose outputs become skips, or are compared block by block."""
_MODULE = re.compile(r"(?:(?:down_blocks|up_blocks)\.\d+|mid_block|conv_in)(?:\.[a-z]\w*|\.\d+)*")


def find_module(*texts: str) -> str:
    """Return the innermost module in the first of these texts that names one, such as `/down_blocks.1/resnets.0/Conv`."""
    for text in texts:
        if modules := _MODULE.findall(text.replace("/", ".")):
            return str(max(modules, key=len)).removesuffix(".out")
    return ""


class NodeLocations:
    """The locations of a graph's nodes and inputs, in a contract's words."""

    def __init__(self, model: ir.Model, contract: Contract, names: Mapping[str, str]) -> None:
        self._nodes = {node.name: node for node in model.graph if node.name}
        slots = [slot for slot in contract.slots if slot.producer]
        self._slots = {slot.producer: slot.name for slot in slots}
        places = {slot.name: f", which is added to the output of {slot.producer}" for slot in slots}
        self._inputs = {theirs: f"{ours}{places.get(ours, '')}" for ours, theirs in names.items()}

    def of_node(self, name: str) -> str:
        """Return where the node is, in words; empty if nothing tells."""
        node = self._nodes.get(name)
        for value in node.inputs if node else ():
            if value is not None and value.name in self._inputs:
                return f"takes {self._inputs[value.name]}"
        module = find_module(name) or (_find_module_after(node) if node else "")
        slot = self._slots.get(module)
        return (f"computes {module}" if module else "") + (f", whose output is the skip of {slot}" if slot else "")

    def named_in(self, text: str) -> dict[str, str]:
        """Return the inputs and nodes that a text mentions, each with its location."""
        locations = {}
        for word in dict.fromkeys(re.findall(r"[\w./:+-]+", text)):
            word = word.strip(".:")
            if location := self._inputs.get(word) or self.of_node(word):
                locations[word] = location
        return locations


def _find_module_after(node: ir.Node) -> str:
    """Return the module of the first value behind the node that is named after one."""
    waiting, seen = [node], {node}
    for following in waiting:  # which grows on the way
        for value in following.outputs:
            if module := find_module(value.name or ""):
                return module
            users = [user for user in dict.fromkeys(value.consumers()) if user not in seen]
            waiting += users
            seen.update(users)
        if len(waiting) > 400:  # the nearest named value is never that far
            break
    return ""
