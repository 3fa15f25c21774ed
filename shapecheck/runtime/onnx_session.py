"""Run an ONNX file in ONNX Runtime with torch tensors, on the provider that was requested and no other."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from shapecheck import extras
from shapecheck.contract import ShapecheckError
from shapecheck.contract.naming import ONNX_NUMBERS, torch_name

PROVIDERS = {
    "ort": "CPUExecutionProvider",
    "ort-cuda": "CUDAExecutionProvider",
    "ort-trt": "TensorrtExecutionProvider",
}
_ELEMENTS = {getattr(torch, name): number for name, number in ONNX_NUMBERS.items()}
_Place = tuple[str, int, int, tuple[int, ...], int]
"""Device, its number, element type, shape and address, in the order of a binding's arguments."""


class OnnxSession:
    """An ONNX file on one provider. `OnnxSession.open(path)` makes one.

    Call it with a tensor for every input, by the file's names; it returns a tensor for every output, by the file's names.
    Inputs are read at their own addresses, and bound again only if these have changed. Outputs go into the tensors that the
    caller passes, or into new ones on the CPU.
    """

    def __init__(self, session: Any, backend: str, device: torch.device, detail: str = "") -> None:
        self.backend = backend
        self.detail = detail
        """The version of ONNX Runtime, and whether TF32 is off."""
        self.device = device
        """The device that inputs should be on; ONNX Runtime copies those on another."""
        self._session = session
        self._binding, self._bound = session.io_binding(), dict[str, _Place]()
        self.inputs = tuple(port.name for port in session.get_inputs())
        self.outputs = tuple(port.name for port in session.get_outputs())

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
    ) -> Self:
        """Open a file, or a model's bytes whose weights are in files below `folder`.

        `options` go to the provider. With `strict` another provider than that of `backend` is an error: ONNX Runtime falls
        back to the CPU in silence. Raises ShapecheckError if ONNX Runtime is missing or refuses the file.
        """
        try:
            import onnxruntime
        except ModuleNotFoundError as error:
            raise extras.explain_missing(error, "running an ONNX file") from None
        if backend != "ort" and hasattr(onnxruntime, "preload_dlls"):
            onnxruntime.preload_dlls()  # CUDA as pip installs it is not where the loader looks
        settings = onnxruntime.SessionOptions()
        settings.log_severity_level = 4  # what goes wrong is raised; its log would say it twice
        # else its threads slow down what PyTorch computes after a call
        settings.add_session_config_entry("session.intra_op.allow_spinning", "0")
        if folder is not None:
            settings.add_session_config_entry("session.model_external_initializers_file_folder_path", str(folder.absolute()))
        source = model if isinstance(model, bytes) else str(model)
        chosen = (PROVIDERS[backend], {} if backend == "ort" else {"device_id": str(device), **(options or {})})
        try:
            session = onnxruntime.InferenceSession(source, settings, providers=[chosen])
        except Exception as error:  # its classes of errors are not public
            name = "the model" if isinstance(model, bytes) else model
            raise ShapecheckError(f"ONNX Runtime cannot load {name}: {_shorten(error)}") from None
        detail = f"onnxruntime {onnxruntime.__version__}" + (", TF32 off" if chosen[1].get("use_tf32") == "0" else "")
        place = torch.device("cpu") if backend == "ort" else torch.device("cuda", device)
        opened = cls(session, backend, place, detail)
        if strict and opened.provider != PROVIDERS[backend]:
            raise ShapecheckError(
                f"{backend} was requested and ONNX Runtime fell back to {opened.provider}; "
                f"`shapecheck doctor --require {backend}` says why"
            )
        return opened

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

        Raises ShapecheckError with ONNX Runtime's own words if it cannot run.
        """
        written = dict(outputs or {})
        kept = {name: tensor.contiguous() for name, tensor in inputs.items()}
        if any(tensor.is_cuda for tensor in kept.values()):
            torch.cuda.current_stream(self.device).synchronize()  # ONNX Runtime runs on a stream of its own
        try:
            self._bind(kept, written)
            self._session.run_with_iobinding(self._binding)
            if len(written) == len(self.outputs):
                return written
            results = dict(zip(self.outputs, self._binding.get_outputs(), strict=True))
            return {
                name: written[name] if name in written else torch.from_numpy(value.numpy()) for name, value in results.items()
            }
        except Exception as error:
            self._forget()
            raise ShapecheckError(f"ONNX Runtime cannot run this call: {_shorten(error)}") from None

    def _bind(self, inputs: Mapping[str, Tensor], outputs: Mapping[str, Tensor]) -> None:
        """Bind what is not bound there already; nothing of a call with other names stays bound."""
        places = {name: _place(tensor) for name, tensor in (*inputs.items(), *outputs.items())}
        if places.keys() != self._bound.keys():
            self._forget()
        for name, place in places.items():
            if self._bound.get(name) != place:
                (self._binding.bind_output if name in outputs else self._binding.bind_input)(name, *place)
                self._bound[name] = place
        for name in self.outputs:
            if name not in outputs:
                self._binding.bind_output(name, "cpu")

    def _forget(self) -> None:
        self._binding, self._bound = self._session.io_binding(), {}

    def close(self) -> None:
        self._session = self._binding = None
        self._bound.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _place(tensor: Tensor) -> _Place:
    return tensor.device.type, tensor.device.index or 0, _ELEMENTS[tensor.dtype], tuple(tensor.shape), tensor.data_ptr()


def _shorten(error: Exception) -> str:
    # ONNX Runtime puts places in its own source before its reasons.
    places = r"\S*onnxruntime_src/\S+ .*?\) |Error in execution: |\[ONNXRuntimeError\] : \d+ : \w+ : "
    return re.sub(places, "", " ".join(str(error).split()))[:600]
