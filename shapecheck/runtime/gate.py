"""Who may call a session, and with what: one call at a time, none after closing, each held to the contract."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache

import torch
from torch import Tensor

from shapecheck.contract import ShapecheckError
from shapecheck.runtime.binding import Binding, BoundCall, TensorForm


class Gate:
    """Stands before a session. A refused call leaves it as it was."""

    def __init__(self, name: str, binding: Binding) -> None:
        self._name, self.binding = name, binding
        self._lock = threading.Lock()
        self._served: tuple[object, BoundCall] | None = None
        self.is_open = True

    @contextmanager
    def alone(self) -> Iterator[None]:
        """For the length of one call. Raises ShapecheckError where another is being served, or the session is closed."""
        if not self._lock.acquire(blocking=False):
            raise ShapecheckError(f"{self._name}: this session is serving another call; open a session for each thread")
        try:
            if not self.is_open:
                raise ShapecheckError(f"{self._name}: this session is closed; open it again")
            yield
        finally:
            self._lock.release()

    def serve(self, inputs: Mapping[str, Tensor]) -> BoundCall:
        """How a call is served: as the last one was, without a look at the contract, where nothing that counts differs.

        Raises CallError with everything that is wrong.
        """
        try:
            signature = tuple([(name, each.shape, each.dtype, each.device) for name, each in inputs.items()])
        except AttributeError:
            signature = None
        if self._served is None or self._served[0] != signature:
            self._served = signature, self.binding.serve(_given(inputs))
        return self._served[1]

    def shut(self) -> None:
        """No call is served from now on."""
        self.is_open, self._served = False, None


def _given(inputs: Mapping[str, Tensor]) -> dict[str, TensorForm]:
    if strange := [f"{name} is {type(each).__name__}" for name, each in inputs.items() if not isinstance(each, Tensor)]:
        raise ShapecheckError(f"{', '.join(strange)}: tensors are expected; without a ControlNet give zeros for every slot")
    return {name: (each.shape, _dtype(each.dtype), _device(each.device)) for name, each in inputs.items()}


@cache
def _dtype(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


@cache
def _device(device: torch.device) -> str:
    return str(device)
