"""Call an engine with torch tensors: every call is checked before it runs, and tensors are bound at their own addresses."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Self

import torch
from torch import Tensor

from shapecheck.contract import Contract, ContractError, Geometry, ShapecheckError, show
from shapecheck.runtime.binding import Binding, BoundCall, PlacedCall
from shapecheck.runtime.call_gate import Gate, copy_outputs
from shapecheck.runtime.engine_loading import Executor, Loaded, build_refusal, import_tensorrt, load_engine, map_engine
from shapecheck.runtime.gpu import Gpu
from shapecheck.tensorrt.engine_tensors import DYNAMIC, DeclaredEngine, compare_model
from shapecheck.tensorrt.record import EngineInterface, find_record, read_engine

_log = logging.getLogger(__name__)


class EngineSession:
    """An engine on one GPU. `EngineSession.open(path)` makes one; `close()` or the end of a `with` frees its memory.

    Call it with a tensor for every input of the contract, by the contract's names; it returns a tensor for every output, by
    the engine's names. Nothing is filled in, converted or moved: for ControlNet off pass zeros for every slot. A tensor is
    bound at its own address; only one that is not contiguous, does not begin at a multiple of 256 bytes, or lies in this
    session's own output of that size is copied first.

    The outputs are allocated once a size, kept, and written again by every call of that size: clone what is to be kept.
    A call returns when its work is queued on torch's current stream, or in step with it: what that stream does next sees the
    results, and may change or free the inputs.

    With `graphs` the second call in a row with the same sizes at the same addresses is captured into a CUDA graph, which is
    replayed until a call differs. It has a context of its own, and so scratch memory of its own.

    A call may be part of a CUDA graph that PyTorch captures if one of the same sizes came just before the capture; the graph is
    sound until the session is closed, and holds a context.

    A refused call changes nothing for the next one. Two calls at once are an error: open a session for each thread.
    """

    def __init__(self, path: Path, interface: EngineInterface, gpu: Gpu, loaded: Loaded, *, graphs: bool) -> None:
        self.contract, self.device, self.reuses_outputs = interface.contract, torch.device(gpu.name), True
        self.record = interface.record
        """The record kept beside the engine: contract, profiles, and all it was built from. None if others built it."""
        self._path, self._gpu, self._graphs = path, gpu, graphs
        self._logger, self._runtime, self._engine = loaded.logger, loaded.runtime, loaded.engine
        called = interface.contract, interface.names, interface.outputs, gpu.name, interface.profiles
        self._gate = Gate(str(path), Binding(*called, varied=interface.record is None))
        dtypes = {port.name: getattr(torch, port.dtype) for port in loaded.declared.tensors if not port.is_input}
        self._dtypes = {name: dtypes[name] for name in interface.outputs}
        self._executors: dict[str, Executor] = {}
        self._recorded: list[Executor] = []
        """Those in graphs that PyTorch captured: who changes a context changes its graph."""
        self._outputs: dict[Geometry, dict[str, Tensor]] = {}
        self._last: PlacedCall | None = None
        self._graph: tuple[PlacedCall, Callable[[], None]] | None = None
        self._get_executor("direct")

    @classmethod
    def open(
        cls,
        path: str | Path,
        *,
        contract: Contract | None = None,
        device: torch.device | str | None = None,
        graphs: bool = False,
        verify: bool = True,
    ) -> Self:
        """Open the engine at `path` on a GPU: `cuda:1`, or by default torch's current one.

        Without its record beside it `contract` says which model it is: its inputs are then found by name, shape and order, and
        every call is served that its profiles allow; precision is the engine's own. `verify` compares the file with the digest
        in the record, which reads all of it. Raises ContractError if the engine is not what record and contract say;
        ShapecheckError if it cannot be read or loaded, does not fit into the GPU's memory, or there is no TensorRT or GPU.
        """
        path = Path(path)
        record = find_record(path) if contract is not None else read_engine(path)
        target = record.request.options.target if record is not None else "trt"
        if record is not None and contract is not None and (wrong := compare_model(record.request.contract, contract)):
            raise ContractError(wrong, subject=f"{path} was built for another model", contract=contract)
        if graphs and target == "rtx":
            raise ShapecheckError(
                f"{path}: TensorRT for RTX captures no engine that was not built for it; open it without graphs"
            )
        data = map_engine(path, record if verify else None)
        trt, gpu = import_tensorrt(target), Gpu(device)
        with gpu.activate():
            gpu.require_memory(len(data), f"{path}: an engine of {len(data) / 2**30:.2f} GiB")
            loaded = load_engine(trt, path, record, data)
            if record is not None:
                interface = record.interface
            else:
                assert contract is not None  # else its record was read
                interface = _find_interface(path, loaded.declared, contract)
            return cls(path, interface, gpu, loaded, graphs=graphs)

    def __call__(self, inputs: Mapping[str, Tensor], *, own_outputs: bool = False) -> dict[str, Tensor]:
        """Return the outputs for these inputs; with `own_outputs` no other call writes there.

        Raises CallError, with all that is wrong, for a call that the engine cannot serve; ShapecheckError if TensorRT refuses
        it all the same, with TensorRT's own words, or if the session is closed or busy, or cannot be captured.
        """
        with self._gate.acquire():
            call = self._gate.serve(inputs)
            _kept, addresses = self._place(call, inputs)  # copies have to live until the work is queued
            with self._gpu.stream() as stream:
                outputs = self._run((call, addresses), stream)
            return copy_outputs(outputs) if own_outputs else outputs

    def close(self) -> None:
        """Wait for the GPU, and free the engine and its memory. Closing again is fine; a call afterwards is an error."""
        if not self._gate.is_open:
            return
        with self._gate.acquire():
            try:
                self._gpu.synchronize()
            finally:
                self._gate.close()
                self._last = self._graph = None
                self._executors.clear()
                self._recorded.clear()
                self._outputs.clear()
                self._engine = self._runtime = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _place(self, call: BoundCall, inputs: Mapping[str, Tensor]) -> tuple[list[Tensor], tuple[int, ...]]:
        """Return the tensors to bind, in the contract's order, and their addresses: copies of those that cannot be bound."""
        tensors = [inputs[name] for name in call.expected]
        addresses = [value.data_ptr() for value in tensors]
        outputs = self._outputs.get(call.geometry, {}).values()
        written = [range(output.data_ptr(), output.data_ptr() + output.nbytes) for output in outputs]
        inside = {address for memory in written for address in addresses if address in memory}
        for number, (value, address) in enumerate(zip(tensors, addresses, strict=True)):
            # IExecutionContext::setTensorAddress requires multiples of 256.
            if address % 256 or address in inside or not value.is_contiguous() or value.is_neg():
                tensors[number] = value.resolve_neg().clone(memory_format=torch.contiguous_format)
                addresses[number] = tensors[number].data_ptr()
        return tensors, tuple(addresses)

    def _run(self, call: PlacedCall, stream: int) -> dict[str, Tensor]:
        if self._gpu.is_capturing():
            executor = self._executors.get("direct")
            if executor is None or not executor.is_sized_for(call[0]):
                raise ShapecheckError(
                    f"{self._path}: PyTorch is capturing a CUDA graph, in which TensorRT cannot be set up: "
                    "call the session with these sizes just before, outside of the capture"
                )
            self._bind(executor, call, stream)
            executor.execute(stream)
            self._recorded += [executor] if executor not in self._recorded else []
            return dict(self._outputs[call[0].geometry])
        if self._executors.get("direct") in self._recorded:
            del self._executors["direct"]

        if self._graph is not None and self._graph[0] == call:
            self._graph[1]()
        else:
            again = self._graphs and self._last == call
            # forgotten first: if this call fails, the next one starts anew
            self._graph = self._last = None
            executor = self._get_executor("graph" if again else "direct")
            self._bind(executor, call, stream)
            executor.execute(stream)
            if again:
                self._graph = call, self._gpu.capture(partial(executor.execute, stream))
            self._last = call
        return dict(self._outputs[call[0].geometry])

    def _bind(self, executor: Executor, placed: PlacedCall, stream: int) -> None:
        if executor.bound == placed:
            return
        call, addresses = placed
        executor.set_shapes(call, stream)
        if call.geometry not in self._outputs:
            shapes = {name: executor.output_shape(name) for name in self._dtypes}
            for name, shape in shapes.items():
                expected = call.outputs.get(name, shape)
                if DYNAMIC in shape or shape != expected:
                    right = show(expected) if DYNAMIC not in expected else "sizes known before the call"
                    raise ShapecheckError(f"{self._path}: {name} is {show(shape)} at {call.geometry}, expected {right}")
            self._outputs[call.geometry] = {
                name: self._gpu.allocate(shape, self._dtypes[name]) for name, shape in shapes.items()
            }
        outputs = {name: output.data_ptr() for name, output in self._outputs[call.geometry].items()}
        executor.set_addresses(self._gate.binding.addresses(dict(zip(call.expected, addresses, strict=True)), outputs))
        executor.bound = placed

    def _get_executor(self, kind: str) -> Executor:
        if kind not in self._executors:
            scratch = self._engine.device_memory_size_v2
            self._gpu.require_memory(scratch, f"{self._path}: the scratch memory of a context")
            context = self._engine.create_execution_context()
            if context is None:
                raise build_refusal(f"make a context of {self._path}", self._logger, "is there enough memory on the GPU?")
            self._executors[kind] = Executor(context, self._logger)
        return self._executors[kind]


def _find_interface(path: Path, declared: DeclaredEngine, contract: Contract) -> EngineInterface:
    """Return how an engine without a record is called. Raises ContractError if it cannot be called as the model is."""
    # Imported now, with onnx and onnxscript behind it: models in PyTorch and engines with a record never need them.
    from shapecheck.tensorrt.foreign_engine import match_engine

    found = match_engine(declared, contract)
    if contract.role == "unet" and contract.slots and not found.has_slots:
        found = match_engine(declared, replace(contract, slots=()))
        _log.warning("%s has no input for a ControlNet's residuals: it is served without them", path)
    if found.refusals:
        raise ContractError(found.refusals, subject=f"{path} is not this model", contract=contract)
    for note in found.notes:
        _log.info("%s: %s", path, note)
    for doubt in filter(None, (found.unsure, *found.faults)):
        _log.warning("%s: %s", path, doubt)
    return found.interface
