"""A UNet or ControlNet in PyTorch, called as every other backend is: a tensor for each input and slot of its contract."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any, Self

import torch
from torch import Tensor, nn

from shapecheck.contract import Contract
from shapecheck.contract.naming import IMAGE
from shapecheck.models.forward_call import build_arguments

OUTPUT = IMAGE


def output_names(contract: Contract) -> tuple[str, ...]:
    """Return what a model of this contract gives: a UNet an image, a ControlNet a residual for every slot."""
    return (OUTPUT,) if contract.role == "unet" else tuple(slot.name for slot in contract.slots)


class TorchSession:
    """A model in the precision and on the device where its weights are.

    Call it with a tensor for every input of the contract and for every slot that a UNet takes; it returns a tensor for each of
    `output_names`. If it is to be compared it computes `exactly`: on a GPU not in TF32.
    """

    provider = "eager"

    def __init__(self, module: nn.Module, contract: Contract, *, exactly: bool = True) -> None:
        self.module, self.contract, self._exactly = module.eval(), contract, exactly
        first = next(module.parameters())
        self.device, self.dtype = first.device, first.dtype
        self.detail = f"torch {torch.__version__}" + (", TF32 off" if exactly and self.device.type != "cpu" else "")

    def __call__(self, inputs: Mapping[str, Tensor], outputs: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
        """Return the outputs for these inputs, which are cast to the module's precision, all but the timestep.

        `outputs` are left alone: PyTorch allocates its own.
        """
        values = {name: self._place(name, value) for name, value in inputs.items()}
        with torch.no_grad(), forbid_tf32() if self._exactly else nullcontext():
            first, *mid = self.module(**build_arguments(self.contract, values), return_dict=False)
        tensors = [first] if self.contract.role == "unet" else [*first, *mid]
        return dict(zip(output_names(self.contract), tensors, strict=True))

    def _place(self, name: str, value: Tensor) -> Tensor:
        cast = value.is_floating_point() and name != "timestep"
        return value.to(self.device, self.dtype if cast else value.dtype)

    def close(self) -> None:
        del self.module

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


@contextmanager
def forbid_tf32() -> Iterator[None]:
    """Compute float32 products on a GPU in float32, not in TF32; what was set before is set again afterwards."""
    backends: tuple[Any, ...] = (torch.backends.cuda.matmul, torch.backends.cudnn)
    before = [backend.allow_tf32 for backend in backends]
    try:
        for backend in backends:
            backend.allow_tf32 = False
        yield
    finally:
        for backend, value in zip(backends, before, strict=True):
            backend.allow_tf32 = value
