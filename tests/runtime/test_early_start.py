"""A UNet begins before its residuals are there: nothing reads them before it says so, and only what was there is read early."""

from __future__ import annotations

import gc
from functools import partial

import pytest
import small
import torch

from shapecheck import Geometry
from shapecheck.models.forward_call import build_arguments
from shapecheck.observe.subject import resolve_subject
from shapecheck.runtime.compiled_code import Compiler, Forward
from shapecheck.runtime.compiled_graphs import CapturedCall, reads_late
from shapecheck.runtime.compiled_model import CompiledModel, at_residuals, await_residuals
from shapecheck.runtime.readiness import ReadyInputs


def make(module):
    """Return a model's contract, its forward that marks residuals, and inputs."""
    contract = resolve_subject(module).contract("float32", control=True)
    generator = torch.Generator().manual_seed(0)
    shapes = contract.input_shapes(Geometry(2, 9, 13, 7))
    inputs = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    return contract, Forward(CompiledModel(module, marks_residuals=True), contract), inputs


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # Inductor's own
@pytest.mark.parametrize("compiler", ["eager", pytest.param("inductor", marks=pytest.mark.full)])
def test_residuals_are_read_only_once_a_unet_has_come_to_them(compiler):
    """They are written when the mark is reached, as by a ControlNet that is late: what was read before would be seen."""
    unet = small.unet(**small.SHALLOW)
    contract, forward, inputs = make(unet)
    late = {slot.name: torch.randn_like(inputs[slot.name]) for slot in contract.slots}
    with torch.no_grad():
        early_image, late_image = (
            unet(**build_arguments(contract, values), return_dict=False)[0] for values in (inputs, inputs | late)
        )
    assert not torch.allclose(early_image, late_image, atol=1e-2)
    given, marks = {name: value.clone() for name, value in inputs.items()}, []

    def arrive():
        marks.append(1)
        for name, value in late.items():
            given[name].copy_(value)

    with torch.no_grad():
        run = Compiler(forward, torch.device("cpu"), compiler, None, "").compile(list(given.values()))
        (unmarked,) = run(forward, *given.values())
        with at_residuals(arrive):
            (found,) = run(forward, *given.values())
        assert reads_late(partial(run, forward, *given.values()), [given[name] for name in late])
    assert marks == [1]
    assert ((unmarked - early_image).abs().max() <= 1e-5 * early_image.abs().max()).item()
    assert ((found - late_image).abs().max() <= 1e-5 * late_image.abs().max()).item()
    assert all(torch.equal(given[name], value) for name, value in (inputs | late).items())


@pytest.mark.full
def test_code_that_reads_residuals_before_is_noticed():
    """The compiler `aot_eager` copies them first; other code never says where it comes to them."""
    contract, forward, inputs = make(small.unet(**small.SHALLOW))
    residuals = [inputs[slot.name] for slot in contract.slots]
    before = [residual.clone() for residual in residuals]
    with torch.no_grad():
        run = Compiler(forward, torch.device("cpu"), "aot_eager", None, "").compile(list(inputs.values()))
        assert not reads_late(partial(run, forward, *inputs.values()), residuals)
        silent = Forward(CompiledModel(small.unet(**small.SHALLOW)), contract)
        assert not reads_late(partial(silent, *inputs.values()), residuals)
        assert not reads_late(partial(silent, *inputs.values()), [])
    assert all(torch.equal(residual, value) for residual, value in zip(residuals, before, strict=True))


def test_a_controlnet_and_a_unet_without_residuals_come_to_no_mark():
    unet = small.unet(**small.TINY)
    for module, control in ((small.controlnet(unet), True), (unet, False)):
        contract = resolve_subject(module).contract("float32", control=control)
        tensors = [torch.ones(shape) for shape in contract.input_shapes(Geometry(2, 9, 13, 7)).values()]
        marks = []
        with torch.no_grad(), at_residuals(lambda marks=marks: marks.append(1)):
            Forward(CompiledModel(module, marks_residuals=True), contract)(*tensors)
        assert not marks


class Graph:
    """In place of a CUDA graph, which replays nothing: what is shown is what is copied, and when."""

    def capture_begin(self, **_):
        pass

    capture_end = replay = capture_begin


@pytest.mark.parametrize("begins_early", [True, False])
def test_no_residual_is_copied_before_it_is_there(begins_early, monkeypatch):
    """A compiler that reads residuals early leaves one graph, which then waits for all; outputs are nobody else's memory."""
    for name, stand_in in (("CUDAGraph", Graph), ("synchronize", lambda: None), ("empty_cache", lambda: None)):
        monkeypatch.setattr(torch.cuda, name, stand_in)
    inputs, made, seen = [torch.zeros(2), torch.zeros(2)], [], []

    def launch():
        await_residuals(inputs[1:], inputs[0])
        made.append((inputs[0] + inputs[1],))
        return made[-1]

    captured = CapturedCall(launch, inputs, [False, begins_early], None)
    given, residual = [torch.ones(2), torch.zeros(2)], torch.full((2,), 7.0)

    def arrive():
        seen.append(inputs[0].clone())
        given[1].copy_(residual)

    outputs = captured.replay(given, arrive)
    assert torch.equal(inputs[1], residual)
    assert [bool(value.all()) for value in seen] == [begins_early]
    assert outputs is made[0]
    assert outputs[0].data_ptr() != made[1][0].data_ptr()


def tensors(count=3):
    """Tensors that are not on the CPU, without a GPU: only what PyTorch knows of them matters here."""
    return [torch.zeros(2, device="meta") for _ in range(count)]


def test_what_was_noted_and_not_changed_is_ready():
    ready, (sample, text, time) = ReadyInputs(), tensors()
    assert ready.find([sample], "stream") is None

    def find(values, stream="stream"):
        ready.note([sample, text, time, 3.0, None, torch.zeros(2)], "stream", lambda: "event")
        return ready.find(values, stream)

    assert find([sample, text]) == "event"
    assert find([sample, text, 7, None, torch.ones(1)]) == "event"  # on the CPU it is read when it is passed
    assert find([7, None, torch.ones(1)]) is None
    assert find([sample], "another stream") is None
    assert find([sample, *tensors(1)]) is None
    assert find([sample[:]]) is None


def test_an_event_is_for_one_unet_of_one_frame():
    """A loop with the same noise, text and time: what the caller does with an image comes before the next one is begun."""
    ready, (sample, text, _) = ReadyInputs(), tensors()
    events = iter(("first frame", "second frame"))
    for expected in ("first frame", "second frame"):
        ready.note([sample, text], "stream", lambda: next(events))
        assert ready.find([sample, text], "stream") == expected
        assert ready.find([sample, text], "stream") is None


def test_what_was_changed_since_is_not_ready():
    ready, (sample, text, _) = ReadyInputs(), tensors()
    ready.note([sample, text], "stream", lambda: "event")
    text[:1].add_(1)  # through a view
    assert ready.find([sample, text], "stream") is None
    ready.note([sample, text], "stream", lambda: "later")
    text.add_(1)
    assert ready.find([sample], "stream") == "later"


def test_a_second_controlnet_of_the_frame_keeps_the_first_ones_event():
    ready, (sample, text, time) = ReadyInputs(), tensors()
    events = iter(("first", "second", "third"))
    ready.note([sample, text], "stream", lambda: next(events))
    ready.note([sample, text], "stream", lambda: next(events))
    assert ready.find([sample, text], "stream") == "first"
    ready.note([sample, text], "stream", lambda: next(events))
    ready.note([sample, text, time], "stream", lambda: next(events))
    assert ready.find([sample, text], "stream") == "third"


def test_what_hides_its_changes_or_went_is_never_ready():
    ready, (sample,) = ReadyInputs(), tensors(1)
    with torch.inference_mode():
        hidden = torch.zeros(2, device="meta")
    ready.note([sample], "stream", lambda: "event")
    assert ready.find([sample, hidden], "stream") is None
    ready.note([sample, hidden], "stream", lambda: "event")
    assert ready.find([sample], "stream") is None
    ready.note([sample], "stream", lambda: "event")
    number = id(sample)
    del sample
    gc.collect()
    again = tensors(50)
    assert all(ready.find([tensor], "stream") is None for tensor in again), number
