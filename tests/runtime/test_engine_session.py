"""What can be said of the TensorRT session where no TensorRT runs.

The second part runs against a STAND-IN for the module `tensorrt`, written here. Nothing it shows is a result of TensorRT: it
shows in which order the session calls, what it binds, and that a refusal leaves it usable. What a GPU shows is marked `gpu`,
in a file of its own.
"""

from __future__ import annotations

import ctypes
import hashlib
import importlib
import json
import math
import sys
import threading
import weakref
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from types import ModuleType, SimpleNamespace

import pytest
import torch

from shapecheck import ContractError, Geometry, ShapecheckError, presets
from shapecheck.runtime import engine_session
from shapecheck.runtime.binding import CallError
from shapecheck.runtime.engine_session import EngineSession
from shapecheck.runtime.load import load
from shapecheck.tensorrt.profiles import Range, profile_of
from shapecheck.tensorrt.record import BuildOptions, BuildRequest, Engine

SMALL = Range(Geometry(1, 4, 5), Geometry(2, 9, 12), Geometry(3, 9, 13))
LARGE = Range(Geometry(1, 10, 5), Geometry(2, 11, 12), Geometry(3, 12, 13))
CONTRACT = presets.contract("sd15")
CODES = {"float32": "FLOAT", "float16": "HALF", "bfloat16": "BF16", "int64": "INT64", "int32": "INT32", "bool": "BOOL"}
NAMES = {name: f"their_{name}" for name in CONTRACT.input_rules}


def request_for(contract=CONTRACT, **changes):
    made = BuildRequest(
        contract, (profile_of(contract, SMALL), profile_of(contract, LARGE)), tuple(NAMES.items()), ("out_sample",),
        "sha256:0", "sha256:1", "", BuildOptions(), "10.16.1.11", "NVIDIA H100 (9.0)",
    )  # fmt: skip
    return replace(made, **changes)


def described(request):
    """The plan that the stand-in loads: what a real engine would say of itself, as JSON."""
    rules, dtypes = request.contract.input_rules, request.contract.input_dtypes
    inputs = [
        {
            "name": theirs,
            "input": True,
            "dtype": CODES[dtypes[ours]],
            "shape": [dim.scale if dim.symbol is None else -1 for dim in rules[ours]],
            "bounds": [list(map(list, profile.bounds(ours).shapes)) for profile in request.profiles],
        }
        for ours, theirs in request.names
    ]
    outputs = [
        {"name": name, "input": False, "dtype": "FLOAT", "shape": [-1, 4, -1, -1], "bounds": []} for name in request.outputs
    ]
    return {"name": request.contract.digest, "profiles": len(request.profiles), "tensors": [*inputs, *outputs], "host": []}


def written(folder, request=None, plan=None, name="unet.plan"):
    """An engine file with its record beside it."""
    request = request or request_for()
    data = plan if isinstance(plan, bytes) else json.dumps(plan or described(request)).encode()
    path = folder / name
    path.write_bytes(data)
    record = Engine(request, f"sha256:{hashlib.sha256(data).hexdigest()}", len(data))
    (folder / f"{name}.shapecheck.json").write_text(record.to_json(), encoding="utf-8")
    return path


def place_aligned(tensor):
    """The same in memory that begins where a GPU's does, at a multiple of 256 bytes."""
    room = torch.empty(tensor.nbytes + 256, dtype=torch.uint8)
    start = -room.data_ptr() % 256
    return room[start : start + tensor.nbytes].view(tensor.dtype).view(tensor.shape).copy_(tensor)


def inputs_at(geometry, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = CONTRACT.input_shapes(geometry)
    return {name: place_aligned(torch.rand(shape, generator=generator)) for name, shape in shapes.items()}


def computed(inputs):
    """What the stand-in computes: every input acts, and every slot with a weight of its own."""
    total = inputs["sample"] + inputs["timestep"][:, None, None, None] + inputs["encoder_hidden_states"].mean()
    for weight, slot in enumerate(CONTRACT.slots, start=1):
        total = total + weight * inputs[slot.name].mean(dim=(1, 2, 3))[:, None, None, None]
    return total


# files, records and what is installed: no TensorRT at all


def test_an_engine_without_its_record_is_refused(tmp_path):
    path = written(tmp_path)
    (tmp_path / "unet.plan.shapecheck.json").unlink()
    with pytest.raises(
        ShapecheckError, match=r"unet\.plan has no unet\.plan\.shapecheck\.json beside it, .*copy both together"
    ):
        EngineSession.open(path)


RECORDS = {
    "empty": (b"", "not an engine's record: not JSON (Expecting value"),
    "torn": (b'{"shapecheck_engine": 1, "key"', "not an engine's record: not JSON (Expecting"),
    "another file": (b"[]", "not an engine's record: no key 'shapecheck_engine'; `shapecheck build` writes one"),
    "another schema": (
        b'{"shapecheck_engine": 2}',
        "an engine's record of schema 2; this release reads schema 1: build the engine again",
    ),
    "no text": (b"\xff\xfe\x00", "is not UTF-8 text, as an engine's record is"),
    "fields missing": (b'{"shapecheck_engine": 1}', "a damaged engine's record: no key 'contract'"),
    "deep": (b'{"shapecheck_engine": ' + b"[" * 100_000, "not an engine's record: not JSON ("),
}


@pytest.mark.parametrize("case", RECORDS)
def test_a_damaged_record_is_refused_with_its_name(case, tmp_path):
    path = written(tmp_path)
    (tmp_path / "unet.plan.shapecheck.json").write_bytes(RECORDS[case][0])
    with pytest.raises(ShapecheckError, match=r"unet\.plan\.shapecheck\.json") as caught:
        EngineSession.open(path)
    assert RECORDS[case][1] in str(caught.value)


def test_an_edited_record_is_refused(tmp_path):
    path = written(tmp_path)
    record = tmp_path / "unet.plan.shapecheck.json"
    record.write_text(record.read_text(encoding="utf-8").replace("NVIDIA H100 (9.0)", "NVIDIA L4 (8.9)"), encoding="utf-8")
    with pytest.raises(ShapecheckError, match="an edited engine's record: its checksum is not that of its contents; build"):
        EngineSession.open(path)


def test_a_record_without_its_engine_is_refused(tmp_path):
    path = written(tmp_path)
    path.unlink()
    with pytest.raises(ShapecheckError, match=r"no engine at .*unet\.plan, although its record is there; copy both together"):
        EngineSession.open(path)
    path.mkdir()
    with pytest.raises(ShapecheckError, match="no engine at"):
        EngineSession.open(path)


def test_a_file_that_is_not_the_one_of_the_record_is_refused_before_anything_is_loaded(tmp_path):
    path = written(tmp_path)
    data = path.read_bytes()
    path.write_bytes(data[:-3])
    size = len(data)
    with pytest.raises(ShapecheckError, match=rf"unet\.plan has {size - 3} bytes, its record says {size}: is one of them cut"):
        EngineSession.open(path)
    path.write_bytes(data[:-1] + b"!")
    with pytest.raises(ShapecheckError, match=r"unet\.plan is sha256:\w{64}, its record says sha256:\w{64}; copy both"):
        EngineSession.open(path)
    path.write_bytes(b"")
    with pytest.raises(ShapecheckError, match=r"cannot read .*unet\.plan: cannot mmap an empty file"):
        EngineSession.open(path, verify=False)


@pytest.mark.parametrize(("target", "module", "extra"), [("trt", "tensorrt", "gpu"), ("rtx", "tensorrt_rtx", "rtx")])
def test_without_tensorrt_the_error_says_what_to_install(target, module, extra, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, module, None)
    path = written(tmp_path, request_for(options=BuildOptions(target)))
    with pytest.raises(ShapecheckError, match=rf"needs the package {module}: pip install 'shapecheck-controlnet\[{extra}\]'"):
        EngineSession.open(path)


def test_tensorrt_that_is_installed_and_does_not_load_is_told_apart(tmp_path, monkeypatch):
    def load(name):
        raise ImportError("libnvinfer.so.10: cannot open shared object file")

    monkeypatch.setattr(importlib, "import_module", load)
    with pytest.raises(ShapecheckError, match=r"tensorrt is installed and does not load: libnvinfer.*`shapecheck doctor`"):
        EngineSession.open(written(tmp_path))


def test_graphs_of_an_engine_for_rtx_are_refused(tmp_path):
    path = written(tmp_path, request_for(options=BuildOptions("rtx")))
    with pytest.raises(ShapecheckError, match="captures no engine that was not built for it; open it without graphs"):
        EngineSession.open(path, graphs=True)


class Cpu:
    """In place of the session's GPU: memory of the CPU, one stream that does everything at once."""

    name = "cpu"

    def __init__(self, wanted=None):
        self.settled = 0
        self.uncapturable = ""
        self.outer = False

    def is_capturing(self):
        return self.outer

    def activate(self):
        return nullcontext()

    @contextmanager
    def stream(self):
        yield 7

    def capture(self, launch):
        if self.uncapturable:
            raise ShapecheckError(self.uncapturable)
        work = sys.modules["tensorrt"].capturing = []
        launch()
        sys.modules["tensorrt"].capturing = None
        return lambda: [each() for each in work]

    def allocate(self, shape, dtype):
        return place_aligned(torch.full(shape, math.nan, dtype=dtype))

    def synchronize(self):
        self.settled += 1

    def require_memory(self, needed, purpose):
        self.required = [*getattr(self, "required", ()), (needed, purpose)]


def test_what_tensorrt_for_rtx_itself_says_of_a_damaged_engine_is_told(tmp_path, monkeypatch):
    """A result of TensorRT for RTX: its runtime, its logger, and bytes that are mapped rather than read."""
    pytest.importorskip("tensorrt_rtx")
    monkeypatch.setattr(engine_session, "Gpu", Cpu)
    path = written(tmp_path, request_for(options=BuildOptions("rtx")), b"no engine, but long enough to be looked at " * 9)
    with pytest.raises(ShapecheckError, match=r"TensorRT refuses to load .*unet\.plan\n.*deserializeCudaEngine") as caught:
        EngineSession.open(path)
    assert "it was built by 10.16.1.11 on NVIDIA H100 (9.0), and tensorrt_rtx here is" in str(caught.value)


# THE STAND-IN: what follows is no result of TensorRT


class StandIn(ModuleType):
    """In place of the module `tensorrt`: notes what is called, and computes on the CPU from the addresses it was given."""

    __version__ = "0.stand.in"

    class ILogger:
        INTERNAL_ERROR, ERROR, WARNING, INFO = range(4)

    TensorIOMode = SimpleNamespace(INPUT=1, OUTPUT=2)
    TensorLocation = SimpleNamespace(DEVICE=SimpleNamespace(name="DEVICE"), HOST=SimpleNamespace(name="HOST"))

    def __init__(self):
        super().__init__("tensorrt")
        self.calls, self.refuse, self.capturing = [], {}, None
        self.runtimes, self.engines, self.contexts = [], [], []
        self.gpus, self.loggers, self.busy = [], [], None
        self.output = lambda shape: shape

    def Runtime(self, logger):  # noqa: N802
        self.loggers.append(logger)
        runtime = Runtime(self, logger)
        self.runtimes.append(weakref.ref(runtime))
        return runtime

    def note(self, logger, method, *arguments):
        """Whether the call is carried out; the logger is told where it is not."""
        self.calls.append((method, *arguments))
        if self.refuse.get(method) in ("*", *arguments[:1]):
            logger.log(self.ILogger.ERROR, f"{method}: Error Code 3: API Usage Error\n")
            return False
        return True

    def taken(self):
        """The calls since it was last asked."""
        calls, self.calls = self.calls, []
        return calls


class Runtime:
    engine_host_code_allowed = False

    def __init__(self, trt, logger):
        self.trt, self.logger = trt, logger

    def deserialize_cuda_engine(self, data):
        self.trt.host_code = self.engine_host_code_allowed
        self.logger.log(StandIn.ILogger.WARNING, "Using an engine plan file across different models of devices")
        if bytes(data[:1]) != b"{":
            self.logger.log(StandIn.ILogger.ERROR, "Serialization assertion failed")
            return None
        engine = StandInEngine(self.trt, self.logger, json.loads(bytes(data)))
        self.trt.engines.append(weakref.ref(engine))
        return engine


class StandInEngine:
    def __init__(self, trt, logger, plan):
        self.trt, self.logger, self.plan = trt, logger, plan
        self.name, self.num_optimization_profiles = plan["name"], plan["profiles"]
        self.num_io_tensors = len(plan["tensors"])
        self.device_memory_size_v2 = 12345
        self.table = {each["name"]: each for each in plan["tensors"]}

    def get_tensor_name(self, number):
        return self.plan["tensors"][number]["name"]

    def get_tensor_mode(self, name):
        return StandIn.TensorIOMode.INPUT if self.table[name]["input"] else StandIn.TensorIOMode.OUTPUT

    def get_tensor_dtype(self, name):
        return SimpleNamespace(name=self.table[name]["dtype"])

    def get_tensor_location(self, name):
        return StandIn.TensorLocation.HOST if name in self.plan["host"] else StandIn.TensorLocation.DEVICE

    def get_tensor_shape(self, name):
        return list(self.table[name]["shape"])

    def get_tensor_profile_shape(self, name, profile):
        return [list(each) for each in self.table[name]["bounds"][profile]]

    def create_execution_context(self):
        if not self.trt.note(self.logger, "create_execution_context"):
            return None
        context = Context(self)
        self.trt.contexts.append(weakref.ref(context))
        return context


class Context:
    """Strict where TensorRT's headers are: addresses and shapes before work, shapes within the profile."""

    def __init__(self, engine):
        self.engine, self.trt, self.logger = engine, engine.trt, engine.logger
        self.active_optimization_profile = 0
        self.shapes, self.addresses = {}, {}

    def set_optimization_profile_async(self, number, stream):
        done = self.trt.note(self.logger, "set_optimization_profile_async", number, stream)
        if done:
            self.active_optimization_profile = number
            self.shapes.clear()
            self.addresses.clear()
        return done

    def set_input_shape(self, name, shape):
        least, _, most = self.engine.table[name]["bounds"][self.active_optimization_profile]
        within = all(low <= size <= high for low, size, high in zip(least, shape, most, strict=True))
        done = self.trt.note(self.logger, "set_input_shape", name, shape) and within
        if done:
            self.shapes[name] = shape
        return done

    def infer_shapes(self):
        if not self.trt.note(self.logger, "infer_shapes"):
            raise RuntimeError("shape inference failed")
        if self.trt.refuse.get("unresolved"):
            return ["their_sample"]
        return [name for name, each in self.engine.table.items() if each["input"] and name not in self.shapes]

    def get_tensor_shape(self, name):
        return self.trt.output(list(self.shapes["their_sample"]))

    def set_tensor_address(self, name, address):
        done = self.trt.note(self.logger, "set_tensor_address", name, address)
        if done:
            self.addresses[name] = address
        return done

    def execute_async_v3(self, stream):
        if not self.trt.note(self.logger, "execute_async_v3", stream):
            return False
        assert set(self.addresses) == set(self.engine.table)
        assert not self.infer_shapes()
        self.trt.calls.pop()
        tensors = {name: memory(self.addresses[theirs], self.shapes[theirs]) for name, theirs in NAMES.items()}
        output = memory(self.addresses["out_sample"], self.shapes["their_sample"])
        if self.trt.busy is not None:
            self.trt.busy()
        if self.trt.capturing is not None:
            self.trt.capturing.append(lambda: compute(tensors, output))
        else:
            compute(tensors, output)
        return True


def compute(tensors, output):
    """Writes before it reads, as an engine may."""
    output.fill_(math.nan)
    output.copy_(computed(tensors))


def memory(address, shape):
    """The floats that lie there, as a tensor."""
    floats = (ctypes.c_float * math.prod(shape)).from_address(address)
    return torch.frombuffer(floats, dtype=torch.float32).view(tuple(shape))


@pytest.fixture
def trt(monkeypatch):
    module = StandIn()

    def open_gpu(wanted=None):
        module.gpus.append(Cpu(wanted))
        return module.gpus[-1]

    monkeypatch.setitem(sys.modules, "tensorrt", module)
    monkeypatch.setattr(engine_session, "Gpu", open_gpu)
    return module


@pytest.fixture
def session(trt, tmp_path):
    with EngineSession.open(written(tmp_path)) as session:
        assert trt.taken() == [("create_execution_context",)]
        yield session


@pytest.fixture
def graphs(trt, tmp_path):
    with EngineSession.open(written(tmp_path), graphs=True) as session:
        assert trt.taken() == [("create_execution_context",)]
        yield session


def methods(calls):
    """In order, runs of one method told once."""
    return [each[0] for place, each in enumerate(calls) if not place or calls[place - 1][0] != each[0]]


AT, OTHER = Geometry(2, 5, 7), Geometry(2, 11, 13)
WHOLE = ["set_input_shape", "infer_shapes", "set_tensor_address", "execute_async_v3"]


def test_inputs_are_bound_where_they_lie_under_the_engines_names(trt, session):
    inputs = inputs_at(AT)
    outputs = session(inputs)
    calls = trt.taken()
    assert methods(calls) == WHOLE
    assert [each[1:] for each in calls if each[0] == "set_input_shape"] == [
        (NAMES[name], tuple(each.shape)) for name, each in inputs.items()
    ]
    assert {each[1]: each[2] for each in calls if each[0] == "set_tensor_address"} == {
        NAMES[name]: each.data_ptr() for name, each in inputs.items()
    } | {"out_sample": outputs["out_sample"].data_ptr()}
    assert calls[-1] == ("execute_async_v3", 7)
    torch.testing.assert_close(outputs["out_sample"], computed(inputs))
    assert list(outputs) == ["out_sample"]


def test_the_second_call_of_the_same_tensors_only_runs(trt, session):
    inputs = inputs_at(AT)
    first = session(inputs)["out_sample"]
    trt.taken()
    inputs["mid_block_residual"].add_(1)
    second = session(inputs)["out_sample"]
    assert trt.taken() == [("execute_async_v3", 7)]
    assert second.data_ptr() == first.data_ptr()
    torch.testing.assert_close(second, computed(inputs))


def test_only_what_lies_elsewhere_is_bound_again(trt, session):
    inputs = inputs_at(AT)
    session(inputs)
    trt.taken()
    moved = inputs["down_block_residual_07"] = place_aligned(inputs["down_block_residual_07"] * 2)
    torch.testing.assert_close(session(inputs)["out_sample"], computed(inputs))
    assert trt.taken() == [
        ("set_tensor_address", NAMES["down_block_residual_07"], moved.data_ptr()),
        ("execute_async_v3", 7),
    ]


def test_the_profile_is_switched_only_when_it_changes_and_before_the_shapes(trt, session):
    small = inputs_at(AT)
    session(small)
    trt.taken()
    large = inputs_at(OTHER) | {"timestep": small["timestep"]}
    torch.testing.assert_close(session(large)["out_sample"], computed(large))
    calls = trt.taken()
    assert methods(calls) == ["set_optimization_profile_async", *WHOLE]
    assert calls[0] == ("set_optimization_profile_async", 1, 7)
    assert sum(each[0] == "set_tensor_address" for each in calls) == len(NAMES) + 1
    session(inputs_at(replace(OTHER, width=12)))
    assert methods(trt.taken()) == WHOLE
    session(inputs_at(AT))
    assert trt.taken()[0] == ("set_optimization_profile_async", 0, 7)


def test_outputs_are_allocated_once_a_size_and_written_again(session):
    first, second = inputs_at(AT), inputs_at(AT, seed=1)
    kept = session(first)["out_sample"]
    copy = kept.clone()
    other = session(inputs_at(OTHER))["out_sample"]
    again = session(second)["out_sample"]
    assert again.data_ptr() == kept.data_ptr() != other.data_ptr()
    torch.testing.assert_close(kept, computed(second))
    torch.testing.assert_close(copy, computed(first))


def test_a_tensor_that_cannot_be_bound_where_it_lies_is_copied_and_no_other(trt, session):
    inputs = inputs_at(AT)
    strided = place_aligned(inputs["down_block_residual_03"].movedim(1, -1)).movedim(-1, 1)
    room = torch.empty(3)
    shifted = room[1:]
    shifted.copy_(inputs["timestep"])
    given = inputs | {"down_block_residual_03": strided, "timestep": shifted}
    torch.testing.assert_close(session(given)["out_sample"], computed(inputs))
    bound = {each[1]: each[2] for each in trt.taken() if each[0] == "set_tensor_address"}
    elsewhere = [name for name, each in given.items() if bound[NAMES[name]] != each.data_ptr()]
    assert elsewhere == ["timestep", "down_block_residual_03"]


def test_an_output_may_be_given_as_the_next_input(session):
    inputs = inputs_at(AT)
    for _ in range(3):
        expected = computed(inputs)
        inputs["sample"] = session(inputs)["out_sample"]
        torch.testing.assert_close(inputs["sample"], expected)
        inputs["encoder_hidden_states"] = torch.rand_like(inputs["encoder_hidden_states"])


def test_one_tensor_may_stand_for_several_slots(session):
    inputs = inputs_at(AT)
    inputs["down_block_residual_01"] = inputs["down_block_residual_02"] = torch.zeros_like(inputs["down_block_residual_01"])
    torch.testing.assert_close(session(inputs)["out_sample"], computed(inputs))


def test_the_order_of_the_mapping_does_not_matter(session):
    inputs = inputs_at(AT)
    for given in (inputs, dict(reversed(inputs.items())), inputs):
        torch.testing.assert_close(session(given)["out_sample"], computed(inputs))


# refusals


def test_a_call_that_does_not_fit_never_reaches_tensorrt_and_changes_nothing(trt, session):
    inputs = inputs_at(AT)
    session(inputs)
    trt.taken()
    with pytest.raises(CallError, match=r"down_block_residual_11 .*: missing: got nothing, expected 2×1280×1×1"):
        session({name: each for name, each in inputs.items() if name != "down_block_residual_11"})
    with pytest.raises(CallError, match="timestep: dtype: got int64, expected float32"):
        session(inputs | {"timestep": torch.tensor([1, 2])})
    with pytest.raises(CallError, match="sample: device: got a tensor on meta, expected one on cpu"):
        session(inputs | {"sample": inputs["sample"].to("meta")})
    with pytest.raises(CallError, match="down_block_residual_07: got 2×1280×2×5, profile 0 allows up to 3×1280×3×4") as caught:
        session(inputs_at(Geometry(2, 5, 17)))
    assert "or build for this one too: --sizes " in str(caught.value)
    assert trt.taken() == []
    session(inputs)
    assert trt.taken() == [("execute_async_v3", 7)]


def test_what_is_no_tensor_is_named(session):
    with pytest.raises(ShapecheckError, match="timestep: got float; mid_block_residual: got NoneType; expected tensors: with"):
        session(inputs_at(AT) | {"timestep": 1.0, "mid_block_residual": None})


def test_none_for_a_slot_is_refused_and_nothing_is_filled_in(session):
    session(inputs_at(AT))
    with pytest.raises(
        ShapecheckError, match=r"mid_block_residual: got NoneType; .* without a ControlNet pass zeros for every slot"
    ):
        session(inputs_at(AT) | {"mid_block_residual": None})


REFUSALS = {
    "set_optimization_profile_async": ("*", "TensorRT refuses to switch to profile 1"),
    "set_input_shape": ("their_mid_block_residual", "TensorRT refuses to take their_mid_block_residual of 2×1280×2×2"),
    "infer_shapes": ("*", "TensorRT refuses to work at batch 2, latent 11×13"),
    "set_tensor_address": ("their_timestep", "TensorRT refuses to bind their_timestep at 0x"),
    "execute_async_v3": ("*", "TensorRT refuses to run"),
}


@pytest.mark.parametrize("method", REFUSALS)
def test_a_refusal_of_tensorrt_is_told_in_its_words_and_the_session_goes_on(method, trt, session):
    before, inputs = inputs_at(AT, seed=3), inputs_at(OTHER)
    session(before)
    trt.refuse = {method: REFUSALS[method][0]}
    with pytest.raises(ShapecheckError) as caught:
        session(inputs)
    lines = str(caught.value).splitlines()
    assert lines[0].startswith(REFUSALS[method][1])
    assert lines[1] == f"  {method}: Error Code 3: API Usage Error"
    trt.refuse = {}
    for given in (before, inputs, before):
        torch.testing.assert_close(session(given)["out_sample"], computed(given))
    trt.refuse = {"execute_async_v3": "*"}
    with pytest.raises(ShapecheckError) as caught:
        session(inputs)
    assert len(str(caught.value).splitlines()) == 2, "the words of an earlier error are not told again"


def test_shapes_that_stay_unknown_are_named(trt, session):
    trt.refuse = {"unresolved": "their_sample"}
    with pytest.raises(ShapecheckError, match="refuses to work at batch 2, latent 5×7 without the shapes of their_sample"):
        session(inputs_at(AT))


@pytest.mark.parametrize(
    ("given", "told"),
    [([2, 8, 5, 7], "out_sample is 2×8×5×7 at batch 2, latent 5×7, expected 2×4×5×7"), ([2, 4, -1, 7], "2×4×-1×7 .*2×4×5×7")],
)
def test_an_output_of_another_shape_than_the_contracts_is_refused(given, told, trt, session):
    trt.output = lambda shape: given
    with pytest.raises(ShapecheckError, match=told):
        session(inputs_at(AT))
    trt.output = lambda shape: shape
    torch.testing.assert_close(session(inputs_at(AT))["out_sample"], computed(inputs_at(AT)))


def test_two_calls_at_once_are_an_error_and_no_crash(trt, session):
    inside, go_on = threading.Event(), threading.Event()
    trt.busy = lambda: (inside.set(), go_on.wait(10))
    inputs, results = inputs_at(AT), []
    thread = threading.Thread(target=lambda: results.append(session(inputs)))
    thread.start()
    assert inside.wait(10)
    for use in (lambda: session(inputs), session.close):
        with pytest.raises(ShapecheckError, match="this session is serving another call; open a session for each thread"):
            use()
    go_on.set()
    thread.join(10)
    trt.busy = None
    torch.testing.assert_close(results[0]["out_sample"], computed(inputs))
    torch.testing.assert_close(session(inputs)["out_sample"], computed(inputs))


def test_a_closed_session_refuses_and_has_given_everything_back(trt, tmp_path):
    session = EngineSession.open(written(tmp_path), graphs=True)
    inputs, (gpu,) = inputs_at(AT), trt.gpus
    session(inputs)
    output = session(inputs)
    assert [each() is not None for each in trt.contexts] == [True, True]
    session.close()
    session.close()
    assert gpu.settled == 1
    assert all(each() is None for each in (*trt.contexts, *trt.engines, *trt.runtimes))
    assert len(trt.engines) == len(trt.runtimes) == 1
    with pytest.raises(ShapecheckError, match=r"unet\.plan: this session is closed; open it again"):
        session(inputs)
    torch.testing.assert_close(output["out_sample"], computed(inputs))


def test_it_is_closed_when_a_with_block_ends_badly(trt, tmp_path):
    with pytest.raises(KeyError), EngineSession.open(written(tmp_path)) as session:
        raise KeyError
    assert trt.contexts[0]() is None
    with pytest.raises(ShapecheckError, match="closed"):
        session({})


# CUDA graphs: which calls are captured, replayed and dropped; that a graph works is for a GPU to show


def test_the_second_call_of_the_same_tensors_is_captured_in_a_context_of_its_own_and_then_replayed(trt, graphs):
    inputs = inputs_at(AT)
    graphs(inputs)
    assert methods(trt.taken()) == WHOLE
    inputs["sample"].add_(1)
    torch.testing.assert_close(graphs(inputs)["out_sample"], computed(inputs))
    calls = trt.taken()
    assert methods(calls) == ["create_execution_context", *WHOLE]
    assert calls[-2:] == [("execute_async_v3", 7)] * 2, "once for the results, once for the capture"
    for seed in (3, 4):
        for name, each in inputs_at(AT, seed).items():
            inputs[name].copy_(each)
        torch.testing.assert_close(graphs(inputs)["out_sample"], computed(inputs))
        assert trt.taken() == []


def test_without_graphs_nothing_is_captured(trt, session):
    inputs = inputs_at(AT)
    for _ in range(4):
        session(inputs)
    assert len(trt.contexts) == 1


def test_a_graph_is_dropped_when_an_address_or_a_size_changes_and_captured_again(trt, graphs):
    inputs = inputs_at(AT)
    for _ in range(3):
        graphs(inputs)
    moved = inputs | {"timestep": place_aligned(inputs["timestep"] + 3)}
    for given, expected in (
        (moved, ["set_tensor_address", "execute_async_v3"]),
        (moved, ["set_tensor_address", "execute_async_v3"]),
        (moved, []),
        (inputs_at(OTHER), ["set_optimization_profile_async", *WHOLE]),
        (moved, ["set_optimization_profile_async", *WHOLE]),
        (inputs, ["set_tensor_address", "execute_async_v3"]),
        (inputs, ["set_tensor_address", "execute_async_v3"]),
        (inputs, []),
    ):
        trt.taken()
        torch.testing.assert_close(graphs(given)["out_sample"], computed(given))
        assert methods(trt.taken()) == expected
    assert len(trt.contexts) == 2


def test_tensors_that_never_stay_where_they_are_are_never_captured(trt, graphs):
    kept = []
    for seed in range(4):
        kept.append(inputs_at(AT, seed))
        torch.testing.assert_close(graphs(kept[-1])["out_sample"], computed(kept[-1]))
    assert len(trt.contexts) == 1


def test_a_refused_call_leaves_the_graph(trt, graphs):
    inputs = inputs_at(AT)
    for _ in range(2):
        graphs(inputs)
    with pytest.raises(CallError, match="15 reasons"):
        graphs({"sample": inputs["sample"]})
    trt.taken()
    graphs(inputs)
    assert trt.taken() == []


def test_a_capture_that_fails_is_an_error_and_the_session_goes_on(trt, graphs):
    inputs = inputs_at(AT)
    graphs(inputs)
    (gpu,) = trt.gpus
    gpu.uncapturable = "cannot capture a CUDA graph: operation not permitted\nopen the engine without graphs"
    with pytest.raises(ShapecheckError, match=r"cannot capture a CUDA graph: .*\nopen the engine without graphs"):
        graphs(inputs)
    torch.testing.assert_close(graphs(inputs)["out_sample"], computed(inputs))


def test_a_call_that_pytorch_captures_is_recorded_in_a_context_that_no_later_call_changes(trt, graphs):
    inputs, other, (gpu,) = inputs_at(AT), inputs_at(OTHER), trt.gpus
    gpu.outer = True
    with pytest.raises(ShapecheckError, match=r"PyTorch is capturing a CUDA graph, .*call the session with these sizes just"):
        graphs(inputs)
    gpu.outer = False
    graphs(inputs)
    graphs(inputs)
    gpu.outer = True
    with pytest.raises(ShapecheckError, match="PyTorch is capturing"):
        graphs(other)
    trt.taken()
    moved = inputs | {"timestep": place_aligned(inputs["timestep"] + 3)}
    for given in (inputs, moved):
        torch.testing.assert_close(graphs(given)["out_sample"], computed(given))
    recorded = trt.taken()
    assert set(methods(recorded)) == {"set_tensor_address", "execute_async_v3"}, "nothing is set up in a capture"
    gpu.outer = False
    for given in (other, inputs):
        torch.testing.assert_close(graphs(given)["out_sample"], computed(given))
    assert methods(trt.taken())[0] == "create_execution_context"
    gpu.outer = True
    graphs(inputs)
    assert len(trt.contexts) == 3, "direct, graph, and one beside what was recorded"
    assert all(context() is not None for context in trt.contexts)
    graphs.close()
    assert all(context() is None for context in trt.contexts)


# opening


def test_what_is_opened_says_what_it_is(session):
    assert session.contract == CONTRACT
    assert session.record.request.gpu == "NVIDIA H100 (9.0)"


def test_warnings_of_tensorrt_go_to_pythons_logging(trt, tmp_path, caplog):
    EngineSession.open(written(tmp_path)).close()
    assert "TensorRT: Using an engine plan file across different models of devices" in caplog.text


def test_all_sessions_share_one_logger_which_outlives_them(trt, tmp_path):
    first, second = EngineSession.open(written(tmp_path)), EngineSession.open(written(tmp_path, name="other.plan"))
    first.close()
    second.close()
    EngineSession.open(written(tmp_path)).close()
    assert len(trt.loggers) == 3
    assert len(set(map(id, trt.loggers))) == 1


def test_a_version_compatible_engine_may_run_the_code_it_brings(trt, tmp_path):
    EngineSession.open(written(tmp_path)).close()
    assert not trt.host_code
    EngineSession.open(written(tmp_path, request_for(options=BuildOptions(version_compatible=True)))).close()
    assert trt.host_code


def test_an_engine_that_tensorrt_cannot_load_is_told_with_what_built_it(trt, session, tmp_path):
    trt.loggers[0].log(trt.ILogger.ERROR, "of another engine, long ago")
    with pytest.raises(ShapecheckError, match=r"refuses to load .*unet\.plan\n  Serialization assertion failed\n") as caught:
        EngineSession.open(written(tmp_path, plan=b"ftrt"))
    built = "it was built by 10.16.1.11 on NVIDIA H100 (9.0), and tensorrt here is 0.stand.in: build it again here"
    assert str(caught.value).splitlines()[-1] == built


def test_an_engine_that_tensorrt_finds_no_memory_for_is_not_to_be_built_again(trt, session, tmp_path, monkeypatch):
    def run_out(runtime, data):
        runtime.logger.log(trt.ILogger.ERROR, "Requested amount of GPU memory (1742995456 bytes) could not be allocated.")

    monkeypatch.setattr(Runtime, "deserialize_cuda_engine", run_out)
    with pytest.raises(ShapecheckError, match=r"refuses to load .*unet\.plan\n  Requested amount of GPU memory") as caught:
        EngineSession.open(written(tmp_path))
    assert str(caught.value).splitlines()[-1].startswith("the GPU's memory is too small or taken: ")


def test_a_tensorrt_that_does_not_start_is_told_in_its_words(trt, tmp_path):
    def start(logger):
        logger.log(trt.ILogger.ERROR, "CUDA initialization failure with error: 35")
        raise TypeError("pybind11::init(): factory function returned nullptr")

    trt.Runtime = start
    with pytest.raises(
        ShapecheckError, match="TensorRT refuses to start\n  CUDA initialization failure with error: 35\n`shapech"
    ):
        EngineSession.open(written(tmp_path))


def test_a_context_that_tensorrt_cannot_make_is_told(trt, tmp_path):
    trt.refuse = {"create_execution_context": "*"}
    with pytest.raises(
        ShapecheckError, match=r"refuses to make a context of .*unet\.plan\n.*\nis there enough memory on the GPU"
    ):
        EngineSession.open(written(tmp_path))


def test_an_exchanged_record_is_noticed_by_the_name_in_the_engine(trt, tmp_path):
    other = replace(CONTRACT, class_name="AnotherUNet")
    path = written(tmp_path)
    written(tmp_path, request_for(other), name="other.plan")
    (tmp_path / "other.plan.shapecheck.json").replace(tmp_path / "unet.plan.shapecheck.json")
    with pytest.raises(
        ContractError, match=r"unet\.plan is not what its record says: 1 mismatch\n.*built for sha256:"
    ) as caught:
        EngineSession.open(path, verify=False)
    assert "the record beside it is another engine's; copy both together, or build again" in str(caught.value)


def test_everything_in_which_engine_and_record_differ_is_told(trt, tmp_path):
    plan = described(request_for())
    table = {each["name"]: each for each in plan["tensors"]}
    table["their_sample"]["dtype"] = "HALF"
    table["their_mid_block_residual"]["bounds"][1][2] = [3, 1280, 9, 9]
    table["their_timestep"]["name"] = "t"
    table["out_sample"]["name"] = "latent"
    with pytest.raises(ContractError) as caught:
        EngineSession.open(written(tmp_path, plan=plan))
    text = str(caught.value)
    assert "sample: dtype: got float16, expected float32" in text
    assert "timestep: missing: got no such input (looked for their_timestep), expected batch" in text
    assert "t: surplus" in text
    assert "the outputs: name: got latent, expected out_sample" in text
    assert "mid_block_residual: range: got profile 1: 1×1280×2×1 … 2×1280×2×2 … 3×1280×9×9, expected 1×1280×2×1" in text


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (
            lambda plan: plan["host"].append("their_timestep"),
            "their_timestep: got FLOAT on the HOST, expected one of .*float16.* on the DEVICE",
        ),
        (
            lambda plan: plan["tensors"][-1].update(dtype="FP8"),
            "out_sample: got FP8 on the DEVICE, expected one of .* on the DEVICE",
        ),
        (lambda plan: plan.update(profiles=1), "the profiles: engine: got 1, expected 2"),
    ],
)
def test_what_a_session_could_not_bind_is_refused_when_it_is_opened(change, told, trt, tmp_path):
    plan = described(request_for())
    change(plan)
    with pytest.raises(ShapecheckError, match=told):
        EngineSession.open(written(tmp_path, plan=plan))


# engines that others built: the same stand-in, and no record


def unrecorded(folder, plan=None):
    """An engine file alone, its inputs under names that are not ours."""
    path = folder / "theirs.engine"
    path.write_bytes(json.dumps(plan or described(request_for())).encode())
    return path


def test_an_engine_without_a_record_is_served_under_the_contract_that_is_given(trt, tmp_path, caplog):
    caplog.set_level("INFO")
    with EngineSession.open(unrecorded(tmp_path), contract=CONTRACT) as session:
        assert (session.record, session.contract) == (None, CONTRACT)
        assert "recognised by shape or number: their_sample is sample, " in caplog.text
        for geometry in (SMALL.opt, LARGE.max, SMALL.min):
            inputs = inputs_at(geometry)
            assert torch.allclose(session(inputs)["out_sample"], computed(inputs))
        with pytest.raises(CallError, match="sample: got 2×4×13×12, profile 1 allows up to 3×4×12×13") as caught:
            session(inputs_at(Geometry(2, 13, 12)))
        assert "build" not in str(caught.value)


def test_each_profile_serves_what_its_own_shapes_allow(trt, tmp_path):
    plan = described(request_for()) | {"profiles": 1}
    bounds = next(each for each in plan["tensors"] if each["name"] == "their_mid_block_residual")["bounds"][0]
    assert bounds[2] == [3, 1280, 2, 2]
    bounds[2][0] = 2
    with EngineSession.open(unrecorded(tmp_path, plan), contract=CONTRACT) as session:
        inputs = inputs_at(Geometry(2, 9, 12))
        assert torch.allclose(session(inputs)["out_sample"], computed(inputs))
        with pytest.raises(CallError, match="mid_block_residual: got 3×1280×2×2, profile 0 allows up to 2×1280×2×2"):
            session(inputs_at(Geometry(3, 9, 12)))


def test_an_engine_without_a_record_that_is_another_model_is_refused_with_everything(trt, tmp_path):
    with pytest.raises(ContractError, match=r"theirs\.engine is not this model") as caught:
        EngineSession.open(unrecorded(tmp_path), contract=presets.contract("sdxl"))
    found = {(mismatch.kind, mismatch.where) for mismatch in caught.value.mismatches}
    assert {("missing", "text_embeds"), ("missing", "time_ids"), ("surplus", "their_encoder_hidden_states")} <= found
    with pytest.raises(ContractError, match=r"unet\.plan was built for another model"):
        EngineSession.open(written(tmp_path), contract=presets.contract("sdxl"))
    EngineSession.open(written(tmp_path), contract=CONTRACT).close()


def test_an_engine_without_inputs_for_residuals_is_served_without_them_and_that_is_logged(trt, tmp_path, caplog):
    plan = described(request_for())
    plan["tensors"] = [each for each in plan["tensors"] if "residual" not in each["name"]]
    drop_in = load(unrecorded(tmp_path, plan), model="sd15")
    assert drop_in.contract == replace(CONTRACT, slots=())
    assert "has no input for a ControlNet's residuals: it is served without them" in caplog.text
    plan["tensors"] += [each for each in described(request_for())["tensors"] if each["name"] == "their_mid_block_residual"]
    with pytest.raises(ContractError, match="down_block_residual_00"):  # some of them is none of both
        load(unrecorded(tmp_path, plan), model="sd15")


def test_load_takes_the_model_by_name_in_place_of_its_contract(trt, tmp_path):
    path = unrecorded(tmp_path)
    with pytest.raises(
        ShapecheckError, match=r"has no theirs\.engine\.shapecheck\.json beside it, .*model= of shapecheck\.load"
    ):
        load(path)
    with pytest.raises(ShapecheckError, match="model= says which model a file is, instead of contract="):
        load(path, model="sd15", contract=CONTRACT)
    unet = load(path, model="sd15", finite=False)
    inputs = inputs_at(SMALL.opt)
    downs, mid = [inputs[slot.name] for slot in CONTRACT.slots[:-1]], inputs["mid_block_residual"]
    image = unet(
        inputs["sample"],
        inputs["timestep"],
        inputs["encoder_hidden_states"],
        down_block_additional_residuals=downs,
        mid_block_additional_residual=mid,
    ).sample
    assert torch.allclose(image, computed(inputs))
    unet.close()


def test_what_tensorrt_says_of_a_file_that_is_no_engine_is_told(trt, tmp_path):
    path = unrecorded(tmp_path)
    path.write_bytes(b"ftrt")
    with pytest.raises(
        ShapecheckError, match=r"refuses to load .*theirs\.engine\n  Serialization assertion failed\n"
    ) as caught:
        EngineSession.open(path, contract=CONTRACT)
    assert str(caught.value).endswith("an engine loads with the release and the kind of GPU it was built for")


# memory


def test_memory_for_the_engine_and_for_each_context_is_asked_for_before_it_is_taken(trt, tmp_path):
    path = written(tmp_path)
    with EngineSession.open(path, graphs=True) as session:
        inputs = inputs_at(SMALL.opt)
        session(inputs)
        session(inputs)
        context = (12345, f"{path}: the scratch memory of a context")
        size = path.stat().st_size
        assert trt.gpus[-1].required == [(size, f"{path}: an engine of {size / 2**30:.2f} GiB"), context, context]


def test_what_does_not_fit_into_the_gpus_memory_is_refused_with_figures(monkeypatch):
    freed = []
    free = [1 << 30, 3 << 30]  # before and after PyTorch gave back what it did not use
    for name, stand_in in {
        "is_available": lambda: True,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "Stream": lambda device: None,
        "mem_get_info": lambda device: (free[len(freed)], 24 << 30),
        "memory_allocated": lambda device: 20 << 30,
        "empty_cache": lambda: freed.append(True),
    }.items():
        monkeypatch.setattr(torch.cuda, name, stand_in)
    gpu = engine_session.Gpu(None)
    gpu.require_memory(1 << 30, "an engine")
    assert not freed
    gpu.require_memory(2 << 30, "an engine")
    assert freed == [True]
    free[1:] = [1 << 30, 1 << 30]
    text = "an engine needs 2.00 GiB on cuda:0, and 1.00 of its 24.0 GiB are free; tensors of this process hold 20.00 GiB"
    with pytest.raises(ShapecheckError, match=text):
        gpu.require_memory(2 << 30, "an engine")

    def allocate(*_, **__):
        raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    monkeypatch.setattr(torch, "empty", allocate)
    with pytest.raises(ShapecheckError, match="no memory on cuda:0 for an output of 2×4×64×72: CUDA out of memory"):
        gpu.allocate((2, 4, 64, 72), torch.float32)


def test_without_a_gpu_the_error_says_so(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorrt", StandIn())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(
        ShapecheckError, match="runs on an NVIDIA GPU, and PyTorch sees none here; `shapecheck doctor` says why"
    ):
        EngineSession.open(written(tmp_path))


@pytest.mark.parametrize("device", ["cpu", "cuda:2", "tpu"])
def test_a_device_that_is_no_gpu_here_is_refused(device, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(ShapecheckError, match=f"no GPU '{device}': PyTorch sees cuda:0, cuda:1"):
        engine_session.Gpu(device)
