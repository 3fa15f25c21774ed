"""An engine as a function of torch tensors: every call is checked before it runs, and tensors are bound where they lie."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Self

import torch
from torch import Tensor

from shapecheck.contract import Contract, Geometry, ShapecheckError, show
from shapecheck.runtime.binding import Binding, BoundCall
from shapecheck.runtime.engine_loading import Loaded, import_tensorrt, load_engine, map_engine
from shapecheck.runtime.executor import Executor, PlacedCall, build_refusal
from shapecheck.runtime.gate import Gate
from shapecheck.runtime.gpu import Gpu
from shapecheck.tensorrt.engine_io import DYNAMIC
from shapecheck.tensorrt.record import Engine, read_engine

_ALIGNMENT = 256
"""Every address is a multiple of it: IExecutionContext::setTensorAddress asks for that."""


class EngineSession:
    """An engine on one GPU. `EngineSession.open(path)` makes one; `close()` or the end of a `with` gives its memory back.

    Call it with a tensor for every input of the contract, by the contract's names; it returns a tensor for every output, by
    the engine's names. Nothing is filled in, converted or moved: ControlNet off means zeros given for every slot. A tensor is
    bound where it lies; only one that is not contiguous, begins at no multiple of 256 bytes, or lies in this session's own
    output of that size is copied first.

    The outputs are allocated once a size, kept, and written again by every call of that size: clone what is to be kept.
    A call returns when its work is queued on torch's current stream, or in step with it: what that stream does next sees the
    results, and may change or free what was given.

    With `graphs` the second call in a row with the same sizes at the same addresses is captured into a CUDA graph, which is
    replayed until a call differs. It has a context of its own, and so scratch memory of its own.

    After a refused call the next one is served as if it had not been. Two calls at once are an error: open a session a thread.
    """

    def __init__(self, path: Path, record: Engine, gpu: Gpu, loaded: Loaded, *, graphs: bool) -> None:
        self.device, self.reuses_outputs = torch.device(gpu.name), True
        self.record = record
        """What travels beside the engine: contract, profiles, and all it was built from."""
        self._path, self._gpu, self._graphs = path, gpu, graphs
        self._logger, self._runtime, self._engine = loaded.logger, loaded.runtime, loaded.engine
        self._gate = Gate(str(path), Binding(record.request, gpu.name))
        self._dtypes = {each.name: getattr(torch, each.dtype) for each in loaded.seen.tensors if not each.is_input}
        self._executors: dict[str, Executor] = {}
        self._outputs: dict[Geometry, dict[str, Tensor]] = {}
        self._last: PlacedCall | None = None
        self._graph: tuple[PlacedCall, Callable[[], None]] | None = None
        self._executor("direct")

    @classmethod
    def open(
        cls, path: str | Path, *, device: torch.device | str | None = None, graphs: bool = False, verify: bool = True
    ) -> Self:
        """Open the engine at `path`, whose record lies beside it, on a GPU: `cuda:1`, or by default torch's current one.

        `verify` compares the file with the digest in the record, which reads all of it. Raises ContractError where the
        engine is not what its record says; ShapecheckError where either is missing or damaged, or TensorRT or the GPU is.
        """
        path = Path(path)
        record = read_engine(path)
        request = record.request
        if graphs and request.options.target == "rtx":
            raise ShapecheckError(
                f"{path}: TensorRT for RTX captures no engine that was not built for it; open it without graphs"
            )
        data = map_engine(path, record, verify=verify)
        trt = import_tensorrt(request.options.target)
        gpu = Gpu(device)
        with gpu.here():
            loaded = load_engine(trt, path, record, data)
            return cls(path, record, gpu, loaded, graphs=graphs)

    @property
    def contract(self) -> Contract:
        """What the engine takes."""
        return self.record.request.contract

    def __call__(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The outputs for these inputs.

        Raises CallError, with all that is wrong, for a call that the engine cannot serve; ShapecheckError where TensorRT
        refuses it all the same, with TensorRT's own words, or where the session is closed or busy.
        """
        with self._gate.alone():
            serving = self._gate.serve(inputs)
            _kept, addresses = self._placed(serving, inputs)  # copies have to live until the work is queued
            with self._gpu.stream() as stream:
                return self._run((serving, addresses), stream)

    def close(self) -> None:
        """Wait for the GPU, and give back the engine and its memory. Closing again is fine; a call afterwards is an error."""
        if not self._gate.is_open:
            return
        with self._gate.alone():
            try:
                self._gpu.settle()
            finally:
                self._gate.shut()
                self._last = self._graph = None
                self._executors.clear()
                self._outputs.clear()
                self._engine = self._runtime = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def _placed(self, serving: BoundCall, inputs: Mapping[str, Tensor]) -> tuple[list[Tensor], tuple[int, ...]]:
        """The tensors to bind, in the contract's order, and where they lie: copies of those that cannot be bound there."""
        tensors = [inputs[name] for name in serving.given]
        places = [each.data_ptr() for each in tensors]
        own = [
            range(each.data_ptr(), each.data_ptr() + each.nbytes) for each in self._outputs.get(serving.geometry, {}).values()
        ]
        inside = {address for written in own for address in places if address in written}
        for number, (each, address) in enumerate(zip(tensors, places, strict=True)):
            if address % _ALIGNMENT or address in inside or not each.is_contiguous():
                tensors[number] = each.clone(memory_format=torch.contiguous_format)
                places[number] = tensors[number].data_ptr()
        return tensors, tuple(places)

    def _run(self, call: PlacedCall, stream: int) -> dict[str, Tensor]:
        if self._graph is not None and self._graph[0] == call:
            self._graph[1]()
        else:
            again = self._graphs and self._last == call
            self._graph = self._last = None
            executor = self._executor("graph" if again else "direct")
            self._bind(executor, call, stream)
            executor.execute(stream)
            if again:
                self._graph = call, self._gpu.capture(partial(executor.execute, stream))
            self._last = call
        return dict(self._outputs[call[0].geometry])

    def _bind(self, executor: Executor, call: PlacedCall, stream: int) -> None:
        if executor.bound == call:
            return
        serving, addresses = call
        executor.shape(serving, stream)
        if serving.geometry not in self._outputs:
            self._outputs[serving.geometry] = self._allocated(executor, serving)
        outputs = {name: each.data_ptr() for name, each in self._outputs[serving.geometry].items()}
        executor.place(self._gate.binding.addresses(dict(zip(serving.given, addresses, strict=True)), outputs))
        executor.bound = call

    def _allocated(self, executor: Executor, serving: BoundCall) -> dict[str, Tensor]:
        shapes = {name: executor.output_shape(name) for name in self._dtypes}
        for name, shape in shapes.items():
            expected = serving.outputs.get(name, shape)
            if DYNAMIC in shape or shape != expected:
                told = show(expected) if DYNAMIC not in expected else "sizes known before the call"
                raise ShapecheckError(f"{self._path}: {name} is {show(shape)} at {serving.geometry}, expected {told}")
        return {name: self._gpu.empty(shape, self._dtypes[name]) for name, shape in shapes.items()}

    def _executor(self, kind: str) -> Executor:
        if kind not in self._executors:
            context = self._engine.create_execution_context()
            if context is None:
                raise build_refusal(f"make a context of {self._path}", self._logger, "is there enough memory on the GPU?")
            self._executors[kind] = Executor(context, self._logger)
        return self._executors[kind]
