"""In which order a GPU's streams do the work of calls, on a STAND-IN for PyTorch's streams: no GPU computes here.

A stream of it notes what it has seen done: its own work, and what the streams had done that it waited for.
"""

from __future__ import annotations

import random
from contextlib import contextmanager, nullcontext

import pytest
import torch

from shapecheck.runtime.gpu import Gpu


class Stream:
    """Work in order; `seen` is all that is done when its last piece begins."""

    def __init__(self, known):
        self.cuda_stream, self.seen = len(known), set()
        known.append(self)

    def work(self, piece):
        """Queue a piece, and return what is done before it."""
        before = set(self.seen)
        self.seen.add(piece)
        return before

    def wait_stream(self, other):
        self.seen |= other.seen


class Known(list):
    """Streams, one of which is current."""

    current: Stream


@pytest.fixture
def streams(monkeypatch):
    """Every stream there is, by its handle; the default one is 0. `current` is where PyTorch queues."""
    known = Known()
    known.current = Stream(known)

    @contextmanager
    def enter(stream):
        before, known.current = known.current, stream
        yield
        known.current = before

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "device", lambda _name: nullcontext())
    monkeypatch.setattr(torch.cuda, "Stream", lambda _name: Stream(known))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: known.current)
    monkeypatch.setattr(torch.cuda, "stream", enter)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    return known


@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("seed", range(3))
def test_calls_from_any_stream_and_of_two_sessions_are_done_in_their_order(own, seed, streams):
    """A call comes after what makes its inputs, and after what reads the results of the one before, which it writes again."""
    choose = random.Random(seed)
    callers, gpus = [streams[0], Stream(streams), Stream(streams)], [Gpu("cuda:0"), Gpu("cuda:0")]
    reads = {gpu: set() for gpu in gpus}
    for number in range(100):
        gpu, streams.current = choose.choice(gpus), choose.choice(callers)
        caller = streams.current
        caller.work(f"inputs {number}")
        with gpu.stream(own=own) as handle:
            before = streams[handle].work(f"call {number}")
            assert handle not in ((0, 1, 2) if own else (0,))
            assert streams.current is (streams[handle] if own else caller)
        assert streams.current is caller
        assert {f"inputs {number}", *reads[gpu]} <= before
        assert f"call {number}" in caller.work(f"read {number}")
        reads[gpu] = {f"read {number}"}
