"""Compile a model's forward with torch.compile, and keep the code in a folder for the next process."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from importlib.metadata import version
from pathlib import Path
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn

from shapecheck.contract import Contract, ShapecheckError
from shapecheck.contract.errors import one_line
from shapecheck.files import atomic_write
from shapecheck.models.computation import describe_computation
from shapecheck.models.forward_call import build_arguments
from shapecheck.runtime.compiled_model import CompiledModel
from shapecheck.version import __version__

Run = Callable[..., tuple[Tensor, ...]]
"""Called with a `Forward` and its tensors; returns its outputs."""
OPTIONS: Mapping[str, Any] = {
    "conv_1x1_as_mm": True,
}
_log = logging.getLogger(__name__)
compiled_code: dict[str, Run] = {}
"""What was compiled in this process: a model of the same structure runs the same code with its own weights."""


class Forward(nn.Module):
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


class Compiler:
    """Compiles one forward, once for each size of its tensors; code of an earlier process is read from `cache`."""

    def __init__(self, forward: Forward, device: torch.device, backend: str, cache: Path | None, settings: str) -> None:
        self._forward, self._backend, self._cache = forward, backend, cache
        # code that is guarded by its model is compiled for each that shares it, and PyTorch refuses the ninth
        computation = describe_computation(forward)
        self._code: dict[str, Run] = compiled_code if _compiles_ahead() else {}
        if computation.unseen:
            _log.warning("what is compiled is for this model alone: %s", one_line(computation.unseen[0], longest=200))
            self._cache, self._code = None, {}
        orders = [value.stride() for value in (*forward.parameters(), *forward.buffers())]
        self._identity = f"{computation.digest} {orders} {_describe_makers(device, backend)} {settings}"

    def compile(self, tensors: list[Tensor]) -> Run:
        """Return the code for tensors of these shapes, dtypes and layouts. Raises ShapecheckError if PyTorch cannot make it."""
        forms = [(tuple(tensor.shape), tensor.stride(), str(tensor.dtype)) for tensor in tensors]
        key = hashlib.sha256(f"{self._identity} {forms}".encode()).hexdigest()
        if key not in self._code:
            file = self._cache / f"compiled-{key[:16]}.bin" if self._cache is not None else None
            self._code[key] = _load(file) or compile_forward(self._forward, tensors, file, self._backend)
        return self._code[key]


def _compiles_ahead() -> bool:
    """Return whether this PyTorch compiles without guards, into what can be kept: it does from 2.9 on."""
    return hasattr(torch.compiler, "load_compiled_function")


def compile_forward(forward: nn.Module | None, tensors: list[Tensor], file: Path | None, compiler: str) -> Run:
    """Compile a forward for these tensors, and keep what comes of it in a file. Raises ShapecheckError if PyTorch cannot."""
    # a copy of the code, for PyTorch counts what it compiles for one and stops at eight
    function = FunctionType(Forward.forward.__code__.replace(), globals())
    options = dict(OPTIONS) if compiler == "inductor" else {}
    try:
        if _compiles_ahead():
            try:
                return _compile_ahead(function, forward, tensors, file, compiler, options)
            except Exception as error:
                # it is experimental there; what cannot be kept is compiled at every start
                _log.warning("what is compiled cannot be kept for the next start: %s", one_line(str(error), longest=200))
        run: Run = torch.compile(function, fullgraph=True, dynamic=False, backend=compiler, options=options or None)
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
) -> Run:
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
    run: Run = ahead
    return run


def _load(file: Path | None) -> Run | None:
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
