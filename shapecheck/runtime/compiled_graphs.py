"""Capture a call of compiled code into CUDA graphs: one up to where a UNet first reads its residuals, and one of the rest."""

from __future__ import annotations

import gc
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from itertools import compress
from typing import Any

import torch
from torch import Tensor

from shapecheck.runtime.compiled_model import at_residuals

Launch = Callable[[], tuple[Tensor, ...]]


def reads_late(launch: Launch, residuals: Sequence[Tensor]) -> bool:
    """Run code once, and return whether it reads no residual before it says that it comes to them.

    A compiler may read them earlier, or copy them. They are NaN until then, so that it would show in the outputs.
    """
    kept = [residual.clone() for residual in residuals]
    for residual in residuals:
        residual.fill_(math.nan)

    def arrive() -> None:
        for residual, value in zip(residuals, kept, strict=True):
            residual.copy_(value)

    with at_residuals(arrive):
        outputs = launch()
    arrive()  # if it never came to them
    return bool(residuals) and all(bool(output.isfinite().all()) for output in outputs)


class CapturedCall:
    """The graphs of one size, and the tensors that they read and write.

    `late` says for each input whether only the second graph reads it; if it is true for none, there is one graph.
    """

    def __init__(self, launch: Launch, inputs: list[Tensor], late: Sequence[bool], pool: Any) -> None:
        """Capture what `launch` queues on torch's current stream, which is not the default one."""
        self._graphs = [torch.cuda.CUDAGraph()]

        def begin() -> None:
            self._graphs[-1].capture_begin(pool=pool, capture_error_mode="thread_local")

        def split() -> None:
            self._graphs[-1].capture_end()
            self._graphs.append(torch.cuda.CUDAGraph())
            begin()

        # outside of the graphs' memory, where an earlier part of the next call, or a graph of another size, writes anything
        self.outputs = launch()
        # nothing may be freed on the GPU in between; collecting garbage before takes as long as half of a start
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        begin()
        try:
            with _keep_garbage(), at_residuals(split) if any(late) else nullcontext():
                _copy(self.outputs, launch())
        except BaseException:
            with suppress(RuntimeError):  # that what was begun cannot be ended
                self._graphs[-1].capture_end()
            raise
        self._graphs[-1].capture_end()
        self._late, self._early = list(late), [not is_late for is_late in late]
        self._inputs = inputs

    def replay(self, tensors: Sequence[Tensor], wait_for_residuals: Callable[[], object]) -> tuple[Tensor, ...]:
        """Queue the graphs on torch's current stream. `wait_for_residuals` is called before any late input is read."""
        first, *rest = self._graphs
        if not rest:  # it reads residuals at once
            wait_for_residuals()
        _copy(list(compress(self._inputs, self._early)), list(compress(tensors, self._early)))
        first.replay()
        for graph in rest:
            wait_for_residuals()
            _copy(list(compress(self._inputs, self._late)), list(compress(tensors, self._late)))
            graph.replay()
        return self.outputs


@contextmanager
def _keep_garbage() -> Iterator[None]:
    """Let Python collect no garbage: there may be CUDA graphs and engines among it."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def choose_order(tensor: Tensor) -> torch.memory_format:
    """Return how an input lies in memory: an image or residual on a GPU with its channels last, as the kernels read it."""
    return torch.channels_last if tensor.is_cuda and tensor.dim() == 4 else torch.contiguous_format


def _copy(targets: Sequence[Tensor], sources: Sequence[Tensor]) -> None:
    """Copy tensors of the same shapes, those of one dtype at once."""
    groups: dict[tuple[torch.dtype, bool], tuple[list[Tensor], list[Tensor]]] = {}
    for target, source in zip(targets, sources, strict=True):
        # one that lies otherwise would make each of its group a kernel of its own
        ours, theirs = groups.setdefault((target.dtype, target.stride() == source.stride()), ([], []))
        ours.append(target)
        theirs.append(source)
    for ours, theirs in groups.values():
        torch._foreach_copy_(ours, theirs)
