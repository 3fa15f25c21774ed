"""A session of ONNX Runtime reads at every call what its tensors hold then.

Some tests run against a STAND-IN for ONNX Runtime's session, written here: it copies an input that lies on another device when
it is bound, and a CUDA graph of it reads and writes where the first call of its number did. Nothing it shows is a result of
ONNX Runtime; what a GPU shows is in test_gpu_sessions.py.
"""

from __future__ import annotations

import ctypes
import math
import random
from contextlib import contextmanager
from types import SimpleNamespace

import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper

from shapecheck import ShapecheckError
from shapecheck.runtime import onnx_session
from shapecheck.runtime.onnx_session import OnnxSession

NAMES = ("sample", "timestep", "residual")
WEIGHTS = (1.0, 100.0, 10_000.0)
SHAPES = ((2, 3), (4, 3), (1, 3))


def computed(inputs):
    """Every input acts, with a weight of its own."""
    return sum(weight * inputs[name] for name, weight in zip(NAMES, WEIGHTS, strict=True))


def written(path, outputs, *nodes):
    """Write a graph of these nodes, whose inputs are `NAMES`."""
    ports = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", 3]) for name in (*NAMES, *outputs)]
    weights = [helper.make_tensor(f"weight{number}", TensorProto.FLOAT, [], [weight]) for number, weight in enumerate(WEIGHTS)]
    graph = helper.make_graph(list(nodes), "weighted", ports[: len(NAMES)], ports[len(NAMES) :], weights)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)
    return path


def memory(address, shape):
    """The floats that lie there, as a tensor."""
    return torch.frombuffer((ctypes.c_float * math.prod(shape)).from_address(address), dtype=torch.float32).view(shape)


class StandIn:
    """In place of an InferenceSession that reads its inputs on a GPU, where every tensor of this machine is elsewhere."""

    def __init__(self, place="Cuda", *, graphs=False):
        self.place, self.graphs = place, {} if graphs else None
        self.provider = "CUDAExecutionProvider"
        self.addresses = {}
        """Where each input was bound last."""

    def get_inputs(self):
        return [SimpleNamespace(name=name) for name in NAMES]

    def get_outputs(self):
        return [SimpleNamespace(name="image")]

    def get_input_memory_infos(self):
        return [SimpleNamespace(name=self.place) for _ in NAMES]

    def get_providers(self):
        return [self.provider]

    def io_binding(self):
        return StandInBinding(self.graphs is not None, self.addresses)

    def run_with_iobinding(self, binding, options=None):
        if self.graphs is not None:
            binding = self.graphs.setdefault(options.get_run_config_entry("gpu_graph_id"), binding)
        binding.image = computed({name: read() for name, read in binding.inputs.items()})
        if binding.output is not None:
            memory(*binding.output).copy_(binding.image)


class StandInBinding:
    def __init__(self, in_place, addresses):
        self.in_place, self.addresses, self.inputs, self.output = in_place, addresses, {}, None

    def bind_input(self, name, device, number, element, shape, address):
        self.addresses[name] = address
        copy = None if self.in_place else memory(address, shape).clone()
        self.inputs[name] = lambda: memory(address, shape) if copy is None else copy

    def bind_output(self, name, device, number=0, element=1, shape=(), address=0):
        self.output = (address, shape) if address else None

    def get_outputs(self):
        return [SimpleNamespace(numpy=self.image.numpy)]


class OneStream:
    """In place of the session's GPU: memory of the CPU, one stream that does everything at once."""

    name, handle = "cpu", 7

    def __init__(self):
        self.outer, self.settled = False, 0

    def is_capturing(self):
        return self.outer

    @contextmanager
    def stream(self, *, own):
        assert own
        yield self.handle

    def synchronize(self):
        self.settled += 1


def open_real(folder):
    products = [helper.make_node("Mul", [name, f"weight{number}"], [f"{name}_"]) for number, name in enumerate(NAMES)]
    total = helper.make_node("Sum", [f"{name}_" for name in NAMES], ["image"])
    return OnnxSession.open(written(folder / "weighted.onnx", ["image"], *products, total))


def open_copying(_folder):
    return OnnxSession(StandIn(), "ort-cuda", torch.device("cpu"))


class Frames:
    """Calls as a program makes them: tensors changed in place, exchanged, or freed with others at their addresses."""

    def __init__(self, seed):
        self.random, self.generator = random.Random(seed), torch.Generator().manual_seed(seed)
        self.rooms = {name: torch.empty(16) for name in NAMES}
        self.tensors = {}
        self.begin(SHAPES[0])

    def begin(self, shape):
        """New tensors, at the addresses of those before."""
        self.tensors = {name: room[: math.prod(shape)].view(shape) for name, room in self.rooms.items()}
        for tensor in self.tensors.values():
            tensor.normal_(generator=self.generator)

    def step(self):
        name, shape = self.random.choice(NAMES), self.tensors["sample"].shape
        match self.random.randrange(5):
            case 0:
                self.tensors[name].add_(1)
            case 1:
                self.tensors[name] = torch.randn(shape, generator=self.generator)
            case 2:
                self.begin(self.random.choice(SHAPES))
            case 3:
                self.tensors[name] = torch.randn(shape[::-1], generator=self.generator).T
            case 4:
                self.tensors[name] = self.tensors[self.random.choice(NAMES)]
        return dict(self.tensors)


@pytest.mark.parametrize("make", [open_real, open_copying])
@pytest.mark.parametrize("seed", range(3))
def test_what_tensors_hold_at_a_call_is_what_it_reads(make, seed, tmp_path):
    """Two sessions in turns, whose outputs are new or written where the caller says."""
    frames, sessions = Frames(seed), [make(tmp_path), make(tmp_path)]
    for number in range(60):
        inputs = frames.step()
        expected = computed(inputs)
        given = {"image": torch.empty(expected.shape)} if frames.random.random() < 0.5 else {}
        found = sessions[number % 2](inputs, given)
        torch.testing.assert_close(found["image"], expected)
        assert not given or found["image"] is given["image"]


def test_an_input_that_lies_in_an_output_is_read_before_it_is_written(tmp_path):
    early = helper.make_node("Mul", ["sample", "weight1"], ["early"])
    late = helper.make_node("Sum", ["early", "sample", "timestep", "residual"], ["late"])
    session = OnnxSession.open(written(tmp_path / "aliased.onnx", ["early", "late"], early, late))
    room = torch.rand(5, 3)
    inputs = {"sample": room[1:3], "timestep": torch.rand(2, 3), "residual": torch.rand(2, 3)}
    for output in (room[1:3], room[2:4], room[:2], room[3:]):
        product = inputs["sample"] * WEIGHTS[1]
        expected = {"early": product, "late": product + sum(inputs.values())}
        torch.testing.assert_close(session(inputs, {"early": output, "late": torch.empty(2, 3)}), expected)


def test_an_output_in_another_order_is_refused_and_not_filled_in_the_wrong_one(tmp_path):
    session, inputs = open_real(tmp_path), dict.fromkeys(NAMES, torch.rand(2, 3))
    with pytest.raises(ShapecheckError, match="image: ONNX Runtime writes in one piece; pass contiguous tensors for outputs"):
        session(inputs, {"image": torch.empty(3, 2).T})
    torch.testing.assert_close(session(inputs, {"image": torch.empty(2, 3)})["image"], computed(inputs))


def test_an_empty_tensor_is_served_or_refused_and_never_read(tmp_path):
    session, empty = open_real(tmp_path), dict.fromkeys(NAMES, torch.empty(0, 3))
    try:
        assert session(empty)["image"].shape == (0, 3)
    except ShapecheckError as error:
        assert "ONNX Runtime cannot run this call" in str(error)
    inputs = dict.fromkeys(NAMES, torch.ones(2, 3))
    torch.testing.assert_close(session(inputs)["image"], computed(inputs))


# on a GPU: how ONNX Runtime is called


def test_an_input_that_begins_where_no_kernel_may_is_copied_on_a_gpu_and_no_other():
    """cuDNN reads several numbers at once. `inputs` has two that begin at multiples of 256 bytes, and one that does not."""
    room = torch.rand(400)
    first = -room.data_ptr() % 256 // room.element_size()
    inputs = {name: room[first + at :][:6].view(2, 3) for name, at in zip(NAMES, (0, 65, 128), strict=True)}
    for backend, odd in (("ort", False), ("ort-cuda", True), ("ort-trt", True)):
        model = StandIn()
        session = OnnxSession(model, backend, torch.device("cpu"), gpu=OneStream())
        torch.testing.assert_close(session(inputs)["image"], computed(inputs))
        copied = {name for name, tensor in inputs.items() if model.addresses[name] != tensor.data_ptr()}
        assert copied == ({"timestep"} if odd else set())


class Noting(StandIn):
    """Notes the options of every run."""

    def __init__(self, place="Cuda", **options):
        super().__init__(place, **options)
        self.options = []

    def run_with_iobinding(self, binding, options=None):
        keys = ("disable_synchronize_execution_providers", "gpu_graph_id")
        self.options.append({key: value for key in keys if options and (value := _read(options, key))})
        super().run_with_iobinding(binding, options)


def _read(options, key):
    try:
        return options.get_run_config_entry(key)
    except RuntimeError:
        return ""


def test_onnx_runtime_waits_for_the_gpu_where_it_brings_something_to_the_cpu_and_now_and_then():
    """Buffers in pinned memory are given back only when it waits: with none that does, they would fill the memory."""
    model, gpu = Noting(), OneStream()
    inputs = dict.fromkeys(NAMES, torch.ones(2, 3))
    with OnnxSession(model, "ort-cuda", torch.device("cpu"), gpu=gpu) as session:
        session(inputs)
        assert model.options == [{}]
        for _ in range(200):
            session(inputs, {"image": torch.empty(2, 3)})
        waits = [number for number, options in enumerate(model.options[1:]) if not options]
        assert 2 <= len(waits) <= 10
        assert all(options in ({}, {"disable_synchronize_execution_providers": "1"}) for options in model.options)
    assert gpu.settled == 1


def test_a_call_is_no_part_of_a_graph_that_pytorch_captures():
    gpu = OneStream()
    session = OnnxSession(StandIn(), "ort-cuda", torch.device("cpu"), gpu=gpu)
    inputs = dict.fromkeys(NAMES, torch.ones(2, 3))
    gpu.outer = True
    with pytest.raises(ShapecheckError, match="PyTorch is capturing a CUDA graph, of which a call of ONNX Runtime cannot be"):
        session(inputs)
    gpu.outer = False
    torch.testing.assert_close(session(inputs)["image"], computed(inputs))


@pytest.mark.parametrize("seed", range(3))
def test_a_graph_reads_what_tensors_hold_at_a_call_wherever_they_lie(seed):
    """A graph a size, in ONNX Runtime's own numbering; outputs that a caller keeps are his."""
    model, frames, kept = Noting(graphs=True), Frames(seed), {}
    session = OnnxSession(model, "ort-cuda", torch.device("cpu"), gpu=OneStream(), graphs=True)
    for _ in range(60):
        inputs = frames.step()
        expected, shape = computed(inputs), inputs["sample"].shape
        usual = kept.setdefault(shape, torch.empty(shape))
        output = usual if frames.random.random() < 0.7 else torch.empty(shape)
        found = session(inputs, {"image": output})["image"]
        assert found is output
        torch.testing.assert_close(found, expected)
    assert {tuple(options) for options in model.options} == {("gpu_graph_id",)}
    assert len(model.graphs) == len(kept) > 1


def test_ort_trt_replays_the_graph_of_one_size_alone_and_says_so():
    session = OnnxSession(Noting(graphs=True), "ort-trt", torch.device("cpu"), gpu=OneStream(), graphs=True)
    for shape in (SHAPES[0], SHAPES[0]):
        inputs = {name: torch.rand(shape) for name in NAMES}
        torch.testing.assert_close(session(inputs, {"image": torch.empty(shape)})["image"], computed(inputs))
    with pytest.raises(ShapecheckError, match="ort-trt keeps a CUDA graph of one size alone: open the file again for another"):
        session({name: torch.rand(SHAPES[1]) for name in NAMES}, {"image": torch.empty(SHAPES[1])})
    torch.testing.assert_close(session(inputs, {"image": torch.empty(shape)})["image"], computed(inputs))


def test_what_no_graph_can_serve_is_refused():
    with pytest.raises(ShapecheckError, match=r"sample, timestep, residual: read by the CPU, .*; open it without graphs"):
        OnnxSession(StandIn("Cpu"), "ort-cuda", torch.device("cuda", 0), gpu=OneStream(), graphs=True)
    session = OnnxSession(Noting(graphs=True), "ort-cuda", torch.device("cpu"), gpu=OneStream(), graphs=True)
    with pytest.raises(ShapecheckError, match="image: its size is not known before the call; open the file without graphs"):
        session(dict.fromkeys(NAMES, torch.ones(2, 3)))


def test_an_onnx_runtime_that_does_not_say_where_it_reads_serves_the_cpu_alone(monkeypatch):
    monkeypatch.delattr(StandIn, "get_input_memory_infos")
    with pytest.raises(ShapecheckError, match=r"does not say where it reads inputs on a GPU: install 1\.23\.2 or later"):
        OnnxSession(StandIn(), "ort-cuda", torch.device("cuda", 0), gpu=OneStream())
    inputs = dict.fromkeys(NAMES, torch.ones(2, 3))
    torch.testing.assert_close(OnnxSession(StandIn(), "ort", torch.device("cpu"))(inputs)["image"], computed(inputs))


# opening


@pytest.fixture
def opened(monkeypatch):
    """The providers that ONNX Runtime was asked for, where PyTorch sees a GPU."""
    asked = []

    def open_session(source, settings, *, providers, enable_fallback):
        assert not enable_fallback  # it would only print why a provider refuses
        asked.extend(providers)
        model = StandIn()
        model.provider = providers[0][0]
        return model

    monkeypatch.setattr(onnxruntime, "InferenceSession", open_session)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(onnx_session, "Gpu", lambda _name: OneStream())
    return asked


@pytest.mark.parametrize(("backend", "graph"), [("ort-cuda", "enable_cuda_graph"), ("ort-trt", "trt_cuda_graph_enable")])
def test_a_provider_is_given_the_stream_of_the_session_and_asked_for_graphs(backend, graph, opened):
    OnnxSession.open(b"", backend=backend, options={"use_tf32": "0"})
    OnnxSession.open(b"", backend=backend, graphs=True)
    (_, plain), (_, captured) = opened
    assert plain == {"device_id": "0", "use_tf32": "0", "user_compute_stream": "7"}
    assert captured == {"device_id": "0", "user_compute_stream": "7", graph: "True"}


@pytest.mark.parametrize("key", ["enable_cuda_graph", "trt_cuda_graph_enable", "user_compute_stream"])
def test_an_option_that_changes_how_a_session_has_to_call_is_not_the_callers(key, opened):
    """ONNX Runtime would replay its graph at the addresses of the first call, in silence."""
    with pytest.raises(ShapecheckError, match=f"{key}: set by the session itself; for CUDA graphs pass graphs=True"):
        OnnxSession.open(b"", backend="ort-cuda", options={key: "1"})
    assert opened == []


def test_a_file_that_cannot_be_captured_is_refused_with_the_option(opened, monkeypatch):
    def refuse(*_args, **_options):
        raise RuntimeError("This session cannot use the graph capture feature as requested by the user")

    monkeypatch.setattr(onnxruntime, "InferenceSession", refuse)
    with pytest.raises(ShapecheckError, match=r"cannot load the model: This session .*; open it without graphs$"):
        OnnxSession.open(b"", backend="ort-cuda", graphs=True)


def test_a_pytorch_without_cuda_is_told_beside_an_onnx_runtime_that_has_it(opened, monkeypatch):
    monkeypatch.undo()
    monkeypatch.setattr(onnxruntime, "InferenceSession", lambda *_args, **_options: StandIn())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ShapecheckError, match="this runs on an NVIDIA GPU, and PyTorch sees none here"):
        OnnxSession.open(b"", backend="ort-cuda")
