"""Standard TensorRT on a GPU: built, read back, run and compared with PyTorch. Not run where there is neither.

`pytest -m gpu` skips where TensorRT cannot run; `pytest -m gpu --shapecheck-backends trt` fails there, with the reason.
"""

from __future__ import annotations

import warnings

import engines
import exports
import onnx
import onnx_files
import pytest
import small
import torch
from loras import add_lora

from shapecheck import BuildOptions, EngineSession, Geometry, ShapecheckError, rebind, refit
from shapecheck.contract.size_request import SizeRequest
from shapecheck.runtime.binding import CallError
from shapecheck.runtime.load import load
from shapecheck.tensorrt.build import build_engine, read_back
from shapecheck.tensorrt.check import check_engine
from shapecheck.tensorrt.engine_tensors import compare_engine
from shapecheck.tensorrt.profiles import Range, profile_of

pytestmark = pytest.mark.gpu

LARGE = Range(Geometry(1, 40, 48), Geometry(2, 64, 64), Geometry(2, 64, 72))
EXACT = BuildOptions(tf32=False)


@pytest.fixture(autouse=True, scope="module")
def tensorrt(shapecheck_require):
    shapecheck_require("trt")


@pytest.fixture(scope="module")
def model(tensorrt):
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    return small.unet().cuda()


@pytest.fixture(scope="module")
def built(tmp_path_factory, model):
    folder = tmp_path_factory.mktemp("built")  # once: a build takes minutes
    file, _ = engines.exported(folder / "unet.onnx", {})
    return build_engine(file, folder / "unet.plan", profiles=[engines.SIZES, LARGE], options=EXACT)


THEIRS = Range(Geometry(1, 8, 9), Geometry(2, 17, 25), Geometry(3, 33, 41))


@pytest.fixture(scope="module", params=["ranged", "static"])
def theirs(request, tmp_path_factory, model):
    """An engine that Polygraphy built under names that tell nothing, without a record; its sizes, and its model's contract."""
    from polygraphy.backend.trt import CreateConfig, NetworkFromOnnxPath, Profile, engine_bytes_from_network

    folder = tmp_path_factory.mktemp("theirs")
    file, contract = engines.exported(folder / "unet.onnx", {})
    names = {name: f"tensor{chr(97 + place)}" for place, name in enumerate(contract.input_rules)}
    file = onnx_files.planted(file, folder / "theirs.onnx", onnx_files.rename(**names))
    sizes = THEIRS if request.param == "ranged" else Range(THEIRS.opt, THEIRS.opt, THEIRS.opt)
    profile = Profile()
    if request.param == "static":
        graph = onnx.load(file)
        for value in graph.graph.input:
            ours = next(name for name, other in names.items() if other == value.name)
            for axis, size in zip(value.type.tensor_type.shape.dim, contract.input_shapes(sizes.opt)[ours], strict=True):
                axis.dim_value = size
        onnx.save(graph, file)
    else:
        for bounds in profile_of(contract, sizes).inputs:
            profile.add(names[bounds.name], bounds.min, bounds.opt, bounds.max)
    config = CreateConfig(profiles=[profile] if profile else None, tf32=False)
    path = folder / "theirs.engine"
    with warnings.catch_warnings(action="ignore"):  # Polygraphy's and TensorRT's own
        path.write_bytes(engine_bytes_from_network(NetworkFromOnnxPath(str(file), strongly_typed=True), config=config))
    return path, sizes, contract


def inputs_at(contract, geometry, seed=1):
    generator = torch.Generator().manual_seed(seed)
    shapes = contract.input_shapes(geometry)
    given = {name: torch.randn(shape, generator=generator).cuda() for name, shape in shapes.items()}
    return given | {"timestep": torch.linspace(3, 997, geometry.batch).cuda()}


def with_torch(model, contract, given):
    downs, mid = [given[slot.name] for slot in contract.slots[:-1]], given[contract.slots[-1].name]
    with torch.no_grad():
        return model(
            given["sample"],
            given["timestep"],
            given["encoder_hidden_states"],
            down_block_additional_residuals=downs,
            mid_block_additional_residual=mid,
        ).sample


def difference(found, expected):
    assert found.shape == expected.shape
    return float((found.double() - expected.double()).abs().max() / expected.double().abs().max())


def test_what_was_built_is_what_its_record_says(built):
    assert compare_engine(built.engine.request, read_back(built.path, built.engine)) == ()
    checked = check_engine(built.path, built.engine, requested=SizeRequest.at(Geometry(2, 33, 41)))
    assert (checked.read, checked.is_fine, checked.fit.profile) == ("engine", True, 0)


@pytest.mark.parametrize("graphs", [False, True])
def test_an_engine_computes_what_pytorch_does_at_every_size(built, model, graphs):
    contract = built.engine.request.contract
    sizes = [*engines.SIZES.geometries, Geometry(2, 21, 35), Geometry(1, 33, 9), LARGE.max, LARGE.opt, Geometry(2, 17, 25)]
    with EngineSession.open(built.path, graphs=graphs) as session:
        for geometry in sizes:
            given = inputs_at(contract, geometry)
            expected = with_torch(model, contract, given)
            for _ in range(3):  # with graphs: as it is, captured, replayed
                (found,) = session(given).values()
                assert difference(found, expected) <= 1e-4


def test_every_slot_acts_as_in_pytorch(built, model):
    contract = built.engine.request.contract
    given = inputs_at(contract, Geometry(2, 17, 25))
    with EngineSession.open(built.path) as session:
        usual = next(iter(session(given).values())).clone()
        for slot in contract.slots:
            changed = given | {slot.name: given[slot.name] + 1}
            expected = with_torch(model, contract, changed)
            (found,) = session(changed).values()
            assert difference(found, expected) <= 1e-4
            assert difference(usual, expected) > 1e-3


def test_a_refused_call_names_the_slot_and_the_next_is_served(built, model):
    contract = built.engine.request.contract
    good = inputs_at(contract, Geometry(2, 17, 25))
    with EngineSession.open(built.path) as session:
        expected = next(iter(session(good).values())).clone()
        with pytest.raises(CallError, match="down_block_residual_07"):
            session(good | {"down_block_residual_07": good["mid_block_residual"]})
        with pytest.raises(CallError, match="profile 1, in latent cells: height 73, expected 40 to 64"):
            session(inputs_at(contract, Geometry(2, 73, 25)))
        (found,) = session(good).values()
        assert torch.equal(found, expected)


def test_an_engine_that_others_built_is_checked_without_a_record(theirs):
    path, sizes, contract = theirs
    checked = check_engine(path, None, contract, requested=SizeRequest.at(sizes.max))
    assert (checked.read, checked.mismatches, checked.fit.profile) == ("engine", (), 0)
    assert checked.engine.ranges == (sizes,)
    assert any(note.startswith("taken in the order of the engine") for note in checked.notes)
    outside = check_engine(path, None, contract, requested=SizeRequest.at(Geometry(2, 64, 64))).fit
    assert (outside.profile, outside.nearest) == (None, sizes.nearest(Geometry(2, 64, 64)))


@pytest.mark.parametrize("graphs", [False, True])
def test_an_engine_that_others_built_computes_what_pytorch_does_slot_by_slot(theirs, model, graphs):
    path, sizes, contract = theirs
    with EngineSession.open(path, contract=contract, graphs=graphs) as session:
        for geometry in dict.fromkeys(sizes.geometries):
            given = inputs_at(contract, geometry)
            for changed in (given, given, *(given | {slot.name: given[slot.name] + 1} for slot in contract.slots)):
                (found,) = session(changed).values()
                assert difference(found, with_torch(model, contract, changed)) <= 1e-4
        with pytest.raises(CallError, match="sample: got 1×4×64×64"):
            session(inputs_at(contract, Geometry(1, 64, 64)))


def test_an_engine_that_others_built_stands_in_for_the_unet(theirs, model):
    path, sizes, contract = theirs
    given = inputs_at(contract, sizes.opt)
    drop_in = load(path, contract=contract)
    assert difference(with_torch(drop_in, contract, given), with_torch(model, contract, given)) <= 1e-4
    drop_in.close()


def test_a_file_that_is_no_engine_is_refused_in_tensorrts_words(tmp_path, built):
    path = tmp_path / "none.engine"
    path.write_bytes(built.path.read_bytes()[:64] + bytes(4096))
    with pytest.raises(ShapecheckError, match="TensorRT refuses to load"):
        EngineSession.open(path, contract=built.engine.request.contract)
    with pytest.raises(ShapecheckError, match="TensorRT refuses it"):
        check_engine(path, None, built.engine.request.contract)


@pytest.mark.parametrize("precision", ["float32", "float16"])
def test_an_engine_is_refitted_with_other_loras_from_a_file_and_from_a_model(tensorrt, tmp_path, precision):
    plain = small.unet(**exports.LEAST)
    file = exports.exported_once(plain, dtype=precision).path
    options = BuildOptions(refittable=True, tf32=False)
    engine = build_engine(file, tmp_path / "unet.plan", profiles=[engines.SIZES], options=options)
    unet = small.unet(**exports.LEAST)
    add_lora(unet, "one", seed=1)
    add_lora(unet, "two", ("to_q", "conv1"), seed=2)
    allowed = 1e-4 if precision == "float32" else 5e-3

    def measure(path, model):
        contract = engine.engine.request.contract
        given = inputs_at(contract, Geometry(2, 17, 25))
        expected = with_torch(model.cuda().float(), contract, given)
        with EngineSession.open(path) as session:
            dtypes = {name: getattr(torch, dtype) for name, dtype in contract.input_dtypes.items()}
            (found,) = session({name: value.to(dtypes[name]) for name, value in given.items()}).values()
            return difference(found.float(), expected)

    assert measure(engine.path, plain) <= allowed
    for names, scales in ((["one"], [1.0]), (["two"], [0.5]), (["one", "two"], [0.5, 1.5])):
        unet.set_adapters(names, scales)
        by_model = refit(engine.path, unet, tmp_path / "model.plan")
        rebind(file, unet, tmp_path / "rebound.onnx")
        by_file = refit(by_model.path, tmp_path / "rebound.onnx", tmp_path / "file.plan")
        for refitted in (by_model, by_file):  # the second was refitted already, and can be again
            assert measure(refitted.path, unet) <= allowed
            assert compare_engine(refitted.engine.request, read_back(refitted.path, refitted.engine)) == ()
        assert by_model.engine.request.weights == by_file.engine.request.weights != engine.engine.request.weights
        assert measure(engine.path, unet) > 5 * allowed, "the engine that they were made of stays"
        again = build_engine(tmp_path / "rebound.onnx", by_file.path, profiles=[engines.SIZES], options=options)
        assert again.found
