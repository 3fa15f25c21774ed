"""Call a file in ONNX Runtime, or a live model, with torch tensors: every call is checked before it runs."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Self

import torch
from torch import Tensor, nn

from shapecheck.contract import Contract, ContractError, Geometry
from shapecheck.contract.mismatch import Port
from shapecheck.runtime.binding import Binding
from shapecheck.runtime.call_gate import Gate, copy_outputs
from shapecheck.runtime.onnx_session import OnnxSession
from shapecheck.runtime.torch_session import TorchSession, output_names
from shapecheck.tensorrt.profile_formats import choose_precision


class ContractSession:
    """A model on one device. `open_onnx` and `of_module` make one.

    Call it with a tensor for every input of the contract, by the contract's names; it returns a tensor for every output.
    Nothing is filled in, converted or moved: for ControlNet off pass zeros for every slot. With `reuse`, and with `graphs`,
    outputs are allocated once a size and written again by every call of that size: clone what is to be kept.

    A refused call changes nothing for the next one. Two calls at once are an error: open a session for each thread.
    """

    def __init__(
        self, gate: Gate, runner: OnnxSession | TorchSession, dtypes: Mapping[str, torch.dtype], *, reuse: bool = False
    ) -> None:
        self.contract, self.device, self.reuses_outputs = gate.binding.contract, runner.device, reuse
        self._gate, self._runner, self._dtypes = gate, runner, dtypes
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
        graphs: bool = False,
    ) -> Self:
        """Open an ONNX file in ONNX Runtime, which with `graphs` replays calls on a GPU as CUDA graphs.

        Raises ContractError if the file's inputs are not those of the contract; ShapecheckError if ONNX Runtime refuses the
        file, or to capture it, or falls back to another provider.
        """
        path = Path(path)
        if backend == "ort-trt":
            options = {**choose_precision({contract.dtype}), **(options or {})}
        session = OnnxSession.open(path, backend=backend, device=device, options=options, graphs=graphs)
        names, dtypes = contract.match_names(session.inputs), session.dtypes()
        declared = [Port(name, dtypes[name]) for name in session.inputs]
        if mismatches := contract.compare_inputs(declared, names, present="an input of the file"):
            raise ContractError(mismatches, subject=f"{path} is not what its contract says", contract=contract)
        output_dtypes = {name: getattr(torch, dtypes[name]) for name in session.outputs}
        binding = Binding(contract, tuple(names.items()), session.outputs, str(session.device))
        return cls(Gate(str(path), binding), session, output_dtypes, reuse=reuse or graphs)

    @classmethod
    def of_module(cls, module: nn.Module, contract: Contract, name: str = "") -> Self:
        """Serve a live UNet or ControlNet, on the device of its weights and in their precision."""
        runner = TorchSession(module, contract, exactly=False)
        binding = Binding(
            contract, tuple((rule, rule) for rule in contract.input_rules), output_names(contract), str(runner.device)
        )
        return cls(Gate(name or type(module).__name__, binding), runner, {})

    def __call__(self, inputs: Mapping[str, Tensor], *, own_outputs: bool = False) -> dict[str, Tensor]:
        """Return the outputs for these inputs, by the file's names; with `own_outputs` no other call writes there.

        Raises CallError, with all that is wrong, for a call that cannot be served; ShapecheckError if the session is closed
        or busy, or the backend refuses the call all the same, in its own words.
        """
        with self._gate.acquire():
            call = self._gate.serve(inputs)
            outputs = self._outputs.get(call.geometry)
            if outputs is None:
                # without dtypes, or with shapes that the contract does not determine, the backend allocates
                shapes = call.outputs if self._dtypes else {}
                outputs = {
                    name: torch.empty(shape, dtype=self._dtypes[name], device=self.device) for name, shape in shapes.items()
                }
                if self.reuses_outputs:
                    self._outputs[call.geometry] = outputs
            names = self._gate.binding.names
            results = self._runner({names[name]: tensor for name, tensor in inputs.items()}, outputs)
            return copy_outputs(results) if own_outputs and self.reuses_outputs else dict(results)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Free the model and its memory. Closing again is fine; a call afterwards is an error."""
        if self._gate.is_open:
            with self._gate.acquire():
                self._gate.close()
                self._outputs.clear()
                self._runner.close()
