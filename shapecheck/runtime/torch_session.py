"""A UNet in PyTorch, called as every other backend is: a tensor for each input and slot of its contract."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any, Self

import torch
from torch import Tensor, nn

from shapecheck.contract import Contract
from shapecheck.models.forward_call import arguments

OUTPUT = "out_sample"


class TorchSession:
    """A UNet, in the precision and on the device where its weights are.

    Call it with a tensor for every input of the contract and for every slot; it returns the image under `out_sample`.
    Where it is to be compared it computes `exactly`: on a GPU not in TF32.
    """

    def __init__(self, module: nn.Module, contract: Contract, *, exactly: bool = True) -> None:
        self.module, self.contract, self._exactly = module.eval(), contract, exactly
        first = next(module.parameters())
        self.device, self.dtype = first.device, first.dtype

    def __call__(self, inputs: Mapping[str, Tensor], outputs: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
        """The image for these inputs, which are cast to the module's precision, all but the timestep.

        `outputs` are left alone: PyTorch allocates its own.
        """
        given = {name: self._placed(name, each) for name, each in inputs.items()}
        with torch.no_grad(), exact() if self._exactly else nullcontext():
            return {OUTPUT: self.module(**arguments(self.contract, given), return_dict=False)[0]}

    def _placed(self, name: str, value: Tensor) -> Tensor:
        cast = value.is_floating_point() and name != "timestep"
        return value.to(self.device, self.dtype if cast else value.dtype)

    def close(self) -> None:
        """Give the memory back."""
        del self.module

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


@contextmanager
def exact() -> Iterator[None]:
    """Float32 products on a GPU in float32, not in TF32; what was set before is set again afterwards."""
    places: tuple[Any, ...] = (torch.backends.cuda.matmul, torch.backends.cudnn)
    before = [each.allow_tf32 for each in places]
    try:
        for each in places:
            each.allow_tf32 = False
        yield
    finally:
        for each, value in zip(places, before, strict=True):
            each.allow_tf32 = value
