"""An ONNX file in ONNX Runtime as a function of torch tensors, on the provider that was asked for and no other."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor

from shapecheck import extras
from shapecheck.contract import ShapecheckError

PROVIDERS = {
    "ort": "CPUExecutionProvider",
    "ort-cuda": "CUDAExecutionProvider",
    "ort-trt": "TensorrtExecutionProvider",
}
"""The provider of each backend."""
_SOURCE = re.compile(r"\S*onnxruntime_src/\S+ .*?\) |Error in execution: |\[ONNXRuntimeError\] : \d+ : \w+ : ")
"""Places in ONNX Runtime's source, which it puts before its reasons."""
_FOLDER = "session.model_external_initializers_file_folder_path"
_ELEMENTS = {
    torch.float32: 1,
    torch.int32: 6,
    torch.int64: 7,
    torch.bool: 9,
    torch.float16: 10,
    torch.float64: 11,
    torch.bfloat16: 16,
}
"""ONNX's numbers of the element types."""


class OnnxSession:
    """An ONNX file on one provider. `OnnxSession.open(path)` makes one.

    Call it with a tensor for every input, by the file's names; it returns a tensor for every output, by the file's names.
    Inputs are read where they lie. Outputs go into the tensors that the caller gives, or into new ones on the CPU.
    """

    def __init__(self, session: Any, backend: str, device: torch.device) -> None:
        self.backend = backend
        self.device = device
        """Where inputs should lie: those that lie elsewhere are copied by ONNX Runtime."""
        self._session = session
        self.inputs = tuple(each.name for each in session.get_inputs())
        self.outputs = tuple(each.name for each in session.get_outputs())

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
        """Open a file, or a model's bytes whose weights lie in files below `folder`.

        `options` go to the provider. With `strict` another provider than that of `backend` is an error: ONNX Runtime falls
        back to the CPU in silence. Raises ShapecheckError where ONNX Runtime is missing or refuses the file.
        """
        try:
            import onnxruntime
        except ModuleNotFoundError as error:
            raise extras.missing(error, "running an ONNX file") from None
        if backend != "ort" and hasattr(onnxruntime, "preload_dlls"):
            onnxruntime.preload_dlls()  # CUDA as pip installs it is not where the loader looks
        settings = onnxruntime.SessionOptions()
        settings.log_severity_level = 4  # what goes wrong is raised; its log would say it twice
        if folder is not None:
            settings.add_session_config_entry(_FOLDER, str(folder.absolute()))
        source = model if isinstance(model, bytes) else str(model)
        chosen = (PROVIDERS[backend], {} if backend == "ort" else {"device_id": str(device), **(options or {})})
        try:
            session = onnxruntime.InferenceSession(source, settings, providers=[chosen])
        except Exception as error:  # its classes of errors are not public
            told = "the model" if isinstance(model, bytes) else model
            raise ShapecheckError(f"ONNX Runtime cannot load {told}: {_words(error)}") from None
        found = cls(session, backend, torch.device("cpu") if backend == "ort" else torch.device("cuda", device))
        if strict and found.provider != PROVIDERS[backend]:
            raise ShapecheckError(
                f"{backend} was asked for and ONNX Runtime fell back to {found.provider}; "
                f"`shapecheck doctor --require {backend}` says why"
            )
        return found

    @property
    def provider(self) -> str:
        """The provider that really runs; those after it only take what it cannot."""
        return str(self._session.get_providers()[0])

    def __call__(self, inputs: Mapping[str, Tensor], outputs: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
        """The outputs for these inputs; those named in `outputs` are written there.

        Raises ShapecheckError with ONNX Runtime's own words where it cannot run.
        """
        binding, given = self._session.io_binding(), dict(outputs or {})
        kept = {name: each.contiguous() for name, each in inputs.items()}
        try:
            for name, each in kept.items():
                binding.bind_input(name, *_place(each))
            for name in self.outputs:
                if name in given:
                    binding.bind_output(name, *_place(given[name]))
                else:
                    binding.bind_output(name, "cpu")
            self._session.run_with_iobinding(binding)
            found = dict(zip(self.outputs, binding.get_outputs(), strict=True))
            return {name: given[name] if name in given else torch.from_numpy(each.numpy()) for name, each in found.items()}
        except Exception as error:
            raise ShapecheckError(f"ONNX Runtime cannot run this call: {_words(error)}") from None

    def close(self) -> None:
        """Give the memory back."""
        self._session = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


def _place(tensor: Tensor) -> tuple[str, int, int, tuple[int, ...], int]:
    """Device, its number, element type, shape and address, as a binding wants them."""
    return tensor.device.type, tensor.device.index or 0, _ELEMENTS[tensor.dtype], tuple(tensor.shape), tensor.data_ptr()


def _words(error: Exception) -> str:
    return _SOURCE.sub("", " ".join(str(error).split()))[:600]
