"""Where in the UNet a node of an exported graph is: the module it computes for, and the slot that is near."""

from __future__ import annotations

import re
from collections.abc import Mapping

import onnx_ir as ir

from shapecheck.contract import Contract

SCOPES = "pkg.torch.onnx.name_scopes"
"""Where torch's newer exporter leaves the modules a node comes from, outermost first."""


BLOCK = re.compile(r"conv_in|down_blocks\.\d+\.\w+\.\d+|mid_block|up_blocks\.\d+")
"""Modules whose outputs become skips, or are compared block by block."""


_MODULE = re.compile(r"(?:(?:down_blocks|up_blocks)\.\d+|mid_block|conv_in)(?:\.[a-z]\w*|\.\d+)*")


_FARTHEST = 400
"""Nodes that are looked at behind one for a value that is named after a module."""


def module_in(text: str) -> str:
    """The innermost diffusers module in a name such as `/down_blocks.1/resnets.0/conv1/Conv_output_0`; empty for none."""
    return max(_MODULE.findall(text.replace("/", ".")), key=len, default="").removesuffix(".out")


class Places:
    """The places of a graph's nodes and inputs, in a contract's words."""

    def __init__(self, model: ir.Model, contract: Contract, names: Mapping[str, str]) -> None:
        self._nodes = {node.name: node for node in model.graph if node.name}
        self._producers = {slot.producer: slot.name for slot in contract.slots}
        slots = {slot.name: slot.producer for slot in contract.slots}
        self._inputs = {theirs: (ours, slots.get(ours, "")) for ours, theirs in names.items()}

    def of_node(self, name: str) -> str:
        """Where the node is, in words; empty where nothing tells."""
        node = self._nodes.get(name)
        taken = [value.name for value in node.inputs if value is not None and value.name in self._inputs] if node else []
        if taken:
            return f"takes {_slot(*self._inputs[taken[0]])}"
        module = module_in(name) or (self._module_after(node) if node else "")
        if not module:
            return ""
        slot = self._producers.get(module)
        return f"computes {module}" + (f", whose output is the skip of {slot}" if slot else "")

    def named_in(self, text: str) -> dict[str, str]:
        """The inputs and nodes that a text speaks of, each with its place."""
        found = {}
        for word in dict.fromkeys(re.findall(r"[\w./:+-]+", text)):
            word = word.strip(".:")
            if word in self._inputs:
                found[word] = _slot(*self._inputs[word])
            elif place := self.of_node(word):
                found[word] = place
        return found

    def _module_after(self, node: ir.Node) -> str:
        """The module of the first value behind the node that is named after one."""
        waiting, seen = [node], {node}
        for each in waiting:  # which grows on the way
            for value in each.outputs:
                if module := module_in(value.name or ""):
                    return module
                waiting += [user for user in dict.fromkeys(value.consumers()) if user not in seen]
                seen |= set(value.consumers())
            if len(waiting) > _FARTHEST:
                break
        return ""


def _slot(name: str, producer: str) -> str:
    return f"{name}, which is added to the output of {producer}" if producer else name
