"""Admit calls to a session: one at a time, none after closing, none that does not fit the contract."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache

import torch
from torch import Tensor

from shapecheck.contract import ShapecheckError
from shapecheck.runtime.binding import Binding, BoundCall


class Gate:
    """Stands before a session. A refused call leaves it as it was."""

    def __init__(self, name: str, binding: Binding) -> None:
        self._name, self.binding = name, binding
        self._lock = threading.Lock()
        self._last: tuple[object, BoundCall] | None = None
        self.is_open = True

    @contextmanager
    def acquire(self) -> Iterator[None]:
        """Keep other calls out for the length of one. Raises ShapecheckError if another is served or the session is closed."""
        if not self._lock.acquire(blocking=False):
            raise ShapecheckError(f"{self._name}: this session is serving another call; open a session for each thread")
        try:
            if not self.is_open:
                raise ShapecheckError(f"{self._name}: this session is closed; open it again")
            yield
        finally:
            self._lock.release()

    def serve(self, inputs: Mapping[str, Tensor]) -> BoundCall:
        """Return how a call is served: if no shape, dtype or device differs from the last one, as that was.

        Raises CallError with everything that is wrong.
        """
        try:
            signature = tuple([(name, tensor.shape, tensor.dtype, tensor.device) for name, tensor in inputs.items()])
        except AttributeError:
            signature = None
        if self._last is None or self._last[0] != signature:
            others = [f"{name}: got {type(value).__name__}" for name, value in inputs.items() if not isinstance(value, Tensor)]
            if others:
                raise ShapecheckError(f"{'; '.join(others)}; expected tensors: without a ControlNet pass zeros for every slot")
            forms = {name: (value.shape, name_dtype(value.dtype), name_device(value.device)) for name, value in inputs.items()}
            self._last = signature, self.binding.serve(forms)
        return self._last[1]

    def close(self) -> None:
        """Serve no call from now on."""
        self.is_open, self._last = False, None


def copy_outputs(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return copies, queued on torch's current stream. A session makes them before it lets another call in."""
    copies = {name: torch.empty_like(tensor) for name, tensor in tensors.items()}
    torch._foreach_copy_(list(copies.values()), list(tensors.values()))
    return copies


@cache
def name_device(device: torch.device) -> str:
    """Return `cuda:0`; the text takes as long to make as the rest of a check."""
    return str(device)


@cache
def name_dtype(dtype: torch.dtype) -> str:
    """Return `float16` for `torch.float16`."""
    return str(dtype).removeprefix("torch.")
