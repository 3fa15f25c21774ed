"""Planted faults, each named on every backend as on the CPU: the same checks fail, for the same slot, in the same words.

`pytest -m gpu tests/parity/test_gpu_faults.py -s` prints each with its seconds; `-m nightly` runs the same on the CPU.
The UNet is `onnx_files.DEEP`, whose nine slots are of four shapes.
"""

from __future__ import annotations

import shutil
import time
from functools import partial

import engines
import onnx_files
import parity_faults as faults
import pytest
import small
import torch
from onnx_files import add_again, exchange, planted, unconsume
from parity_runs import NAMES, run_side

from shapecheck import BuildOptions, Geometry
from shapecheck.parity.request import ParityRequest
from shapecheck.parity.runners import open_session
from shapecheck.tensorrt.build import build_engine
from shapecheck.tensorrt.profiles import Range

SIZE = Geometry(2, 9, 14, 7)
ONE_SIZE = Range(SIZE, SIZE, SIZE)
PAIRS = [NAMES[first : first + 2] for first in (0, 2, 4, 7)]
"""Neighbours of one shape."""
INPUTS = ("sample", "timestep", "encoder_hidden_states")


def name_slots(words, *names):
    """Return the checks that fail, each with the start of its reason."""
    return {f"slot[{name}]": f"{name} {words}" for name in names}


FAULTS = {
    **{f"lost {name}": (unconsume(name), name_slots("changes nothing", name)) for name in NAMES},
    **{f"part of {name}": (faults.scaled(name, 0.7), name_slots("acts ", name)) for name in NAMES},
    **{f"twice {name}": (add_again(name), name_slots("acts ", name)) for name in NAMES},
    **{f"turned {name}": (faults.reshaped(name), name_slots("acts with height and width exchanged", name)) for name in NAMES},
    **{
        f"exchanged {one} {other}": (
            exchange(one, other),
            name_slots(f"acts where {other} belongs", one) | name_slots(f"acts where {one} belongs", other),
        )
        for one, other in PAIRS[:-1]
    },
    # At its new place the mid slot acts on very little.
    "exchanged {} {}".format(*PAIRS[-1]): (exchange(*PAIRS[-1]), name_slots("", *PAIRS[-1])),
    **{
        f"baked {name}": (faults.scaled(name, 0), {f"input[{name}]": f"{name} changes nothing: it is baked into the file"})
        for name in INPUTS
    },
    "halves exchanged": (
        faults.halves_exchanged(*NAMES),
        {"cfg": "residuals given in the first half of the batch act in the second: the halves are exchanged"},
    ),
    "not a number": (faults.not_a_number(2, 4), {}),
}
"""Name → the edit, and what fails beside images."""
IN_HALF = [*list(FAULTS)[:-9:2], *list(FAULTS)[-9:]]
"""Every second slot of each kind, and all that is not of one slot."""
ENGINES = ["lost " + NAMES[3], "part of " + NAMES[5], "turned " + NAMES[0], "exchanged {} {}".format(*PAIRS[1])]
ENGINES += ["baked timestep", "halves exchanged"]
CPU, GPU = (partial(pytest.param, marks=getattr(pytest.mark, mark)) for mark in ("nightly", "gpu"))


@pytest.fixture(scope="module")
def healthy(tmp_path_factory):
    """Models in both precisions, each with its file."""
    folder, found = tmp_path_factory.mktemp("healthy"), {}
    for dtype in (torch.float32, torch.float16):
        model = small.unet(**onnx_files.DEEP).to(dtype)
        file = engines.sealed(*onnx_files.written(folder / f"{dtype}.onnx", model, latent=(17, 25)))
        found[dtype] = model, file
    return found


def judge(request, expected):
    """Run it, print what it came to, and hold it to what is expected: images differ, and nothing else fails."""
    began = time.perf_counter()
    # the session that parity opens, without the search for where images differ, which takes most of the time
    opener = partial(open_session, geometries=[SIZE], model=None)
    found = run_side(request, (ONE_SIZE,), opener=opener)
    (backend,) = request.what_runs
    reasons = {str(each.check).removeprefix(f"{backend}/"): each.reason for each in found.failed}
    print(f"{time.perf_counter() - began:5.1f} s  {backend}: {'; '.join(reasons.values()) or 'nothing failed'}", flush=True)
    images = [reason for name, reason in reasons.items() if name.startswith("case[")]
    named = {name: reason for name, reason in reasons.items() if name.startswith(("slot[", "input[", "cfg"))}
    assert named.keys() == expected.keys()
    assert all(reason.startswith(expected[name]) for name, reason in named.items()), named
    assert reasons.keys().isdisjoint({"provider", "weights"})
    return found, images


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["float32", "float16"])
@pytest.mark.parametrize("backend", [CPU("ort"), GPU("ort-cuda")])
def test_a_healthy_file_passes_in_all(backend, dtype, healthy, shapecheck_require):
    shapecheck_require(backend)
    model, file = healthy[dtype]
    found, images = judge(ParityRequest(model, file, backends=(backend,)), {})
    assert images == []
    assert {each.status for each in found.results} == {"passed"}, found.results


@pytest.mark.parametrize(
    ("fault", "dtype"),
    [
        *(pytest.param(fault, torch.float32, id=f"{fault}, float32") for fault in FAULTS),
        *(pytest.param(fault, torch.float16, id=f"{fault}, float16") for fault in IN_HALF),
    ],
)
@pytest.mark.parametrize("backend", [CPU("ort"), GPU("ort-cuda")])
def test_a_fault_is_named(backend, dtype, fault, healthy, tmp_path, shapecheck_require):
    shapecheck_require(backend)
    edit, expected = FAULTS[fault]
    model, file = healthy[dtype]
    faulty = planted(file, tmp_path / "faulty.onnx", edit)
    _, images = judge(ParityRequest(model, faulty, backends=(backend,)), expected)
    assert len(images) >= 1
    if not expected:
        cells = SIZE.batch * SIZE.height * SIZE.width
        assert set(images) == {f"{cells} NaN and 0 Inf among {4 * cells} values, in channel 2"}


@pytest.mark.gpu
@pytest.mark.parametrize("fault", ["none", *ENGINES])
def test_a_fault_in_an_engine_is_named(fault, healthy, tmp_path, shapecheck_require):
    """Each engine is built at the least effort, without TF32."""
    shapecheck_require("trt")
    edit, expected = FAULTS.get(fault, (None, {}))
    model, file = healthy[torch.float32]
    faulty, plan, began = tmp_path / "faulty.onnx", tmp_path / "faulty.plan", time.perf_counter()
    if edit is None:
        shutil.copyfile(file, faulty)
    else:
        planted(file, faulty, edit)
    build_engine(faulty, plan, profiles=[ONE_SIZE], options=BuildOptions(tf32=False, optimization_level=0))
    print(f"{time.perf_counter() - began:5.1f} s  engine built, {fault}", flush=True)
    found, images = judge(ParityRequest(model, engine=plan), expected)
    assert bool(images) == (edit is not None)
    if edit is None:
        assert {each.status for each in found.results} == {"passed"}, found.results
