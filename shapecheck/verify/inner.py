"""What a UNet in PyTorch computes on its way: the outputs of its blocks, and its skips with the residuals added."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from shapecheck.build.inner import Inner
from shapecheck.contract import Contract
from shapecheck.run.torch_session import TorchSession


def inner_of(module: nn.Module, contract: Contract, inputs: Mapping[str, Tensor], values: Iterable[Inner]) -> dict[str, Tensor]:
    """The values by `Inner.name`, float64 on the CPU, computed in the precision of the module's weights.

    `inputs` holds a tensor for every input and slot of the contract. A value whose module does not exist here is left out.
    """
    found: dict[str, Tensor] = {}
    with _watched(module, values, inputs, found):
        TorchSession(module, contract)(inputs)
    return found


@contextmanager
def _watched(
    module: nn.Module, values: Iterable[Inner], inputs: Mapping[str, Tensor], found: dict[str, Tensor]
) -> Iterator[None]:
    """Keep the values as they are computed; no hook remains, even where forward raises."""
    modules = dict(module.named_modules())
    with ExitStack() as hooks:
        for each in values:
            if each.module in modules:
                handle = modules[each.module].register_forward_hook(_keeper(each, inputs, found))
                hooks.callback(handle.remove)
        yield


def _keeper(each: Inner, inputs: Mapping[str, Tensor], found: dict[str, Tensor]) -> Callable[[Any, Any, Any], None]:
    def keep(module: nn.Module, given: Any, output: Any) -> None:
        value = output if isinstance(output, Tensor) else output[0]  # a tuple begins with the hidden state
        if each.slot:
            value = value + inputs[each.slot].to(value.device, value.dtype)  # rounded as the UNet's own sum is
        found[each.name] = value.detach().to("cpu", torch.float64, copy=True)  # which later layers cannot write to

    return keep
