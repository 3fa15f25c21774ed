"""Every session on a GPU computes from what its tensors hold at the call: whatever was there before, on whatever stream.

`pytest -m gpu` skips the backends that cannot run; with `--shapecheck-backends ort-cuda,trt` it fails there, with the reason.
Nothing here waits for the GPU between two calls, so that work which is not put in order is done in the wrong one.
"""

from __future__ import annotations

import random
import time
from functools import partial

import exports
import onnx
import psutil
import pytest
import small
import torch
from onnx import TensorProto, helper

import shapecheck
from shapecheck import BuildOptions, EngineSession, Geometry, ShapecheckError
from shapecheck.models.forward_call import build_arguments
from shapecheck.runtime import compiled_code
from shapecheck.runtime.compiled_session import CompiledSession
from shapecheck.runtime.contract_session import ContractSession
from shapecheck.runtime.dropin_unet import DropInUNet
from shapecheck.runtime.onnx_session import OnnxSession
from shapecheck.runtime.torch_session import forbid_tf32
from shapecheck.tensorrt.build import build_engine
from shapecheck.tensorrt.profiles import Range

pytestmark = pytest.mark.gpu

AT, OTHER = Geometry(2, 16, 24), Geometry(1, 24, 16)
SIZES = Range(Geometry(1, 16, 16), AT, Geometry(2, 24, 24))
KINDS = ("torch", "torch-compile", "ort-cuda", "ort-cuda+graphs", "ort-trt", "ort-trt+graphs", "trt", "trt+graphs")
ALLOWED = 1e-2
"""Of the largest value: TF32 passes, the values of another call do not."""


@pytest.fixture(autouse=True, scope="module")
def gpu(shapecheck_require):
    shapecheck_require("torch-cuda")


@pytest.fixture(scope="module")
def file():
    """From our exporter: the older one leaves numbers of the CPU in attention, with which ONNX Runtime captures nothing."""
    return exports.exported_once(small.unet(**small.TINY)).path


@pytest.fixture(scope="module")
def contract(file):
    return shapecheck.read_contract(file)


@pytest.fixture(scope="module")
def reference(contract):
    """The UNet in PyTorch, without TF32."""
    model = small.unet(**small.TINY).cuda()

    def compute(inputs):
        with torch.no_grad(), forbid_tf32():
            return model(**build_arguments(contract, inputs), return_dict=False)[0]

    return compute


@pytest.fixture(scope="module")
def open_kind(tmp_path_factory, file, contract):
    """Open a session of a kind; an engine is built once, by the provider and by us."""
    folder = tmp_path_factory.mktemp("engines")

    def open_session(kind):
        backend, _, graphs = kind.partition("+")
        if backend == "torch":
            return ContractSession.of_module(small.unet(**small.TINY).cuda(), contract)
        if backend == "torch-compile":
            return CompiledSession(small.unet(**small.TINY).cuda(), contract, cache=folder, exactly=True)
        if backend == "trt":
            plan = folder / "unet.plan"
            if not plan.exists():
                began = time.perf_counter()
                build_engine(file, plan, profiles=[SIZES], options=BuildOptions(tf32=False, optimization_level=0))
                print(f"engine built in {time.perf_counter() - began:.1f} s", flush=True)
            return EngineSession.open(plan, graphs=bool(graphs))
        options = {"use_tf32": "0"} if backend == "ort-cuda" else {
            "trt_engine_cache_enable": "True", "trt_engine_cache_path": str(folder), "trt_builder_optimization_level": "1",
        }  # fmt: skip
        sizes = ["128x128:192x128:192x192"] if backend == "ort-trt" else ()
        return shapecheck.load(file, backend, sizes=sizes, batch=["1:2:2"], options=options, graphs=bool(graphs)).engine

    return open_session


@pytest.fixture(params=KINDS)
def make_session(request, shapecheck_require, open_kind):
    backend = request.param.partition("+")[0]
    shapecheck_require("torch-cuda" if backend == "torch" else backend)
    opened = []

    def make():
        opened.append(open_kind(request.param))
        return opened[-1]

    make.sizes = (AT,) if request.param == "ort-trt+graphs" else (AT, OTHER)
    yield make
    for session in opened:
        session.close()


def draw(contract, geometry, generator, device="cuda"):
    shapes = contract.input_shapes(geometry)
    inputs = {name: torch.randn(shape, generator=generator, device=device) for name, shape in shapes.items()}
    return inputs | {"timestep": torch.linspace(3, 997, geometry.batch, device=device)}


def worst(pairs, steps=()):
    """Return the largest difference of all, in parts of the largest value; NaN if any number is.

    Where `steps` say what was done before each image, those before images that are too far off are printed.
    """
    torch.cuda.synchronize()
    on_cpu = [(found.double().cpu(), expected.double().cpu()) for found, expected in pairs]
    parts = torch.stack([(found - expected).abs().max() / expected.abs().max() for found, expected in on_cpu])
    print(f"{len(parts)} images, worst difference {float(parts.max()):.2g}", flush=True)
    for number, (part, step) in enumerate(zip(parts.tolist(), steps, strict=False)):
        if not part <= ALLOWED:
            print(f"step {number}, {step}: {part:.2g}", flush=True)
    return float(parts.max())


def test_what_tensors_hold_at_a_call_is_what_it_reads(make_session, contract, reference):
    """Two sessions in turns; tensors changed in place, exchanged, freed with others at their addresses, in odd layouts."""
    sessions, choose, generator = [make_session(), make_session()], random.Random(0), torch.Generator("cuda").manual_seed(0)
    inputs, pairs, addresses, steps = draw(contract, AT, generator), [], set(), []
    again = 0
    for number in range(40):
        name, case = choose.choice(list(inputs)), choose.randrange(5)
        match case:
            case 0:
                torch.cuda._sleep(500_000)  # what is changed is not there yet when the session is called
                inputs[name].add_(3)
            case 1:
                inputs[name] = inputs[name] % 500 if name == "timestep" else -inputs[name]
            case 2:
                geometry, inputs = choose.choice(make_session.sizes), {}  # freed before the new ones are made
                inputs = draw(contract, geometry, generator)
            case 3:
                inputs[name] = inputs[name].mT.contiguous().mT if inputs[name].dim() > 1 else inputs[name].clone()
            case 4:
                room = torch.empty(inputs[name].numel() + 1, device="cuda")
                inputs[name] = room[1:].view(inputs[name].shape).copy_(inputs[name] - 2)
        again += inputs[name].data_ptr() in addresses
        addresses.add(inputs[name].data_ptr())
        done = ("changed in place", "exchanged", "all freed and made anew", "in an odd layout", "at an odd address")[case]
        steps.append(f"{name} {done}, {tuple(inputs['sample'].shape)}")
        try:
            (found,) = sessions[number % 2](inputs).values()
        except ShapecheckError:
            print(f"step {number}, {steps[-1]}: refused", flush=True)
            raise
        pairs.append((found.clone(), reference(inputs)))
    assert worst(pairs, steps) <= ALLOWED
    assert again > 3, f"{again} of {len(pairs)} inputs were where another had been"


def test_streams_in_turns_do_not_disturb_each_other(make_session, contract, reference):
    """Each stream has tensors of its own; what they share is the session, which has to put their calls in order."""
    session, generator = make_session(), torch.Generator("cuda").manual_seed(1)
    streams = [torch.cuda.default_stream(), torch.cuda.Stream(), torch.cuda.Stream()]
    tensors = [draw(contract, AT, generator) for _ in streams]
    torch.cuda.synchronize()
    for inputs in tensors:
        session(inputs)
    torch.cuda.synchronize()
    pairs = []
    for number in range(30):
        place = number * 7 % 5 % 3
        with torch.cuda.stream(streams[place]):
            inputs = tensors[place]
            torch.cuda._sleep(1_000_000)
            inputs["sample"].mul_(-1.05)
            (found,) = session(inputs).values()
            torch.cuda._sleep(1_000_000)  # the result is read late, when another stream has called
            pairs.append((found.clone(), reference(inputs)))
    assert worst(pairs) <= ALLOWED


def test_an_image_may_go_in_again_and_control_off_is_zeros(make_session, contract, reference):
    """A loop as a pipeline's, through the drop-in, with control on and off. Images that the caller keeps stay as they were."""
    unet, generator, pairs = DropInUNet(make_session(), finite=False), torch.Generator("cuda").manual_seed(2), []
    inputs = draw(contract, AT, generator)
    zeros = {slot.name: torch.zeros_like(inputs[slot.name]) for slot in contract.slots}
    sample = inputs["sample"]
    for number in range(8):
        on = number % 3 != 1
        call = inputs | ({} if on else zeros) | {"sample": sample}
        *downs, mid = (call[slot.name] for slot in contract.slots)
        control = {"down_block_additional_residuals": downs, "mid_block_additional_residual": mid} if on else {}
        found = unet(sample, call["timestep"], call["encoder_hidden_states"], **control).sample
        pairs.append((found, reference(call)))  # no copy: later calls must not write over it
        sample = found / found.std()
    assert worst(pairs) <= ALLOWED


@pytest.mark.parametrize("graphs", [False, True])
def test_onnx_runtime_reads_tensors_of_the_cpu_at_every_call(graphs, shapecheck_require, file, contract, reference):
    """It copies them to the GPU when they are bound: a binding that is kept gave the image of the call before."""
    shapecheck_require("ort-cuda")
    generator, pairs = torch.Generator().manual_seed(3), []
    inputs = draw(contract, AT, generator, device="cpu")
    with OnnxSession.open(file, backend="ort-cuda", options={"use_tf32": "0"}, graphs=graphs) as session:
        for number in range(12):
            name = list(inputs)[number % len(inputs)]
            if number % 3 == 0:
                inputs[name].add_(2)
            elif number % 3 == 1:
                inputs = {}
                inputs = draw(contract, AT, generator, device="cpu")
            else:
                inputs[name] = (inputs[name] + 1).pin_memory()
            given = {"out_sample": torch.empty(2, 4, 16, 24, device="cuda" if number % 2 else "cpu")}
            (found,) = session(inputs, given if graphs or number % 4 else None).values()
            on_gpu = {name: tensor.cuda() for name, tensor in inputs.items()}
            pairs.append((found.clone(), reference(on_gpu)))
        assert worst(pairs) <= ALLOWED


def test_onnx_runtime_reads_what_its_cpu_makes_of_the_sizes_of_this_call(shapecheck_require, tmp_path):
    """A number that it computes on the CPU is copied to the GPU, which comes to it when the CPU is at the next call's."""
    shapecheck_require("ort-cuda")
    nodes = [
        helper.make_node("Shape", ["sample"], ["sizes"]),
        helper.make_node("Cast", ["sizes"], ["numbers"], to=TensorProto.FLOAT),
        helper.make_node("ReduceProd", ["numbers"], ["size"], keepdims=0),
        helper.make_node("Mul", ["sample", "size"], ["image"]),
    ]
    ports = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", "m"]) for name in ("sample", "image")]
    graph = helper.make_graph(nodes, "sized", ports[:1], ports[1:])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), tmp_path / "sized.onnx")
    pairs, steps = [], []
    with OnnxSession.open(tmp_path / "sized.onnx", backend="ort-cuda") as session:
        for number in range(40):
            sample = torch.full((number % 7 + 1, 5), 0.5, device="cuda")
            torch.cuda._sleep(2_000_000)
            image = session({"sample": sample}, {"image": torch.empty_like(sample)})["image"]
            pairs.append((image, sample * sample.numel()))
            steps.append(tuple(sample.shape))
        assert worst(pairs, steps) <= ALLOWED


@pytest.mark.parametrize("graphs", [False, True])
def test_a_call_of_an_engine_in_a_graph_that_pytorch_captures(graphs, shapecheck_require, open_kind, contract, reference):
    shapecheck_require("trt")
    generator, pairs = torch.Generator("cuda").manual_seed(4), []
    inputs, other = draw(contract, AT, generator), draw(contract, OTHER, generator)
    with open_kind("trt+graphs" if graphs else "trt") as session:
        graph, refused = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
        for given in (other, inputs, inputs, inputs):
            session(given)
        with torch.cuda.graph(graph):
            image = session(inputs)["out_sample"].clone()
        with torch.cuda.graph(refused):
            other["sample"].add_(0)
            with pytest.raises(ShapecheckError, match="PyTorch is capturing a CUDA graph, in which TensorRT cannot be set up"):
                session(other)
        for call in (partial(session, other), partial(session, inputs), graph.replay) * 4:
            for tensors in (inputs, other):
                tensors["mid_block_residual"].add_(1)
            results = call()
            if results is None:
                pairs.append((image.clone(), reference(inputs)))
            else:
                (found,) = results.values()
                pairs.append((found.clone(), reference(other if len(found) == OTHER.batch else inputs)))
        assert worst(pairs) <= ALLOWED
        torch.cuda.synchronize()
        del graph


def test_a_compiled_call_in_a_graph_that_pytorch_captures(shapecheck_require, open_kind, contract, reference):
    """The caller's graph reads the caller's tensors, in whatever layout, and the session goes on beside it."""
    shapecheck_require("torch-compile")
    generator, pairs = torch.Generator("cuda").manual_seed(8), []
    inputs, other = draw(contract, AT, generator), draw(contract, OTHER, generator)
    inputs["mid_block_residual"] = inputs["mid_block_residual"].mT.contiguous().mT
    with open_kind("torch-compile") as session:
        session(inputs)
        torch.cuda.synchronize()
        graph, refused = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            image = session(inputs)["out_sample"]
        with torch.cuda.graph(refused):
            other["sample"].add_(0)
            with pytest.raises(ShapecheckError, match="was not called before this capture"):
                session(other)
        for call in (partial(session, other), partial(session, inputs), graph.replay) * 4:
            for tensors in (inputs, other):
                tensors["mid_block_residual"].add_(1)
            results = call()
            found = image if results is None else results["out_sample"]
            pairs.append((found.clone(), reference(other if len(found) == OTHER.batch else inputs)))
        assert worst(pairs) <= ALLOWED
        torch.cuda.synchronize()
        del graph


def test_a_frame_with_both_compiled_is_pytorchs(shapecheck_require, tmp_path):
    """ControlNet and UNet as drop-ins, every picture and residual kept; the second pair finds what the first compiled."""
    shapecheck_require("torch-compile")
    unet = small.unet(**small.TINY).to("cuda", torch.float16)
    net = small.controlnet(small.unet(**small.TINY)).to("cuda", torch.float16)
    draw_half = partial(torch.randn, generator=torch.Generator("cuda").manual_seed(7), device="cuda", dtype=torch.float16)
    pairs = []
    for turn in range(2):
        began = time.perf_counter()
        pair = [shapecheck.load(model, "torch-compile", cache=tmp_path) for model in (unet, net)]
        for number in range(6):
            height, width = (16, 24) if number % 2 else (17, 11)
            sample, text = draw_half(2, 4, height, width), draw_half(2, 7, 12)
            image = draw_half(2, 3, 8 * height, 8 * width)
            for compute in (tuple(pair), (unet, net)):
                with torch.no_grad():
                    downs, mid = compute[1](sample, 400, text, image, conditioning_scale=0.2 * number, return_dict=False)
                    control = {"down_block_additional_residuals": downs, "mid_block_additional_residual": mid}
                    control = control if number % 3 else {}
                    picture = compute[0](sample, 400, text, **control).sample
                pairs.append([picture, *downs, mid])
        print(f"turn {turn}: {time.perf_counter() - began:.1f} s", flush=True)
        compiled_code.compiled_code.clear()  # as in another process
    ours, theirs = pairs[::2], pairs[1::2]
    kept = [(one, other) for mine, own in zip(ours, theirs, strict=True) for one, other in zip(mine, own, strict=True)]
    assert worst([(found, expected) for found, expected in kept if expected.any()]) <= 3 * ALLOWED
    assert len(list(tmp_path.glob("compiled-*.bin"))) == 4
    for model in pair:
        model.close()


def test_a_unet_that_begins_beside_its_controlnet_reads_what_there_is(shapecheck_require, tmp_path):
    """The ControlNet is kept from ending by a kernel that waits; between the two calls, inputs and residuals are changed."""
    shapecheck_require("torch-compile")
    unet, net = small.unet(**small.TINY).cuda(), small.controlnet(small.unet(**small.TINY)).cuda()
    fast = [shapecheck.load(model, "torch-compile", cache=tmp_path) for model in (unet, net)]
    draw_one = partial(torch.randn, generator=torch.Generator("cuda").manual_seed(8), device="cuda")
    choose, pairs = random.Random(1), []
    sample, text, time_step = draw_one(2, 4, 16, 24), draw_one(2, 7, 12), torch.tensor([400.0], device="cuda")
    with torch.no_grad():
        for number in range(60):
            image, kind = draw_one(2, 3, 128, 192), choose.randrange(6)
            kept = sample.clone(), text.clone(), time_step.clone()
            results = []
            for compute in (fast, (unet, net)):
                for tensor, value in zip((sample, text, time_step), kept, strict=True):
                    tensor.copy_(value)
                if number % 2:
                    torch.cuda._sleep(20_000_000)
                downs, mid = compute[1](sample, time_step, text, image, conditioning_scale=0.7, return_dict=False)
                if kind == 0:
                    sample.mul_(-1)
                elif kind == 1:
                    text.add_(1)
                elif kind == 2:
                    downs, mid = [down * 2 for down in downs], mid * 2
                elif kind == 3:
                    time_step.sub_(100)
                given = sample.clone() if kind == 4 else sample
                control = {"down_block_additional_residuals": downs, "mid_block_additional_residual": mid}
                results.append(compute[0](given, time_step, text, **(control if number % 7 else {})).sample)
            pairs.append((results[0].clone(), results[1].clone()))
    assert worst(pairs) <= ALLOWED
    for model in fast:
        model.close()


def test_what_one_size_gave_stays_while_another_is_called(make_session, contract, reference):
    """Calls of their own size alone write outputs again: for graphs that is a question of whose memory they are in."""
    if len(make_session.sizes) < 2:
        pytest.skip("it serves one size")
    session, generator = make_session(), torch.Generator("cuda").manual_seed(9)
    pairs, calls = [], [draw(contract, geometry, generator) for geometry in make_session.sizes]
    for number in range(6):
        kept, other = calls[number % 2], calls[1 - number % 2]
        (found,) = session(kept).values()
        session(other)
        session(other)
        pairs.append((found.clone(), reference(kept)))
    assert worst(pairs) <= ALLOWED


def test_an_image_is_read_before_the_next_unet_writes_where_it_is(shapecheck_require, tmp_path):
    """The same noise, text and time in every frame, and outputs that the next call writes again: the reader is late."""
    shapecheck_require("torch-compile")
    unet, net = small.unet(**small.TINY).cuda(), small.controlnet(small.unet(**small.TINY)).cuda()
    options = {"cache": tmp_path, "finite": False, "own_outputs": False}
    fast = [shapecheck.load(model, "torch-compile", **options) for model in (unet, net)]
    draw_one = partial(torch.randn, generator=torch.Generator("cuda").manual_seed(10), device="cuda")
    sample, text, time_step, pairs = draw_one(2, 4, 16, 24), draw_one(2, 7, 12), torch.tensor([400.0], device="cuda"), []
    images = [draw_one(2, 3, 128, 192) for _ in range(12)]
    with torch.no_grad():
        for compute in (fast, (unet, net)):
            pairs.append([])
            for image in images:
                downs, mid = compute[1](sample, time_step, text, image, return_dict=False)
                control = {"down_block_additional_residuals": downs, "mid_block_additional_residual": mid}
                for _ in range(2):  # the second as for guidance without a batch
                    found = compute[0](sample, time_step, text, **control).sample
                    torch.cuda._sleep(5_000_000)
                    pairs[-1].append(found.clone())
    assert worst(zip(*pairs, strict=True)) <= ALLOWED
    for model in fast:
        model.close()


def test_onnx_runtime_refuses_to_be_captured_by_pytorch(shapecheck_require, open_kind, contract, reference):
    shapecheck_require("ort-cuda")
    inputs = draw(contract, AT, torch.Generator("cuda").manual_seed(5))
    session, graph = open_kind("ort-cuda"), torch.cuda.CUDAGraph()
    session(inputs)
    with torch.cuda.graph(graph):
        inputs["sample"].add_(1)
        with pytest.raises(ShapecheckError, match="PyTorch is capturing a CUDA graph, of which a call of ONNX Runtime"):
            session(inputs)
    graph.replay()
    pairs = [(session(inputs)["out_sample"], reference(inputs)) for _ in range(2)]
    assert worst(pairs) <= ALLOWED
    session.close()


def test_memory_stays_flat(make_session, contract):
    """On the GPU and, since ONNX Runtime gives pinned memory back only when it waits, in this process."""
    session, inputs = make_session(), draw(contract, AT, torch.Generator("cuda").manual_seed(6))

    def measure(calls):
        for _ in range(calls):
            session(inputs)
        torch.cuda.synchronize()
        return torch.cuda.mem_get_info()[0], psutil.Process().memory_info().rss

    measure(150)
    (free, before), (still, after) = measure(150), measure(600)
    print(f"{(free - still) / 2**20:+.1f} MiB of the GPU, {(after - before) / 2**20:+.1f} MiB of the process", flush=True)
    assert free - still <= 16 * 2**20
    assert after - before <= 32 * 2**20
