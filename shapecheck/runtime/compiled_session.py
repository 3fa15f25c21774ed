"""Call a UNet or ControlNet that torch.compile compiled, on a GPU as CUDA graphs of our own: every call is checked first."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from functools import partial
from itertools import compress
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn

from shapecheck.contract import Contract, Geometry, ShapecheckError
from shapecheck.contract.errors import one_line
from shapecheck.models.forward_call import unwrap_compiled
from shapecheck.runtime.binding import Binding, BoundCall
from shapecheck.runtime.call_gate import Gate, copy_outputs
from shapecheck.runtime.compiled_code import Compiler, Forward
from shapecheck.runtime.compiled_graphs import CapturedCall, choose_order, reads_late
from shapecheck.runtime.compiled_model import CompiledModel
from shapecheck.runtime.gpu import Gpu
from shapecheck.runtime.torch_session import forbid_tf32, output_names

_log = logging.getLogger(__name__)


class CompiledSession:
    """A UNet or ControlNet on the device of its weights, compiled by torch.compile for each size at its first call.

    Call it with a tensor for every input of the contract, by the contract's names; it returns a tensor for every output.
    On a GPU each size is captured into CUDA graphs: a call copies its inputs to where the graphs read them and replays them, in
    step with torch's current stream. The outputs are kept, and written again by every call of that size: clone what is to be
    kept. The weights are those of the module when it was opened.

    `cache` is a folder that keeps what was compiled; another process with the same model finds it there in seconds. Trust it
    as you trust a program: what is in it is run. `compiler` is a backend of torch.compile. If it is to be compared, the session
    computes `exactly`: on a GPU not in TF32. A refused call changes nothing for the next one. Two calls at once are an error:
    open a session for each thread.
    """

    provider = "torch.compile"
    begins_early = True
    """A UNet reads its residuals late, and may be called before a ControlNet has made them: see `ready`."""

    def __init__(
        self,
        module: nn.Module,
        contract: Contract,
        name: str = "",
        *,
        cache: Path | None = None,
        compiler: str = "inductor",
        exactly: bool = False,
    ) -> None:
        module = unwrap_compiled(module)
        self.contract, self.device = contract, next(module.parameters()).device
        self.detail = f"torch {torch.__version__}" + (", TF32 off" if exactly and self.device.type != "cpu" else "")
        self._gpu = Gpu(self.device) if self.device.type == "cuda" else None
        self.reuses_outputs = self._gpu is not None
        self._forward: Forward | None = Forward(CompiledModel(module, marks_residuals=self._gpu is not None), contract)
        self._compiler = Compiler(self._forward, self.device, compiler, cache, f"exactly {exactly}")
        self._exactly, self._names = exactly, output_names(contract)
        names = tuple((rule, rule) for rule in contract.input_rules)
        self._gate = Gate(name or type(module).__name__, Binding(contract, names, self._names, str(self.device)))
        slots = {slot.name for slot in contract.slots} if contract.role == "unet" else set()
        self._late = [name in slots for name in contract.input_rules]
        self._captured: dict[Geometry, CapturedCall] = {}
        self._pool: Any = None

    def __call__(
        self, inputs: Mapping[str, Tensor], *, ready: torch.cuda.Event | None = None, own_outputs: bool = False
    ) -> dict[str, Tensor]:
        """Return the outputs for these inputs; with `own_outputs` no other call writes there.

        What is not a residual was there at `ready`, and may be read from then on.

        Raises CallError, with all that is wrong, for a call that does not fit the contract; ShapecheckError if the session is
        closed or busy, or PyTorch cannot compile the model.
        """
        with self._gate.acquire():
            call = self._gate.serve(inputs)
            tensors = [inputs[name] for name in call.expected]
            with forbid_tf32() if self._exactly else nullcontext():
                if self._gpu is None:
                    outputs = self._run(tensors)
                elif self._gpu.is_capturing():
                    outputs = self._run_captured(call, tensors)
                else:
                    outputs = self._replay(self._gpu, call, tensors, ready)
            named = dict(zip(self._names, outputs, strict=True))
            return copy_outputs(named) if own_outputs and self.reuses_outputs else named

    @contextmanager
    def begin_after(self, ready: torch.cuda.Event) -> Iterator[None]:
        """Compute on its own stream for the length of a `with`, after `ready` and not after what else is queued."""
        if self._gpu is not None:
            with self._gpu.begin_after(ready):
                yield

    def close(self) -> None:
        """Free the model and its graphs. Closing again is fine; a call afterwards is an error."""
        if self._gate.is_open:
            with self._gate.acquire():
                self._gate.close()
                if self._captured and self._gpu is not None:
                    self._gpu.synchronize()
                self._captured.clear()
                self._forward = self._pool = None
                del self._compiler

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _replay(self, gpu: Gpu, call: BoundCall, tensors: list[Tensor], ready: torch.cuda.Event | None) -> tuple[Tensor, ...]:
        captured = self._captured.get(call.geometry)
        with torch.no_grad(), gpu.stream(own=True, ready=ready if captured is not None else None):
            if captured is None:
                captured = self._captured[call.geometry] = self._capture(tensors)
            return captured.replay(tensors, gpu.wait_for_caller)

    def _capture(self, tensors: list[Tensor]) -> CapturedCall:
        with _plain_mode(self.device), _choose_kernels():
            inputs = [torch.empty_like(tensor, memory_format=choose_order(tensor)) for tensor in tensors]
            for ours, given in zip(inputs, tensors, strict=True):
                ours.copy_(given)
            run = self._compiler.compile(inputs)
            launch = partial(run, self._forward, *inputs)
            # this chooses and loads the kernels too, which a capture does not allow
            is_late = reads_late(launch, list(compress(inputs, self._late)))
            if self._pool is None:
                self._pool = torch.cuda.graph_pool_handle()
            if is_late:
                try:
                    return CapturedCall(launch, inputs, self._late, self._pool)
                except RuntimeError as error:
                    _log.warning("a UNet that does not begin before its residuals are there: %s", one_line(str(error), 200))
            try:
                return CapturedCall(launch, inputs, [False] * len(inputs), self._pool)
            except RuntimeError as error:
                raise ShapecheckError(f"cannot capture a CUDA graph: {one_line(str(error), 400)}") from error

    def _run_captured(self, call: BoundCall, tensors: list[Tensor]) -> tuple[Tensor, ...]:
        """Run within a graph that the caller captures, whose own memory the outputs then are in."""
        if call.geometry not in self._captured:
            raise ShapecheckError(f"{call.geometry} was not called before this capture: call it once, it is compiled then")
        return self._run(tensors)

    def _run(self, tensors: list[Tensor]) -> tuple[Tensor, ...]:
        with _plain_mode(self.device):
            # compiled code takes the layout that it was compiled for
            laid_out = [tensor.contiguous(memory_format=choose_order(tensor)) for tensor in tensors]
            return self._compiler.compile(laid_out)(self._forward, *laid_out)


@contextmanager
def _plain_mode(device: torch.device) -> Iterator[None]:
    """Switch off what code is not compiled for: gradients, inference mode, autocast."""
    with torch.inference_mode(False), torch.no_grad(), torch.autocast(device.type, enabled=False):
        yield


@contextmanager
def _choose_kernels() -> Iterator[None]:
    """Let cuDNN time its convolutions and keep the fastest, for as long as a size is prepared."""
    before = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = True
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before
