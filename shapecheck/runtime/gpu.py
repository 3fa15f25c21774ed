"""One GPU, and the streams that calls run on: all of a session that needs CUDA itself."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import Tensor

from shapecheck.contract import Shape, ShapecheckError, show


def free_memory() -> None:
    """Give back what nothing refers to: ONNX Runtime and TensorRT cannot use what PyTorch keeps for itself."""
    gc.collect()
    torch.cuda.empty_cache()


class Gpu:
    """A GPU. `name` is `cuda:0`. Raises ShapecheckError if PyTorch does not see it."""

    def __init__(self, device: torch.device | str | None) -> None:
        if not torch.cuda.is_available():
            raise ShapecheckError("this runs on an NVIDIA GPU, and PyTorch sees none here; `shapecheck doctor` says why")
        names = [f"cuda:{number}" for number in range(torch.cuda.device_count())]
        self.name = f"cuda:{torch.cuda.current_device()}" if device is None or str(device) == "cuda" else str(device)
        if self.name not in names:
            raise ShapecheckError(f"no GPU {self.name!r:.40}: PyTorch sees {', '.join(names)}")
        self._own = torch.cuda.Stream(self.name)  # type: ignore[no-untyped-call]
        self._running: torch.cuda.Stream | None = None
        self._caller: torch.cuda.Stream | None = None

    @property
    def handle(self) -> int:
        """Return the handle of its own stream."""
        return self._own.cuda_stream

    def activate(self) -> AbstractContextManager[object]:
        """Make it the current device for the length of a `with`."""
        return torch.cuda.device(self.name)

    def is_capturing(self) -> bool:
        """Return whether PyTorch is recording its current stream into a CUDA graph."""
        with self.activate():
            return torch.cuda.is_current_stream_capturing()

    @contextmanager
    def begin_after(self, ready: torch.cuda.Event) -> Iterator[None]:
        """Compute on its own stream for the length of a `with`, after an event alone."""
        with self.activate(), torch.cuda.stream(self._own):
            self._own.wait_event(ready)
            yield

    def wait_for_caller(self) -> None:
        """Let its own stream wait for what torch's current stream had queued when `stream` was entered."""
        if self._caller is not None:
            self._own.wait_stream(self._caller)

    @contextmanager
    def stream(self, *, own: bool = False, ready: torch.cuda.Event | None = None) -> Iterator[int]:
        """Yield the handle of the stream to run on: torch's current one, or its own in place of the default one.

        TensorRT would wait on the default stream. With `own` it is always its own, on which PyTorch then computes too. What
        was queued before on torch's current stream comes first, or from `ready` on no more than that, until `wait_for_caller`;
        and so does all that the caller before has queued on his.
        """
        with self.activate():
            current = torch.cuda.current_stream()
            stream = self._own if own or not current.cuda_stream else current
            # he may still be reading what this call writes again
            if self._caller not in (None, current) and not torch.cuda.is_current_stream_capturing():
                stream.wait_stream(self._caller)
            self._running, self._caller = stream, current
            if ready is not None:
                stream.wait_event(ready)
            elif stream is self._own:
                stream.wait_stream(current)
            try:
                with torch.cuda.stream(stream) if own else nullcontext():
                    yield stream.cuda_stream
            finally:
                if stream is self._own:
                    current.wait_stream(stream)

    def capture(self, launch: Callable[[], None]) -> Callable[[], None]:
        """Record what `launch` queues on this call's stream; return what queues it again, on the stream of that call."""
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, stream=self._running, capture_error_mode="thread_local"):
                launch()
        except (RuntimeError, ShapecheckError) as error:
            raise ShapecheckError(f"cannot capture a CUDA graph: {error}\nopen the engine without graphs") from error

        def replay() -> None:
            with torch.cuda.stream(self._running):
                graph.replay()

        return replay

    def require_memory(self, needed: int, purpose: str) -> None:
        """Raise ShapecheckError unless so many bytes are free for others than PyTorch, whose unused memory is freed first."""
        free, total = torch.cuda.mem_get_info(self.name)
        if free < needed:
            torch.cuda.empty_cache()
            free, total = torch.cuda.mem_get_info(self.name)
        if not needed <= free:
            own = torch.cuda.memory_allocated(self.name)
            raise ShapecheckError(
                f"{purpose} needs {needed / 2**30:.2f} GiB on {self.name}, and {free / 2**30:.2f} of its {total / 2**30:.1f} "
                f"GiB are free; tensors of this process hold {own / 2**30:.2f} GiB: free models that the engine stands in for"
            )

    def allocate(self, shape: Shape, dtype: torch.dtype) -> Tensor:
        """Return memory for an output, whose contents are not set."""
        try:
            return torch.empty(shape, dtype=dtype, device=self.name)
        except torch.cuda.OutOfMemoryError as error:
            raise ShapecheckError(f"no memory on {self.name} for an output of {show(shape)}: {error}") from error

    def synchronize(self) -> None:
        torch.cuda.synchronize(self.name)
