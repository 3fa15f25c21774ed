"""A file in ONNX Runtime, or a live UNet, as a function of torch tensors that is held to its contract."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Protocol, Self

import torch
from torch import Tensor, nn

from shapecheck.contract import Contract, ContractError, Geometry
from shapecheck.contract.mismatch import Port
from shapecheck.runtime.binding import Binding, BoundCall, UnboundedSizes
from shapecheck.runtime.gate import Gate
from shapecheck.runtime.onnx_session import OnnxSession
from shapecheck.runtime.torch_session import OUTPUT, TorchSession


class Runner(Protocol):
    """What computes, by the file's own names."""

    @property
    def device(self) -> torch.device:
        """Where inputs have to lie."""

    def __call__(self, inputs: Mapping[str, Tensor], outputs: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
        """Every output; those named in `outputs` are written there where the runner can do that."""

    def close(self) -> None:
        """Give the memory back."""


class ContractSession:
    """A model on one device. `open_onnx` and `of_unet` make one.

    Call it with a tensor for every input of the contract, by the contract's names; it returns a tensor for every output.
    Nothing is filled in, converted or moved: ControlNet off means zeros given for every slot. A tensor is read where it lies.
    With `reuse` outputs are allocated once a size and written again by every call of that size: clone what is to be kept.

    After a refused call the next one is served as if it had not been. Two calls at once are an error: open a session a thread.
    """

    def __init__(
        self, name: str, taken: UnboundedSizes, runner: Runner, dtypes: Mapping[str, torch.dtype], *, reuse: bool = False
    ) -> None:
        self.contract, self.device, self.reuses_outputs = taken.contract, runner.device, reuse
        self._names = dict(taken.names)
        self._runner, self._dtypes = runner, dtypes
        self._gate = Gate(name, Binding(taken, str(runner.device)))
        self._outputs: dict[Geometry, dict[str, Tensor]] = {}

    @classmethod
    def open_onnx(
        cls,
        path: str | Path,
        contract: Contract,
        *,
        backend: str = "ort",
        device: int = 0,
        options: Mapping[str, str] | None = None,
        reuse: bool = False,
    ) -> Self:
        """Open an ONNX file in ONNX Runtime.

        Raises ContractError where the file's inputs are not those of the contract; ShapecheckError where ONNX Runtime
        refuses the file or falls back to another provider.
        """
        path = Path(path)
        session = OnnxSession.open(path, backend=backend, device=device, options=options)
        names = contract.match_names(session.inputs)
        dtypes = session.dtypes()
        declared = [Port(name, dtypes[name]) for name in session.inputs]
        if found := contract.compare_inputs(declared, names, present="an input of the file"):
            raise ContractError(found, subject=f"{path} is not what its contract says", contract=contract)
        taken = UnboundedSizes(contract, tuple(names.items()), session.outputs)
        return cls(str(path), taken, session, {name: getattr(torch, dtypes[name]) for name in session.outputs}, reuse=reuse)

    @classmethod
    def of_unet(cls, module: nn.Module, contract: Contract, name: str = "") -> Self:
        """A live UNet, where its weights are and in their precision."""
        taken = UnboundedSizes(contract, tuple((each, each) for each in contract.input_rules), (OUTPUT,))
        return cls(name or type(module).__name__, taken, TorchSession(module, contract, exactly=False), {})

    def __call__(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The outputs for these inputs, by the file's names.

        Raises CallError, with all that is wrong, for a call that cannot be served; ShapecheckError where the session is
        closed or busy, or the backend refuses the call all the same, in its own words.
        """
        with self._gate.alone():
            serving = self._gate.serve(inputs)
            given = {self._names[name]: each for name, each in inputs.items()}
            return dict(self._runner(given, self._memory(serving)))

    def close(self) -> None:
        """Give the model and its memory back. Closing again is fine; a call afterwards is an error."""
        if self._gate.is_open:
            with self._gate.alone():
                self._gate.shut()
                self._outputs.clear()
                self._runner.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def _memory(self, serving: BoundCall) -> Mapping[str, Tensor]:
        """Where outputs go: none where the backend allocates them, or the contract does not tell their shapes."""
        if serving.geometry in self._outputs:
            return self._outputs[serving.geometry]
        shapes = serving.outputs if self._dtypes else {}
        made = {name: torch.empty(shape, dtype=self._dtypes[name], device=self.device) for name, shape in shapes.items()}
        if self.reuses_outputs:
            self._outputs[serving.geometry] = made
        return made
