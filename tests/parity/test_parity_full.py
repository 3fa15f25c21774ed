"""Parity where it takes long: no false alarm over many seeds, half precision, other architectures, SD1.5 at its real size."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import engines
import full_size
import onnx_files
import parity_faults as faults
import pytest
import small
import torch
from onnx_files import exchange, planted, unconsume
from parity_runs import NAMES, SLOTS, failed, kinds
from peak import peak_of

from shapecheck import Geometry, export
from shapecheck.build.engine import build_engine
from shapecheck.contract.profiles import Range
from shapecheck.observe.progress import silent
from shapecheck.verify.calls import Call, Draws
from shapecheck.verify.files import file_for
from shapecheck.verify.parity import Options, Study
from shapecheck.verify.reference import TorchModel, computed
from shapecheck.verify.search import Search

pytestmark = pytest.mark.full


def side(model, path, **options):
    (found,) = Study(model, ["ort"], onnx=path, options=Options(**options)).report().sides
    return found


@pytest.mark.parametrize("config", [onnx_files.DEEP, onnx_files.XL], ids=["deep", "xl"])
def test_no_false_alarm_over_twenty_seeds(tmp_path, config):
    path, _ = engines.exported(tmp_path / "unet.onnx", config)
    model, ratios = small.unet(**config), []
    for seed in range(20):
        found = side(model, path, seed=seed)
        assert {each.status for each in found.results} == {"passed"}, (seed, found.results)
        cases = [each.verdict for each in found.results if each.check.kind == "case"]
        ratios += [verdict.absolute.difference / verdict.own for verdict in cases]
    print(f"errors of ONNX Runtime: {min(ratios):.2f} to {max(ratios):.2f} times PyTorch's own")


@pytest.fixture(scope="module")
def half(tmp_path_factory):
    path = tmp_path_factory.mktemp("half") / "half.onnx"
    model = small.unet(**onnx_files.DEEP).half()
    export(model, path, dtype="float16")
    return model, path


def test_half_precision(half):
    for seed in range(5):
        found = side(*half, seed=seed)
        assert {each.status for each in found.results} == {"passed"}, (seed, found.results)
        assert found.ran.precision == "float16"


def test_faults_in_half_precision(half):
    model, path = half
    folder = path.parent  # where its weights lie
    exchanged = side(model, planted(path, folder / "exchanged.onnx", exchange(NAMES[2], NAMES[3])))
    assert f"acts where {NAMES[3]} belongs" in failed(exchanged)[SLOTS[2]]
    assert f"acts where {NAMES[2]} belongs" in failed(exchanged)[SLOTS[3]]
    assert kinds(exchanged)["slot"] == 2
    scaled = side(model, planted(path, folder / "scaled.onnx", faults.scaled(NAMES[5], 0.9)))
    assert next(iter(failed(scaled))) == SLOTS[5]
    assert 0.88 < float(failed(scaled)[SLOTS[5]].split(" acts as if ")[1].split(" of it ")[0]) < 0.92
    ignored = side(model, planted(path, folder / "ignored.onnx", unconsume("mid_block_residual")))
    assert failed(ignored)["slot[mid_block_residual]"].startswith("mid_block_residual changes nothing")
    assert kinds(scaled)["slot"] == kinds(ignored)["slot"] == 1


def test_bfloat16_cannot_run_on_the_cpu_and_says_so(tmp_path):
    path = tmp_path / "bf16.onnx"
    model = small.unet(**small.TINY).bfloat16()
    export(model, path, dtype="bfloat16")
    found = side(model, path)
    assert {each.check.kind for each in found.failed} == {"provider"}
    assert "bfloat16" in found.failed[0].reason


def test_without_control(tmp_path):
    path = tmp_path / "plain.onnx"
    model = small.unet(**small.SHALLOW)
    export(model, path, control=False)
    found = side(model, path)
    assert {each.status for each in found.results} == {"passed"}
    assert {each.check.kind for each in found.results} == {"provider", "contract", "weights", "precision", "input", "case"}


def test_names_of_another_project(tmp_path):
    path = tmp_path / "theirs.onnx"
    model = small.unet(**small.SHALLOW)
    export(model, path, naming="streamdiffusion")
    assert {each.status for each in side(model, path).results} == {"passed"}


def test_sd15_at_its_real_size(tmp_path):
    """All 13 slots at 24×40 latents: within twelve gigabytes, and in minutes on two cores."""
    process = [sys.executable, str(Path(full_size.__file__)), "sd15", str(tmp_path), "100GB"]
    subprocess.run(process, check=True, capture_output=True)
    shapecheck = [sys.executable, "-m", "shapecheck"]
    path = tmp_path / "unet.onnx"
    subprocess.run([*shapecheck, "export", str(tmp_path), "-o", str(path)], check=True, capture_output=True)
    command = [
        "parity",
        str(tmp_path),
        "--onnx",
        str(path),
        "--sizes",
        "320x192",
        "--batch",
        "1:1:2",
        "--report",
        str(tmp_path / "report"),
    ]
    output, peak = peak_of("-m", "shapecheck", *command)
    print(output, f"peak {peak / 2**30:.1f} GiB", sep="\n")
    assert peak <= 12e9
    record = json.loads((tmp_path / "report" / "parity.json").read_text(encoding="utf-8"))
    assert [(each["batch"], each["height"], each["width"]) for each in record["geometries"]] == [(1, 24, 40), (2, 24, 40)]
    (found,) = record["sides"]
    slots = [each for each in found["results"] if each["kind"] == "slot"]
    assert len(slots) == 13
    assert {each["status"] for each in found["results"]} == {"passed"}
    assert all(abs(each["effect"]["strength"] - 1) < 0.01 for each in slots)


def test_a_range_of_sizes(tmp_path):
    path, _ = engines.exported(tmp_path / "unet.onnx", onnx_files.DEEP)
    sizes = Range(Geometry(1, 8, 9), Geometry(2, 17, 25), Geometry(4, 33, 41))
    found = side(small.unet(**onnx_files.DEEP), path, ranges=(sizes,))
    assert {each.status for each in found.results} == {"passed"}
    assert len({each.geometry for each in found.results if each.check.kind == "case"}) == 4


@pytest.mark.skipif(torch.cuda.is_available(), reason="where there is a GPU the engine built again may run")
def test_where_an_engine_differs_is_looked_for_in_its_onnx_file(tmp_path):
    """The engine is built again with marked outputs, for real; without a GPU it cannot run, which is said."""
    healthy, _ = engines.exported(tmp_path / "healthy.onnx", onnx_files.XL)
    faulty = planted(healthy, tmp_path / "faulty.onnx", unconsume("down_block_residual_01"))
    size = Geometry(2, 9, 14, 7)
    build_engine(faulty, tmp_path / "faulty.plan", profiles=Range(size, size, size), options=engines.RTX)
    model = TorchModel(small.unet(**onnx_files.XL))
    file = file_for("rtx", model, faulty, tmp_path / "faulty.plan")
    call = Call(size, 0)
    draws = Draws(file.contract, 0)
    sides = computed(model, file.contract, [call], draws, "float64", lambda module: None, silent)
    before = set(tmp_path.iterdir())
    found, notes = Search(model, file, draws, sides, 4, None).at(call, "rtx")
    assert (found.module, found.slot) == ("down_blocks.0.resnets.0", "down_block_residual_01")
    assert found.note == f"found in {faulty}, which the engine was built from, in ONNX Runtime on the CPU"
    assert len(notes) == 1
    assert notes[0].startswith("where it differs could not be found: an engine runs on an NVIDIA GPU")
    assert set(tmp_path.iterdir()) == before
