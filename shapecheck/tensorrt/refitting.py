"""Exchange the weights of a loaded engine with TensorRT's Refitter. Runs in the process in which TensorRT is loaded."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

_NAMES = {"float32": "FLOAT", "float16": "HALF", "bfloat16": "BF16", "int64": "INT64", "int32": "INT32"}
_MOST_SHOWN = 5


def exchange_weights(trt: Any, engine: Any, logger: Any, weights: Mapping[str, Sequence[Any]]) -> str:
    """Put weights into an engine; return why it is not possible, or nothing. The engine is then worth nothing.

    `weights` holds by name the file, the offset, the shape and the dtype of every weight that the engine was built from.
    """
    if not engine.refittable:
        return "TensorRT says that it is not refittable"
    refitter = trt.Refitter(engine, logger)
    known = frozenset(refitter.get_all_weights())
    # One that it holds under no name was folded into something else, which would stay as it is.
    if folded := [name for name in weights if name not in known]:
        return f"{len(folded)} weights have no name in the engine, for TensorRT folded them: {_list_first(folded)}"

    buffers = []  # TensorRT reads them when all are set
    for name, (file, offset, shape, dtype) in weights.items():
        prototype, count = refitter.get_weights_prototype(name), math.prod(shape)
        kind = getattr(trt.DataType, _NAMES[dtype])
        if (prototype.dtype, prototype.size) != (kind, count):
            return f"{name} is {prototype.size} of {prototype.dtype.name} in the engine, and {count} of {kind.name} now"
        buffers.append(_read(file, offset, count * kind.itemsize))
        if not refitter.set_named_weights(name, trt.Weights(kind, ctypes.addressof(buffers[-1]), count)):
            return f"TensorRT does not take {name}"
    if missing := refitter.get_missing_weights():
        return f"TensorRT needs {len(missing)} other weights too: {_list_first(missing)}"
    return "" if refitter.refit_cuda_engine() else "TensorRT could not refit it"


def _read(path: str, offset: int, nbytes: int) -> ctypes.Array[ctypes.c_char]:
    buffer = (ctypes.c_char * nbytes)()
    with Path(path).open("rb") as file:
        file.seek(offset)
        if file.readinto(buffer) != nbytes:
            raise ValueError(f"{path} was cut short")
    return buffer


def _list_first(names: Sequence[str]) -> str:
    return ", ".join(names[:_MOST_SHOWN]) + (", …" if len(names) > _MOST_SHOWN else "")
