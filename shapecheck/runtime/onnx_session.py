"""Run an ONNX file in ONNX Runtime with torch tensors, on the provider that was requested and no other."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor

from shapecheck import extras
from shapecheck.contract import ShapecheckError
from shapecheck.contract.naming import ONNX_NUMBERS, torch_name
from shapecheck.runtime.gpu import Gpu

_log = logging.getLogger(__name__)
PROVIDERS = {
    "ort": "CPUExecutionProvider",
    "ort-cuda": "CUDAExecutionProvider",
    "ort-trt": "TensorrtExecutionProvider",
}
_ELEMENTS = {getattr(torch, name): number for name, number in ONNX_NUMBERS.items()}
_GRAPH_OPTIONS = {"ort-cuda": "enable_cuda_graph", "ort-trt": "trt_cuda_graph_enable"}
_OWN_OPTIONS = frozenset(("user_compute_stream", "has_user_compute_stream", *_GRAPH_OPTIONS.values()))
"""Options of providers that decide how a session has to call them."""
_ALIGNMENT = 256
"""The addresses of ONNX Runtime's own memory on a GPU are multiples of this: its kernels may read several numbers at once."""
_SERIES = 64
"""The length of a series of calls in which one waits for the GPU: only then are buffers in pinned memory given back."""


class _Static(NamedTuple):
    """A CUDA graph of ONNX Runtime's, and the memory that it reads and writes."""

    binding: Any
    options: Any
    inputs: Mapping[str, Tensor]
    outputs: Mapping[str, Tensor]


class OnnxSession:
    """An ONNX file on one provider. `OnnxSession.open(path)` makes one.

    Call it with a tensor for every input, by the file's names; it returns a tensor for every output, by the file's names.
    Every call reads the inputs as they are then: at their own addresses, or copies of those that lie on another device, are
    not contiguous, do not begin at a multiple of 256 bytes on a GPU, or lie in an output. Outputs go into the tensors that the
    caller passes, or into new ones on the CPU.

    On a GPU it runs on a stream of its own, in step with torch's current one: what that does next sees the results, and may
    change or free the inputs. With `graphs` the first call of a size is captured into a CUDA graph, which the next ones of
    that size replay with copies of their inputs. It writes into the outputs that the first call passed; those of another call
    are copied from there.
    """

    def __init__(
        self, session: Any, backend: str, device: torch.device, detail: str = "", gpu: Gpu | None = None, graphs: bool = False
    ) -> None:
        self.backend = backend
        self.detail = detail
        """The version of ONNX Runtime, and whether TF32 is off."""
        self.device = device
        """The device that inputs should be on; those on another are copied."""
        self._session, self._gpu, self._graphs = session, gpu, graphs
        self.inputs = tuple(port.name for port in session.get_inputs())
        self.outputs = tuple(port.name for port in session.get_outputs())
        self._places = _find_places(session, device) if device.type != "cpu" else dict.fromkeys(self.inputs, device)
        self._calls, self._static = count(1), dict[object, _Static]()
        self._unsynchronized = _make_options("disable_synchronize_execution_providers", "1") if gpu is not None else None
        if graphs and (read := [name for name, place in self._places.items() if place != device]):
            raise ShapecheckError(
                f"{', '.join(read)}: read by the CPU, so that a CUDA graph would keep the first value; open it without graphs"
            )

    @classmethod
    def open(
        cls,
        model: Path | bytes,
        *,
        backend: str = "ort",
        folder: Path | None = None,
        device: int = 0,
        options: Mapping[str, str] | None = None,
        strict: bool = True,
        graphs: bool = False,
    ) -> Self:
        """Open a file, or a model's bytes whose weights are in files below `folder`.

        `options` go to the provider. With `strict` another provider than that of `backend` is an error: ONNX Runtime falls
        back to the CPU in silence. Raises ShapecheckError if ONNX Runtime is missing or refuses the file, or with `graphs` if
        it cannot be captured.
        """
        try:
            import onnxruntime
        except ModuleNotFoundError as error:
            raise extras.explain_missing(error, "running an ONNX file") from None
        if backend != "ort":
            if hasattr(onnxruntime, "preload_dlls"):
                onnxruntime.preload_dlls()  # CUDA as pip installs it is not where the loader looks
            onnxruntime.set_default_logger_severity(4)  # plans that cuDNN cannot run fill the screen, and others are taken
        settings = onnxruntime.SessionOptions()
        settings.log_severity_level = 4  # what goes wrong is raised; its log would say it twice
        # else its threads slow down what PyTorch computes after a call
        settings.add_session_config_entry("session.intra_op.allow_spinning", "0")
        gpu = Gpu(f"cuda:{device}") if backend != "ort" and torch.cuda.is_available() else None
        chosen = _choose_options(backend, device, options or {}, gpu, graphs=graphs)
        try:
            source, folder = _read_source(model, folder, backend)
            if folder is not None:
                key = "session.model_external_initializers_file_folder_path"
                settings.add_session_config_entry(key, str(folder.absolute()))
            session, is_fused = _create_session(model, source, settings, [(PROVIDERS[backend], chosen)])
        except Exception as error:  # its classes of errors are not public
            name, reason = "the model" if isinstance(model, bytes) else model, _shorten(error)
            if graphs and "graph capture" in reason:
                reason += "; open it without graphs"
            raise ShapecheckError(f"ONNX Runtime cannot load {name}: {reason}") from None
        provider = str(session.get_providers()[0])
        if strict and provider != PROVIDERS[backend]:
            raise ShapecheckError(
                f"{backend} was requested and ONNX Runtime fell back to {provider}; "
                f"`shapecheck doctor --require {backend}` says why"
            )
        detail = f"onnxruntime {onnxruntime.__version__}" + (", TF32 off" if chosen.get("use_tf32") == "0" else "")
        detail += ", attention fused" if is_fused else ""
        if provider == PROVIDERS["ort"]:
            return cls(session, backend, torch.device("cpu"), detail)
        gpu = gpu or Gpu(None)  # which says that PyTorch sees none
        return cls(session, backend, torch.device(gpu.name), detail, gpu, graphs)

    @property
    def provider(self) -> str:
        """Return the provider that really runs; those after it only run what it cannot."""
        return str(self._session.get_providers()[0])

    def dtypes(self) -> dict[str, str]:
        """Return the dtype of every input and output, as torch calls it."""
        return {
            value.name: torch_name(value.type.removeprefix("tensor(").removesuffix(")"))
            for value in (*self._session.get_inputs(), *self._session.get_outputs())
        }

    def __call__(self, inputs: Mapping[str, Tensor], outputs: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
        """Return the outputs for these inputs; those named in `outputs` are written there.

        Raises ShapecheckError with ONNX Runtime's own words if it cannot run, if an output is not contiguous, or if PyTorch is
        capturing a CUDA graph.
        """
        if self._gpu is not None and self._gpu.is_capturing():
            raise ShapecheckError(
                "PyTorch is capturing a CUDA graph, of which a call of ONNX Runtime cannot be a part: call it outside of that, "
                "or capture an engine"
            )
        written = dict(outputs or {})
        if apart := [name for name, tensor in written.items() if not tensor.is_contiguous()]:
            raise ShapecheckError(f"{', '.join(apart)}: ONNX Runtime writes in one piece; pass contiguous tensors for outputs")
        try:
            with self._gpu.stream(own=True) if self._gpu is not None else nullcontext():
                return self._replay(inputs, written) if self._graphs else self._run(inputs, written)
        except ShapecheckError:
            raise
        except Exception as error:
            raise ShapecheckError(f"ONNX Runtime cannot run this call: {_shorten(error)}") from None

    def _run(self, inputs: Mapping[str, Tensor], written: Mapping[str, Tensor]) -> dict[str, Tensor]:
        placed = {name: self._place(name, tensor, written.values()) for name, tensor in inputs.items()}
        binding = self._bind(placed, written)
        # what ONNX Runtime itself brings to the CPU is there only when it has waited for the GPU
        waits = any(name not in written or written[name].device != self.device for name in self.outputs)
        waits |= next(self._calls) % _SERIES == 0
        self._session.run_with_iobinding(binding, None if waits else self._unsynchronized)
        if written.keys() >= set(self.outputs):
            return dict(written)
        results = dict(zip(self.outputs, binding.get_outputs(), strict=True))
        return {name: written[name] if name in written else torch.from_numpy(value.numpy()) for name, value in results.items()}

    def _replay(self, inputs: Mapping[str, Tensor], written: Mapping[str, Tensor]) -> dict[str, Tensor]:
        if missing := [name for name in self.outputs if name not in written]:
            raise ShapecheckError(f"{', '.join(missing)}: its size is not known before the call; open the file without graphs")
        sizes = tuple((name, inputs[name].shape, inputs[name].dtype) for name in self.inputs)
        static = self._static.get(sizes)
        if static is None:
            if self._static and self.backend == "ort-trt":
                # its provider replays the one that it has, whatever the size
                raise ShapecheckError("ort-trt keeps a CUDA graph of one size alone: open the file again for another size")
            kept = {name: torch.empty(shape, dtype=dtype, device=self.device) for name, shape, dtype in sizes}
            made = {name: tensor.to(self.device) for name, tensor in written.items()}
            static = _Static(self._bind(kept, made), _make_options("gpu_graph_id", str(next(self._calls))), kept, made)
        for name, tensor in static.inputs.items():
            tensor.copy_(inputs[name])
        self._session.run_with_iobinding(static.binding, static.options)
        self._static[sizes] = static
        for name, tensor in written.items():
            if tensor is not static.outputs[name]:
                tensor.copy_(static.outputs[name])
        return dict(written)

    def _place(self, name: str, tensor: Tensor, written: Iterable[Tensor]) -> Tensor:
        """Return the tensor where it is read, in one piece, where a kernel may begin, and apart from what the call writes."""
        placed = tensor.to(self._places.get(name, self.device)).resolve_neg().contiguous()
        start, end = placed.data_ptr(), placed.data_ptr() + placed.nbytes
        inside = any(start < output.data_ptr() + output.nbytes and output.data_ptr() < end for output in written)
        is_odd = self.backend != "ort" and start % _ALIGNMENT != 0
        return placed.clone() if inside or is_odd else placed

    def _bind(self, inputs: Mapping[str, Tensor], outputs: Mapping[str, Tensor]) -> Any:
        """Return a new binding: one of an earlier call holds what that call was given."""
        binding = self._session.io_binding()
        for name, tensor in inputs.items():
            binding.bind_input(name, *_locate(tensor))
        for name in self.outputs:
            if name in outputs:
                binding.bind_output(name, *_locate(outputs[name]))
            else:
                binding.bind_output(name, "cpu")
        return binding

    def close(self) -> None:
        """Wait for the GPU, and free the model."""
        if self._gpu is not None:
            self._gpu.synchronize()
        self._static.clear()
        self._session = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _read_source(model: Path | bytes, folder: Path | None, backend: str) -> tuple[str | bytes, Path | None]:
    """Return what ONNX Runtime opens, and the folder of its weights if it does not know that."""
    if isinstance(model, bytes):
        return model, folder
    if backend == "ort-cuda":
        from shapecheck.onnx.attention import read_fused

        if (fused := read_fused(model)) is not None:
            return fused, model.parent
    return str(model), folder


def _create_session(
    model: Path | bytes, source: str | bytes, settings: Any, providers: Sequence[tuple[str, Mapping[str, str]]]
) -> tuple[Any, bool]:
    """Return a session, and whether it is of a file whose attention was fused: if that cannot be opened, the file itself is.

    Without ONNX Runtime's own fallback, which takes the CPU and only prints what a provider has refused.
    """
    from onnxruntime import InferenceSession

    is_fused = isinstance(source, bytes) and not isinstance(model, bytes)
    try:
        return InferenceSession(source, settings, providers=providers, enable_fallback=0), is_fused
    except Exception as error:
        if "float8" in str(error):
            # it moves roundings to float8 across nodes that do not take it, unless it leaves all in place
            settings.add_session_config_entry("session.disable_quant_qdq", "1")
        elif is_fused:
            _log.warning("%s is opened without fused attention: %s", model, _shorten(error))
            source, is_fused = str(model), False
        else:
            raise
    return InferenceSession(source, settings, providers=providers, enable_fallback=0), is_fused


def _find_places(session: Any, device: torch.device) -> dict[str, torch.device]:
    """Return where a session on a GPU reads each input: it copies one from elsewhere when it is bound, on no stream we know."""
    if not hasattr(session, "get_input_memory_infos"):
        raise ShapecheckError("this ONNX Runtime does not say where it reads inputs on a GPU: install 1.23.2 or later")
    places = [device if memory.name == "Cuda" else torch.device("cpu") for memory in session.get_input_memory_infos()]
    return dict(zip((port.name for port in session.get_inputs()), places, strict=True))


def _choose_options(backend: str, device: int, options: Mapping[str, str], gpu: Gpu | None, *, graphs: bool) -> dict[str, str]:
    """Return the provider's options: the caller's, and those that decide how the session has to call it."""
    if taken := sorted(_OWN_OPTIONS & options.keys()):
        raise ShapecheckError(f"{', '.join(taken)}: set by the session itself; for CUDA graphs pass graphs=True")
    if backend == "ort":
        return {}
    chosen = {"device_id": str(device), **options}
    if gpu is not None:
        chosen["user_compute_stream"] = str(gpu.handle)
    if graphs:
        chosen[_GRAPH_OPTIONS[backend]] = "True"
    return chosen


def _make_options(key: str, value: str) -> Any:
    """Return options of a run with one entry."""
    from onnxruntime import RunOptions

    options = RunOptions()
    options.add_run_config_entry(key, value)
    return options


def _locate(tensor: Tensor) -> tuple[str, int, int, tuple[int, ...], int]:
    """Return device, its number, element type, shape and address, in the order of a binding's arguments."""
    return tensor.device.type, tensor.device.index or 0, _ELEMENTS[tensor.dtype], tuple(tensor.shape), tensor.data_ptr()


def _shorten(error: Exception) -> str:
    # ONNX Runtime puts places in its own source before its reasons.
    places = r"\S*onnxruntime_src/\S+ .*?\) |Error in execution: |\[ONNXRuntimeError\] : \d+ : \w+ : "
    return re.sub(places, "", " ".join(str(error).split()))[:600]
