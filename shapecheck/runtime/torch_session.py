"""Call a UNet in PyTorch as every other backend is called: a tensor for each input and slot of its contract."""

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
    """A UNet, in the precision and on the device of its weights.

    Call it with a tensor for every input of the contract and for every slot; it returns the image under `out_sample`.
    To be compared with, it computes `exactly`: on a GPU not in TF32.
    """

    def __init__(self, module: nn.Module, contract: Contract, *, exactly: bool = True) -> None:
        self.module, self.contract, self._exactly = module.eval(), contract, exactly
        first = next(module.parameters())
        self.device, self.dtype = first.device, first.dtype

    def __call__(self, inputs: Mapping[str, Tensor], outputs: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
        """Return the image for these inputs, which are cast to the module's precision, all but the timestep.

        `outputs` are left alone: PyTorch allocates its own.
        """
        values = {name: self._place(name, value) for name, value in inputs.items()}
        with torch.no_grad(), forbid_tf32() if self._exactly else nullcontext():
            return {OUTPUT: self.module(**arguments(self.contract, values), return_dict=False)[0]}

    def _place(self, name: str, value: Tensor) -> Tensor:
        cast = value.is_floating_point() and name != "timestep"
        return value.to(self.device, self.dtype if cast else value.dtype)

    def close(self) -> None:
        """Free the memory."""
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
