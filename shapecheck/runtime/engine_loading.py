"""TensorRT's own objects: an engine, once its file is known to be what its record says, and the context that runs it."""

from __future__ import annotations

import hashlib
import importlib
import logging
import mmap
from collections import deque
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from shapecheck import extras
from shapecheck.contract import ContractError, Shape, ShapecheckError, show
from shapecheck.contract.naming import torch_name
from shapecheck.runtime.binding import BoundCall, PlacedCall
from shapecheck.tensorrt.engine_tensors import DeclaredEngine, compare_engine, describe_engine
from shapecheck.tensorrt.record import MODULES, Engine

_BINDABLE = frozenset(("float32", "float16", "bfloat16", "int64", "int32", "bool"))
_log = logging.getLogger(__name__)


def map_engine(path: Path, record: Engine | None) -> mmap.mmap:
    """Return the bytes of an engine as they are on the disk. Raises ShapecheckError if they are not those of the record."""
    if not path.is_file():
        raise ShapecheckError(f"no engine at {path}, although its record is there; copy both together, or build again")
    try:
        with path.open("rb") as file:
            data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except (OSError, ValueError) as error:
        raise ShapecheckError(f"cannot read {path}: {error}") from None
    if record is None:
        return data
    if len(data) != record.size:
        raise ShapecheckError(f"{path} has {len(data)} bytes, its record says {record.size}: is one of them cut short or old?")
    if (digest := f"sha256:{hashlib.sha256(data).hexdigest()}") != record.digest:
        raise ShapecheckError(f"{path} is {digest}, its record says {record.digest}; copy both together, or build again")
    return data


@cache
def _get_logger(trt: Any) -> Any:
    """Return the one logger of the process: TensorRT keeps using the first it was given, past the session that gave it."""

    class Logger(trt.ILogger):  # type: ignore[misc]
        """Keeps errors for whoever raises one; passes warnings on to Python's logging."""

        def __init__(self) -> None:
            super().__init__()
            self.errors: deque[str] = deque(maxlen=20)

        def log(self, severity: Any, msg: str) -> None:
            if severity in (trt.ILogger.INTERNAL_ERROR, trt.ILogger.ERROR):
                self.errors.append(msg.strip())
            elif severity == trt.ILogger.WARNING:
                _log.warning("TensorRT: %s", msg.strip())

    return Logger()


class Loaded(NamedTuple):
    """An engine that TensorRT loaded, and all that has to live as long."""

    logger: Any
    runtime: Any
    engine: Any
    declared: DeclaredEngine


def load_engine(trt: Any, path: Path, record: Engine | None, data: mmap.mmap) -> Loaded:
    """Load the engine in these bytes, which without a record may be anybody's.

    Raises ShapecheckError if TensorRT cannot load it, or it has an input or output that cannot be bound to a torch tensor on
    the GPU; ContractError if it is not the engine of the record.
    """
    request, logger = record.request if record is not None else None, _get_logger(trt)
    logger.errors.clear()
    try:
        runtime = trt.Runtime(logger)
    except (RuntimeError, TypeError) as error:  # bindings raise TypeError if the library returns nothing
        raise build_refusal("start", logger, "`shapecheck doctor` says why") from error
    if request is not None and request.options.version_compatible:
        runtime.engine_host_code_allowed = True
    engine = runtime.deserialize_cuda_engine(data)
    if engine is None:
        advice = f"TensorRT here is {trt.__version__}; an engine loads with the release and the kind of GPU it was built for"
        if request is not None:
            here = f"{MODULES[request.options.target]} here is {trt.__version__}"
            advice = f"it was built by {request.tensorrt} on {request.gpu}, and {here}: build it again here"
        if any("memory" in words.lower() for words in logger.errors):
            advice = "the GPU's memory is too small or taken: free what the engine stands in for, and load it again"
        raise build_refusal(f"load {path}", logger, advice)
    for number in range(engine.num_io_tensors):
        name = engine.get_tensor_name(number)
        dtype, location = engine.get_tensor_dtype(name), engine.get_tensor_location(name)
        if torch_name(dtype.name) not in _BINDABLE or location != trt.TensorLocation.DEVICE:
            bindable = ", ".join(sorted(_BINDABLE))
            raise ShapecheckError(f"{name}: got {dtype.name} on the {location.name}, expected one of {bindable} on the DEVICE")
    declared = describe_engine(trt, engine)
    if request is not None and (mismatches := compare_engine(request, declared)):
        raise ContractError(mismatches, subject=f"{path} is not what its record says", contract=request.contract)
    return Loaded(logger, runtime, engine, declared)


def import_tensorrt(target: str) -> Any:
    """Import TensorRT for a target. Raises ShapecheckError saying how to install it, or why it does not load."""
    name = MODULES[target]
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise extras.explain_missing(error, "running an engine") from None
    except (ImportError, OSError, RuntimeError) as error:
        raise ShapecheckError(f"{name} is installed and does not load: {error}; `shapecheck doctor` says why") from error


def build_refusal(action: str, logger: Any, advice: str = "") -> ShapecheckError:
    """Return the error for what TensorRT would not do, in its own words, which are then forgotten."""
    words = [f"  {logger.errors.popleft()}" for _ in range(len(logger.errors))]
    return ShapecheckError("\n".join([f"TensorRT refuses to {action}", *words, *filter(None, [advice])]))


class Executor:
    """An execution context, and what is set in it."""

    def __init__(self, context: Any, logger: Any) -> None:
        self._context, self._logger = context, logger
        self._sized: BoundCall | None = None
        self._addresses: dict[str, int] = {}
        self.bound: PlacedCall | None = None
        """The call whose shapes and addresses are set; None if not all are."""

    def is_sized_for(self, call: BoundCall) -> bool:
        """Return whether the profile and every shape are those of this call."""
        return self._sized == call

    def set_shapes(self, call: BoundCall, stream: int) -> None:
        """Set the profile and every shape, unless they are set."""
        self.bound = None
        if self.is_sized_for(call):
            return
        self._sized = None
        self._addresses.clear()
        if self._context.active_optimization_profile != call.profile:
            done = self._context.set_optimization_profile_async(call.profile, stream)
            self._check(done, f"switch to profile {call.profile}")
        for name, shape in call.inputs.items():
            self._check(self._context.set_input_shape(name, shape), f"take {name} of {show(shape)}")
        try:
            unresolved = self._context.infer_shapes()
        except RuntimeError as error:
            raise build_refusal(f"work at {call.geometry}", self._logger, str(error)) from error
        self._check(not unresolved, f"work at {call.geometry} without the shapes of {', '.join(unresolved)}")
        self._sized = call

    def output_shape(self, name: str) -> Shape:
        """Return the shape of an output at the shapes that are set; -1 for an axis that depends on values."""
        return tuple(self._context.get_tensor_shape(name))

    def set_addresses(self, addresses: Mapping[str, int]) -> None:
        """Bind every tensor that is not bound there."""
        for name, address in addresses.items():
            if self._addresses.get(name) != address:
                self._check(self._context.set_tensor_address(name, address), f"bind {name} at {address:#x}")
                self._addresses[name] = address

    def execute(self, stream: int) -> None:
        self._check(self._context.execute_async_v3(stream), "run")

    def _check(self, done: bool, action: str) -> None:
        if not done:
            raise build_refusal(action, self._logger)
