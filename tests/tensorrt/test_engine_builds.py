"""Engines really built by TensorRT for RTX, on a machine without a GPU: nothing here is a result of standard TensorRT."""

from __future__ import annotations

import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import engines
import exports
import onnx
import onnx_files
import psutil
import pytest
import small
from click.testing import CliRunner

from shapecheck import Geometry, ShapecheckError, probe
from shapecheck.cli import main
from shapecheck.onnx.file import WEIGHTS_KEY
from shapecheck.tensorrt import process as tensorrt_process
from shapecheck.tensorrt.build import build_engine
from shapecheck.tensorrt.profiles import Range
from shapecheck.tensorrt.record import read_engine

pytestmark = pytest.mark.full

TINY = Range(Geometry(2, 17, 25), Geometry(2, 17, 25), Geometry(2, 17, 25))
ASKED = ("--sizes", "72x64:200x136:328x264", "--batch", "1:2:3", "--target", "rtx", "--compute-capability", "8.9")


@pytest.fixture(scope="module")
def deep(tmp_path_factory):
    """SD1.5's four levels without attention: nine slots, three halvings. Its ONNX file and contract."""
    return engines.exported(tmp_path_factory.mktemp("deep") / "deep.onnx", onnx_files.DEEP)


def shapecheck(*arguments):
    result = CliRunner().invoke(main, list(map(str, arguments)))
    assert result.exception is None or isinstance(result.exception, SystemExit), result.output
    return result


def test_a_reduced_sd15_is_built_whole(tmp_path):
    file, contract = engines.exported(tmp_path / "unet.onnx", {})
    assert len(contract.slots) == 13
    told: list[str] = []
    done = build_engine(
        file, tmp_path / "unet.plan", profiles=[engines.SIZES], options=engines.RTX, progress=lambda step, *_: told.append(step)
    )
    assert not done.found and not done.notes
    assert done.engine.digest == read_engine(done.path).digest
    assert sum(step.startswith("building: ") for step in told) > 3
    names = sorted(each.name for each in tmp_path.iterdir() if each.name != ".shapecheck.lock")
    assert names == ["unet.onnx", "unet.plan", "unet.plan.shapecheck.json"]


def test_an_sdxl_on_two_levels_is_built_with_two_profiles_and_options(tmp_path):
    file, contract = engines.exported(tmp_path / "xl.onnx", onnx_files.XL)
    options = replace(engines.RTX, optimization_level=1, workspace=2**28, tf32=False)
    done = build_engine(file, tmp_path / "xl.engine", profiles=[engines.SIZES, TINY], options=options)
    assert done.engine.request.options == options
    assert [len(each.inputs) for each in done.engine.request.profiles] == [len(contract.inputs) + len(contract.slots)] * 2


def test_a_reduced_sdxl_in_half_precision_from_linked_weights(tmp_path):
    """SDXL's own architecture at a fortieth of its width."""
    done = exports.exported_once(exports.reduced("sdxl").half())
    assert (done.dtype, done.weights) == ("float16", "link")
    built = build_engine(done.path, tmp_path / "unet.plan", profiles=[engines.SIZES], options=engines.RTX)
    profile = built.engine.request.profiles[0]
    assert [each.dtype for each in profile.inputs] == ["float16", "float32", *["float16"] * (len(profile.inputs) - 2)]
    assert {"text_embeds", "time_ids"} <= {each.name for each in profile.inputs}
    metadata = {each.key: each.value for each in onnx.load(done.path, load_external_data=False).metadata_props}
    assert built.engine.request.weights == built.engine.request.checkpoint == metadata[WEIGHTS_KEY]
    assert build_engine(done.path, tmp_path / "unet.plan", profiles=[engines.SIZES], options=engines.RTX).found


def test_a_timing_cache_that_cannot_be_written_costs_no_engine(deep, tmp_path, monkeypatch):
    (tmp_path / "timings.lock").mkdir()  # where the lock should be
    done = build_engine(
        deep[0], tmp_path / "unet.plan", profiles=[TINY], options=engines.RTX, timing_cache=tmp_path / "timings"
    )
    assert any("the timing cache" in note and "was not written" in note for note in done.notes)
    assert read_engine(done.path).request.contract == deep[1]


def test_a_fixed_batch_and_an_axis_that_never_varies_are_built_as_they_are(deep, tmp_path):
    onnx_files.planted(deep[0], tmp_path / "two.onnx", *fixed_batch(deep[1]))
    wrong = shapecheck("build", tmp_path / "two.onnx", "-o", tmp_path / "unet.plan", *ASKED)
    assert wrong.exit_code == 1
    assert "the graph fixes this axis" in " ".join(wrong.stdout.split())
    right = ("--sizes", "72x64:200x136:328x264", "--batch", "2", "--target", "rtx", "--compute-capability", "8.9")
    assert shapecheck("build", tmp_path / "two.onnx", "-o", tmp_path / "unet.plan", *right).exit_code == 0
    words = shapecheck("profile", tmp_path / "two.onnx", *right[:4], "--for", "trtexec").stdout
    assert "sample:2x4x8x9" in words and "timestep" not in words


def fixed_batch(contract):
    """Every input at batch 2."""
    rules = contract.input_rules
    return [
        onnx_files.declare(name, 2, *(str(dim) if dim.symbol else dim.scale for dim in rule[1:]))
        for name, rule in rules.items()
    ]


def test_a_controlnet_is_told_from_a_unet(tmp_path):
    unet = small.unet(**small.TINY)
    file = exports.exported_once(small.controlnet(unet)).path
    asked = ("--sizes", "200x136", "--target", "rtx", "--compute-capability", "8.9")
    assert shapecheck("build", file, "-o", tmp_path / "net.plan", *asked).exit_code == 0
    record = read_engine(tmp_path / "net.plan").request
    assert [each.name for each in record.profiles[0].inputs][-1] == "controlnet_cond"  # conditioning_scale never varies
    assert len(record.outputs) == len(record.contract.slots)
    (tmp_path / "unet.json").write_text(probe(unet).to_json(), encoding="utf-8")
    result = shapecheck("build", file, "-o", tmp_path / "x.plan", *asked, "--model", tmp_path / "unet.json")
    assert result.exit_code == 2
    assert "is a ControlNet, and --model says which UNet its outputs are for" in result.stderr


def test_an_unknown_gpu_is_refused_in_tensorrt_s_words(deep, tmp_path):
    asked = ("--sizes", "200x136", "--target", "rtx", "--compute-capability")
    result = shapecheck("build", deep[0], "-o", tmp_path / "unet.plan", *asked, "12.7")
    assert result.exit_code == 2
    assert "SM127" in result.stderr and "could not build" in result.stderr
    result = shapecheck("build", deep[0], "-o", tmp_path / "unet.plan", *asked, "9.0")
    assert "--compute-capability 9.0: TensorRT for RTX builds for 7.5, 8.0, 8.6, 8.9, 12.x" in result.stderr
    result = shapecheck("build", deep[0], "-o", tmp_path / "unet.plan", *asked, "ada")
    assert "'ada' is not a compute capability such as 8.9" in result.stderr
    assert list(tmp_path.iterdir()) == []


def test_options_that_cannot_be_kept_are_told(deep, tmp_path):
    for option, message in (
        ("--version-compatible", "--version-compatible is for --target trt"),
        ("--refittable", "TensorRT for RTX cannot build them elsewhere"),
    ):
        result = shapecheck("build", deep[0], "-o", tmp_path / "unet.plan", *ASKED, option)
        assert (result.exit_code, list(tmp_path.iterdir())) == (2, [])
        assert message in result.stderr
    result = shapecheck("build", deep[0], "-o", tmp_path / "unet.plan", "--sizes", "200x136", "--compute-capability", "8.9")
    assert "--compute-capability is for --target rtx" in result.stderr


def test_a_node_that_tensorrt_refuses_is_told_with_its_slot(deep, tmp_path):
    model = onnx.load(deep[0])
    at, node = next((at, node) for at, node in enumerate(model.graph.node) if "down_blocks.1/resnets.0/conv1" in node.name)
    planted_node = onnx.helper.make_node("Bernoulli", [node.output[0]], ["planted_out"], name="planted")
    for each in model.graph.node:
        each.input[:] = ["planted_out" if name == node.output[0] else name for name in each.input]
    model.graph.node.insert(at + 1, planted_node)
    model.opset_import[0].version = max(15, model.opset_import[0].version)
    onnx.save(model, tmp_path / "unet.onnx")
    with pytest.raises(tensorrt_process.EngineError) as caught:
        build_engine(tmp_path / "unet.onnx", tmp_path / "unet.plan", profiles=[TINY], options=engines.RTX)
    told = str(caught.value)
    assert "Bernoulli planted (computes down_blocks.1.resnets.0" in told
    assert "Error" in told or "error" in told  # TensorRT's own words are kept
    assert [each.name for each in tmp_path.iterdir()] == ["unet.onnx"]


BUILD = """
import sys
from shapecheck import Geometry
from shapecheck.tensorrt.build import build_engine
from shapecheck.tensorrt.record import BuildOptions
from shapecheck.tensorrt.profiles import Range
def tell(step, *_):
    print(step, flush=True)
sizes = Range(Geometry(1, 8, 9), Geometry(2, 17, 25), Geometry(3, 33, 41))
options = BuildOptions("rtx", compute_capabilities=("8.9",))
build_engine(sys.argv[1], sys.argv[2], profiles=[sizes], options=options, timing_cache=sys.argv[3], progress=tell)
"""


def building(deep, folder: Path, moment: str) -> tuple[subprocess.Popen, psutil.Process | None]:
    """A build in a process of its own that has come to this moment, and the process in which TensorRT is."""
    command = [sys.executable, "-c", BUILD, str(deep[0]), str(folder / "unet.plan"), str(folder / "timings")]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    with process.stdout as lines:
        if any(line.startswith(moment) for line in lines):
            children = psutil.Process(process.pid).children()
            return process, children[0] if children else None
    raise AssertionError(f"the build never came to {moment!r}")


@pytest.mark.parametrize("moment", ["loading TensorRT", "building: "])
def test_a_build_that_is_killed_leaves_nothing_half_written(moment, deep, tmp_path):
    (tmp_path / "before").mkdir()
    engines.built(tmp_path / "before", onnx_files.DEEP)
    timings = (tmp_path / "before" / "timings").replace(tmp_path / "timings").read_bytes()
    assert timings
    process, worker = building(deep, tmp_path, moment)
    process.send_signal(signal.SIGKILL)
    process.wait()
    if worker is not None:
        worker.wait(timeout=20)
    kept = {each.name for each in tmp_path.iterdir() if not each.name.startswith(".shapecheck.")}
    assert kept <= {"before", "timings", "timings.lock"}
    assert (tmp_path / "timings").read_bytes() == timings
    partials = [each for each in tmp_path.iterdir() if each.name.startswith(".shapecheck.")]
    assert not [each for each in partials if each.stat().st_size]


def test_a_full_disk_is_told_with_the_engine_s_name(deep, tmp_path):
    command = [sys.executable, "-m", "shapecheck", "build", str(deep[0]), "-o", str(tmp_path / "unet.plan"), *ASKED]
    limited = ["bash", "-c", 'ulimit -f 4000; exec "$@"', "bash", *command]
    done = subprocess.run(limited, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert f"error: cannot write {tmp_path / 'unet.plan'}: File too large; it needs 0.0" in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_worker_that_is_killed_is_told_and_an_engine_of_before_stays(deep, tmp_path):
    (tmp_path / "unet.plan").write_bytes(b"of before")
    killed: list[int] = []
    before = psutil.Process().children()

    def kill(step, *_):
        if step.startswith("building: ") and not killed:
            (child,) = [each for each in psutil.Process().children() if each not in before]
            killed.append(child.pid)
            child.kill()

    with pytest.raises(ShapecheckError, match=r"was killed by signal 9; was there too little memory\?"):
        build_engine(deep[0], tmp_path / "unet.plan", profiles=[engines.SIZES], options=engines.RTX, progress=kill)
    assert killed
    assert (tmp_path / "unet.plan").read_bytes() == b"of before"
    assert [each.name for each in tmp_path.iterdir()] == ["unet.plan"]


def test_no_process_is_left_behind(deep, tmp_path):
    before = psutil.Process().children()

    def stop(step, *_):
        if step.startswith("building: "):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build_engine(deep[0], tmp_path / "unet.plan", profiles=[engines.SIZES], options=engines.RTX, progress=stop)
    assert not [each for each in psutil.Process().children() if each not in before]
    assert list(tmp_path.iterdir()) == []
