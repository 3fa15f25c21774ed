"""An execution context of TensorRT, and what is set in it: every native call of a running session."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from shapecheck.contract import Shape, ShapecheckError, show
from shapecheck.runtime.binding import BoundCall

PlacedCall = tuple[BoundCall, tuple[int, ...]]
"""How a call is served, and the addresses of its inputs, in the contract's order."""


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

    def set_shapes(self, call: BoundCall, stream: int) -> None:
        """Set the profile and every shape, unless they are set."""
        self.bound = None
        if self._sized == call:
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
        """Queue the work."""
        self._check(self._context.execute_async_v3(stream), "run")

    def _check(self, done: bool, action: str) -> None:
        if not done:
            raise build_refusal(action, self._logger)
