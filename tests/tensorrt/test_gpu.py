"""Standard TensorRT on a GPU: built, read back, run and compared with PyTorch. Not run where there is neither.

`pytest -m gpu` skips where TensorRT cannot run; `pytest -m gpu --shapecheck-backends trt` fails there, with the reason.
"""

from __future__ import annotations

import engines
import pytest
import small
import torch

from shapecheck import BuildOptions, EngineSession, Geometry
from shapecheck.runtime.binding import CallError
from shapecheck.tensorrt.build import build_engine, read_back
from shapecheck.tensorrt.check import check_engine
from shapecheck.tensorrt.engine_tensors import compare_engine
from shapecheck.tensorrt.profiles import Range

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
    checked = check_engine(built.path, built.engine, requested=Geometry(2, 33, 41))
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
