"""Call a UNet or ControlNet that torch.compile compiled, on a GPU as CUDA graphs of our own: every call is checked first."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from importlib.metadata import version
from pathlib import Path
from types import FunctionType
from typing import Any, Self

import torch
from torch import Tensor, nn

from shapecheck.contract import Contract, Geometry, ShapecheckError
from shapecheck.contract.errors import one_line
from shapecheck.files import atomic_write
from shapecheck.models.forward_call import build_arguments, unwrap_compiled
from shapecheck.runtime.binding import Binding, BoundCall
from shapecheck.runtime.call_gate import Gate
from shapecheck.runtime.compiled_model import CompiledModel
from shapecheck.runtime.torch_session import forbid_tf32, output_names
from shapecheck.version import __version__

_Run = Callable[..., tuple[Tensor, ...]]
OPTIONS: Mapping[str, Any] = {
    "conv_1x1_as_mm": True,
}
_OF_EVERY_MODULE = vars(nn.Module()).keys()
_log = logging.getLogger(__name__)
compiled_code: dict[str, _Run] = {}
"""What was compiled in this process: a model of the same structure runs the same code with its own weights."""


class _Forward(nn.Module):
    """A model's forward from tensors in the contract's order to a tuple of its outputs."""

    def __init__(self, model: CompiledModel, contract: Contract) -> None:
        super().__init__()
        self.model, self.is_unet = model, contract.role == "unet"
        names = list(contract.input_rules)
        # the same call with numbers in the tensors' place: torch.compile reads plain values more easily than a contract
        self.arguments = build_arguments(contract, {name: number for number, name in enumerate(names)})

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        first, *rest = self.model(**_fill(self.arguments, tensors))
        return (first,) if self.is_unet else (*first, *rest)


def _fill(template: Any, tensors: tuple[Tensor, ...]) -> Any:
    if isinstance(template, dict):
        return {key: _fill(value, tensors) for key, value in template.items()}
    if isinstance(template, list):
        return [_fill(value, tensors) for value in template]
    return tensors[template] if isinstance(template, int) else template


class CompiledSession:
    """A UNet or ControlNet on the device of its weights, compiled by torch.compile for each size at its first call.

    Call it with a tensor for every input of the contract, by the contract's names; it returns a tensor for every output.
    On a GPU each size is captured into a CUDA graph: a call copies its inputs to where the graph reads them and replays it, on
    torch's current stream. The outputs are kept, and written again by every call of that size: clone what is to be kept.
    The weights are those of the module when it was opened.

    `cache` is a folder that keeps what was compiled; another process with the same model finds it there in seconds. Trust it
    as you trust a program: what is in it is run. `compiler` is a backend of torch.compile. If it is to be compared, the session
    computes `exactly`: on a GPU not in TF32. A refused call changes nothing for the next one. Two calls at once are an error:
    open a session for each thread.
    """

    provider = "torch.compile"

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
        self.reuses_outputs = self.device.type == "cuda"
        self.detail = f"torch {torch.__version__}" + (", TF32 off" if exactly and self.device.type != "cpu" else "")
        self._forward: _Forward | None = _Forward(CompiledModel(module), contract)
        self._cache, self._compiler, self._exactly = cache, compiler, exactly
        self._identity = f"{digest_structure(self._forward)} {_describe_makers(self.device, compiler)} exactly {exactly}"
        self._names = output_names(contract)
        names = tuple((rule, rule) for rule in contract.input_rules)
        self._gate = Gate(name or type(module).__name__, Binding(contract, names, self._names, str(self.device)))
        self._graphs: dict[Geometry, _Graph] = {}
        self._pool: Any = None
        self._last: Any = None

    def __call__(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the outputs for these inputs.

        Raises CallError, with all that is wrong, for a call that does not fit the contract; ShapecheckError if the session is
        closed or busy, or PyTorch cannot compile the model.
        """
        with self._gate.acquire():
            call = self._gate.serve(inputs)
            tensors = [inputs[name] for name in call.expected]
            with forbid_tf32() if self._exactly else nullcontext():
                if self.device.type != "cuda":
                    outputs = self._run(call, tensors)
                elif torch.cuda.is_current_stream_capturing():
                    outputs = self._run_captured(call, tensors)
                else:
                    outputs = self._replay(call, tensors)
            return dict(zip(self._names, outputs, strict=True))

    def close(self) -> None:
        """Free the model and its graphs. Closing again is fine; a call afterwards is an error."""
        if self._gate.is_open:
            with self._gate.acquire():
                self._gate.close()
                if self._last is not None:
                    self._last.synchronize()
                self._graphs.clear()
                self._forward = self._pool = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _replay(self, call: BoundCall, tensors: list[Tensor]) -> tuple[Tensor, ...]:
        with torch.cuda.device(self.device), torch.no_grad():
            current = torch.cuda.current_stream()
            if self._last not in (None, current):
                current.wait_stream(self._last)  # the graph's memory is one: calls on several streams take turns
            self._last = current
            if (graph := self._graphs.get(call.geometry)) is None:
                graph = self._graphs[call.geometry] = self._capture(call, tensors)
            graph.copy_inputs(tensors)
            graph.replay()
        return graph.outputs

    def _capture(self, call: BoundCall, tensors: list[Tensor]) -> _Graph:
        with _plain_mode(self.device), _choose_kernels():
            inputs = [_allocate_like(tensor) for tensor in tensors]
            torch._foreach_copy_(inputs, tensors)
            run = self._compile(call, inputs)
            side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                run(self._forward, *inputs)  # kernels are chosen and loaded now, which a capture does not allow
            torch.cuda.current_stream().wait_stream(side)
            if self._pool is None:
                self._pool = torch.cuda.graph_pool_handle()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
                outputs = run(self._forward, *inputs)
        return _Graph(graph, inputs, outputs)

    def _run_captured(self, call: BoundCall, tensors: list[Tensor]) -> tuple[Tensor, ...]:
        """Run within a graph that the caller captures, whose own memory the outputs then are in."""
        if call.geometry not in self._graphs:
            raise ShapecheckError(f"{call.geometry} was not called before this capture: call it once, it is compiled then")
        return self._run(call, tensors)

    def _run(self, call: BoundCall, tensors: list[Tensor]) -> tuple[Tensor, ...]:
        with _plain_mode(self.device):
            # compiled code takes the layout that it was compiled for
            laid_out = [tensor.contiguous(memory_format=_choose_order(tensor)) for tensor in tensors]
            return self._compile(call, laid_out)(self._forward, *laid_out)

    def _compile(self, call: BoundCall, tensors: list[Tensor]) -> _Run:
        key = hashlib.sha256(f"{self._identity} {call.geometry!r}".encode()).hexdigest()
        if key not in compiled_code:
            file = self._cache / f"compiled-{key[:16]}.bin" if self._cache is not None else None
            compiled_code[key] = _load(file) or compile_forward(self._forward, tensors, file, self._compiler)
        return compiled_code[key]


class _Graph:
    """A CUDA graph of one size, and the tensors that it reads and writes."""

    def __init__(self, graph: Any, inputs: list[Tensor], outputs: tuple[Tensor, ...]) -> None:
        self._inputs, self.outputs, self.replay = inputs, outputs, graph.replay

    def copy_inputs(self, tensors: list[Tensor]) -> None:
        by_dtype: dict[torch.dtype, tuple[list[Tensor], list[Tensor]]] = {}
        for ours, given in zip(self._inputs, tensors, strict=True):
            if ours.stride() != given.stride():
                ours.copy_(given)  # among the others it would make each a kernel of its own
                continue
            targets, sources = by_dtype.setdefault(given.dtype, ([], []))
            targets.append(ours)
            sources.append(given)
        for targets, sources in by_dtype.values():
            torch._foreach_copy_(targets, sources)


def _allocate_like(tensor: Tensor) -> Tensor:
    return torch.empty_like(tensor, memory_format=_choose_order(tensor))


def _choose_order(tensor: Tensor) -> torch.memory_format:
    """Return how an input lies in memory: an image or residual on a GPU with its channels last, as the kernels read it."""
    return torch.channels_last if tensor.is_cuda and tensor.dim() == 4 else torch.contiguous_format


def compile_forward(forward: nn.Module | None, tensors: list[Tensor], file: Path | None, compiler: str) -> _Run:
    """Compile a forward for these tensors, and keep what comes of it in a file. Raises ShapecheckError if PyTorch cannot."""
    # a copy of the code, for PyTorch counts what it compiles for one and stops at eight
    function = FunctionType(_Forward.forward.__code__.replace(), globals())
    options = dict(OPTIONS) if compiler == "inductor" else {}
    try:
        if hasattr(torch.compiler, "load_compiled_function"):  # since PyTorch 2.9
            try:
                return _compile_ahead(function, forward, tensors, file, compiler, options)
            except Exception as error:
                # it is experimental there; what cannot be kept is compiled at every start
                _log.warning("what is compiled cannot be kept for the next start: %s", one_line(str(error), longest=200))
        run: _Run = torch.compile(function, fullgraph=True, dynamic=False, backend=compiler, options=options or None)
        run(forward, *tensors)
    except Exception as error:  # a compiler may raise anything
        reason = one_line(str(error) or type(error).__name__, longest=600)
        raise ShapecheckError(f"torch.compile cannot compile this model: {reason}") from error
    return run


def _compile_ahead(
    function: Callable[..., Any],
    forward: nn.Module | None,
    tensors: list[Tensor],
    file: Path | None,
    compiler: str,
    options: Mapping[str, Any],
) -> _Run:
    """Compile a function into one that needs no tracing when it is read from a file again."""
    # what a guard would look at, the session has checked: shapes, dtypes and devices, at each call
    unguarded = {**options, "guard_filter_fn": lambda guards: [False for _ in guards]}
    config: Any = torch._dynamo.config
    with config.patch(enable_aot_compile=True) if hasattr(config, "enable_aot_compile") else nullcontext():
        compiled: Any = torch.compile(function, fullgraph=True, dynamic=False, backend=compiler, options=unguarded)
        ahead = compiled.aot_compile(((forward, *tensors), {}))
    if file is not None:
        try:
            with atomic_write(file) as partial:
                ahead.save_compiled_function(str(partial))
        except Exception as error:  # a full disk, or something in the model that PyTorch cannot write: it runs all the same
            _log.warning("%s cannot be written, and is compiled again in the next process: %s", file, one_line(error, 200))
    run: _Run = ahead
    return run


def _load(file: Path | None) -> _Run | None:
    """Return what another process compiled, or None if it cannot be used here."""
    if file is None or not file.is_file():
        return None
    try:
        with file.open("rb") as stream:
            return torch.compiler.load_compiled_function(stream)
    except Exception as error:
        _log.warning("%s cannot be loaded, and is compiled again: %s", file, one_line(str(error), longest=200))
        return None


def _describe_makers(device: torch.device, compiler: str) -> str:
    """Return what compiled code depends on beside the model."""
    place = f"cpu {torch.backends.cpu.get_cpu_capability()}"
    if device.type == "cuda":
        place = f"{torch.cuda.get_device_name(device)} {torch.cuda.get_device_capability(device)} cuda {torch.version.cuda}"
    makers = f"shapecheck {__version__}, torch {torch.__version__}, diffusers {version('diffusers')}"
    return f"{makers}, {place}, {compiler} {sorted(map(str, OPTIONS.items()))}"


def digest_structure(module: nn.Module) -> str:
    """Return a digest of everything but the weights and whether it is trained: modules, settings, forms of parameters."""
    layers = []
    for name, layer in module.named_modules():
        settings = [f"{key}={_describe(value)}" for key, value in vars(layer).items() if key not in _OF_EVERY_MODULE]
        hooks = [*layer._forward_pre_hooks.values(), *layer._forward_hooks.values()]
        layers.append((name, type(layer).__qualname__, sorted(settings), _describe(hooks)))
    places: dict[int, int] = {}  # which of them are one tensor
    tensors = [*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False)]
    forms = [
        (name, tuple(value.shape), value.stride(), str(value.dtype), places.setdefault(id(value), len(places)))
        for name, value in tensors
    ]
    return hashlib.sha256(repr((layers, forms)).encode()).hexdigest()


def _describe(value: Any, depth: int = 4) -> str:
    """Return a text for a setting of a module that is the same in every process; of an object its class and attributes."""
    if value is None or isinstance(value, bool | int | float | str | torch.dtype | torch.device):
        return repr(value)
    if isinstance(value, Mapping):
        # names of folders and versions say nothing of the computation
        return repr([(str(key), _describe(value[key], depth)) for key in value if not str(key).startswith("_")])
    if isinstance(value, list | tuple):
        return repr([_describe(entry, depth) for entry in value])
    name = getattr(value, "__qualname__", type(value).__qualname__)
    if isinstance(value, type | nn.Module | Tensor) or not hasattr(value, "__dict__") or not depth:
        return name
    return name + "".join(f" {key}={_describe(entry, depth - 1)}" for key, entry in sorted(vars(value).items()))


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
