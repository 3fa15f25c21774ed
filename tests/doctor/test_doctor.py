"""`doctor`: what really runs on this machine, and planted machines for everything else."""

from __future__ import annotations

import ctypes.util
import json
import re
import subprocess
import sys
import tomllib
from collections.abc import Collection
from pathlib import Path

import pytest
import torch

from shapecheck import ShapecheckError, doctor
from shapecheck.doctor import packages, probes, report
from shapecheck.doctor.environment import BACKENDS, Backend, Device, Driver, Environment, Gap, Package
from shapecheck.doctor.probes import ProbeAnswer, ask

no_gpu = pytest.mark.skipif(bool(ctypes.util.find_library("cuda")), reason="what is missing where there is no GPU")
DRIVERLESS = {"cards": 0, "container": False, "stage": "load libcuda.so.1", "kind": "OSError"}
H100 = {
    "cards": 1,
    "loaded": True,
    "version": "580.159.04",
    "cuda": "13.0",
    "devices": [{"name": "NVIDIA H100", "capability": "9.0", "memory": 85017493504}],
}
ORT = {
    "version": "1.31.1",
    "built_for": "13.0",
    "linked": "10",
    "providers": ["TensorrtExecutionProvider", "CUDAExecutionProvider"],
}
POLYGRAPHY = {"version": "0.53.6"}
WORKING_TENSORRT = """
__version__ = "{version}"
class Logger: pass
class Network: pass
class Builder:
    def __init__(self, logger): pass
    def create_network(self, flags): return Network()
    def create_builder_config(self): return None
    def build_serialized_network(self, network, config): return b"engine" if network.parsed else None
class OnnxParser:
    def __init__(self, network, logger): self.network = network
    def parse(self, model):
        self.network.parsed = model.startswith(b"\\x08\\x08")
        return self.network.parsed
class Engine:
    def create_execution_context(self): return object()
class Runtime:
    def __init__(self, logger): pass
    def deserialize_cuda_engine(self, engine): return Engine()
"""


@pytest.fixture(scope="module")
def told() -> list[str]:
    return []


@pytest.fixture(scope="module")
def here(told) -> Environment:
    """This machine."""
    return doctor.examine(told.append)


@pytest.fixture
def plant(tmp_path, monkeypatch):
    """Put packages, and distributions that claim them, in front of the installed ones."""
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))

    def put(module: str, code: str = "", *distributions: str) -> None:
        (tmp_path / module).mkdir()
        (tmp_path / module / "__init__.py").write_text(code, encoding="utf-8")
        for each in distributions:
            name, version = each.split("==")
            folder = tmp_path / f"{name.replace('-', '_')}-{version}.dist-info"
            folder.mkdir()
            (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n", encoding="utf-8")
            (folder / "RECORD").write_text(f"{module}/__init__.py,,\n", encoding="utf-8")

    return put


@pytest.fixture
def machine(monkeypatch):
    """A machine known by what its probes answer: facts by the last word of the probe. Those in `tried` are really asked."""

    def put(reasons: dict[str, ProbeAnswer] | None = None, *, tried: Collection[str] = (), **facts: dict[str, object]) -> None:
        def answer(probe: str) -> ProbeAnswer:
            word = "distributions" if probe.startswith("distributions") else probe.split()[-1].removesuffix("ExecutionProvider")
            if word in tried:
                return ask(probe)
            module = "onnxruntime" if probe.startswith("onnxruntime") else word
            absent = {"missing": module, "stage": f"import {module}"}
            return (reasons or {}).get(word) or ProbeAnswer(facts.get(word, absent), "")

        monkeypatch.setattr(doctor, "ask", answer)

    return put


@pytest.mark.full
def test_what_runs_here_was_run(here):
    assert [each.name for each in here.backends] == list(BACKENDS)
    for name, version in (("torch", "torch 2"), ("torch-compile", "torch 2"), ("ort", "onnxruntime 1")):
        assert here.backend(name).runs
        assert here.backend(name).detail.startswith(version)
        assert not here.backend(name).gaps
    packages = {each.module: each for each in here.packages}
    assert packages["onnxruntime"].name == "onnxruntime-gpu"
    assert all(packages[each].importable for each in ("torch", "diffusers", "onnx", "onnx_ir", "onnxscript", "pytest"))
    assert here.python.startswith(f"{sys.version_info.major}.{sys.version_info.minor}")


@no_gpu
def test_a_provider_that_falls_back_to_the_cpu_does_not_run(here):
    backend = here.backend("ort-cuda")
    assert not backend.runs
    assert "no NVIDIA GPU and no driver" in backend.reason
    assert not here.backend("torch-cuda").runs
    assert not here.devices
    assert here.failing(["torch", "ort-cuda", "ort", "ort-cuda"]) == (backend,)


@pytest.mark.parametrize("gone", [("libcublasLt.so.13",), ("libcudnn.so.9", "libcublasLt.so.13"), ()])
def test_cuda_libraries_that_no_package_brought_are_named(machine, gone):
    """Whether they are missing here depends on torch: its build for CUDA brings them, the one for the CPU does not."""
    said = f"{', '.join(gone)} {'is' if len(gone) == 1 else 'are'} missing" if gone else "a session fell back to the CPU"
    machine({"CUDA": ProbeAnswer(ORT, said, gone)}, driver={"kind": "OSError"}, CPU=ORT)
    backend = doctor.backend("ort-cuda")
    assert not backend.runs
    libraries = Gap(said, "pip install 'onnxruntime-gpu[cuda,cudnn]'")
    assert backend.gaps == (Gap("no NVIDIA GPU and no driver", backend.gaps[0].fix), *((libraries,) if gone else ()))


@no_gpu
def test_tensorrt_that_is_not_installed_names_its_command(here):
    package = next(each for each in here.packages if each.module == "tensorrt")
    assert (package.installed, package.importable, package.version) == (False, False, "")
    assert here.backend("trt").reason == "tensorrt is not installed; no NVIDIA GPU and no driver"
    cuda = (torch.version.cuda or "13").split(".")[0]  # libraries of two releases of CUDA are not to be mixed
    assert f"pip install 'tensorrt-cu{cuda}>=10.6,<11'" in here.backend("trt").fix  # ONNX Runtime's provider can use it too
    assert "linked with TensorRT 10, which is not importable here" in here.backend("ort-trt").reason


@no_gpu
def test_tensorrt_for_rtx_builds_without_a_gpu(here):
    pytest.importorskip("tensorrt_rtx")
    backend = here.backend("rtx")
    assert backend.runs
    assert backend.detail.endswith("builds engines, but cannot run them here: no NVIDIA GPU and no driver")
    assert (backend.reason, backend.fix) == ("", "")  # nothing keeps it from building
    assert backend.gaps == here.backend("trt").gaps[-1:]


def test_progress_says_what_is_left(here, told):
    assert told[-1] == "judging"
    assert [int(line.split()[-3]) for line in told[:-1]] == list(range(len(told) - 1, 0, -1))
    assert any("diffusers" in line for line in told)


def test_the_tiny_model_is_what_it_says():
    from onnx import TensorProto, helper

    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1]) for name in "xy"]
    graph = helper.make_graph([helper.make_node("Add", ["x", "x"], ["y"])], "g", ends[:1], ends[1:])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    assert model.SerializeToString() == probes.MODEL


def test_the_oldest_versions_are_those_of_the_project():
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    lines = [*project["dependencies"], *(line for extra in project["optional-dependencies"].values() for line in extra)]
    asked = {re.split("[>=,]", line)[0]: re.search(r">=([\d.]+)", line) for line in lines}
    for module, wanted in packages.REQUIREMENTS.items():
        assert asked[packages.suggest_distribution(module)][1] == wanted.oldest, module


def test_an_unknown_backend_lists_the_known(here):
    for ask_for in (doctor.backend, here.backend, lambda name: here.failing([name])):
        with pytest.raises(
            ShapecheckError, match="no backend is called 'cuda'; known: torch, torch-cuda, torch-compile, ort, "
        ):
            ask_for("cuda")


def test_it_imports_nothing_heavy():
    code = "import sys, shapecheck.doctor; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert not {"torch", "onnxruntime", "onnx", "tensorrt", "numpy", "click", "diffusers"} & set(loaded)


def test_the_owners_of_modules_are_read_from_what_is_installed(plant):
    plant("tensorrt", "", "tensorrt-cu13==10.13.3.9")
    plant("tensorrt_bindings", "", "tensorrt-cu13-bindings==10.13.3.9")
    plant("onnxruntime", "", "onnxruntime==1.32.0")
    facts = ask(packages.INSTALLED).facts
    assert facts["owners"]["tensorrt"] == ["tensorrt-cu13"]
    assert {"onnxruntime", "onnxruntime-gpu"} == set(facts["owners"]["onnxruntime"])
    assert facts["installed"].items() >= {"tensorrt-cu13": "10.13.3.9", "tensorrt-cu13-bindings": "10.13.3.9"}.items()
    assert facts["installed"]["onnxruntime"] == "1.32.0"


@pytest.mark.parametrize("damaged", ["RECORD", "METADATA"])
def test_a_damaged_distribution_hides_no_other(plant, tmp_path, damaged):
    plant("other", "", "other==1.0")
    (tmp_path / "other-1.0.dist-info" / damaged).write_bytes(b"Name: \xff")
    plant("tensorrt", "", "tensorrt-cu13==10.13.3.9")
    facts = ask(packages.INSTALLED).facts
    assert "problem" not in facts
    assert facts["owners"]["tensorrt"] == ["tensorrt-cu13"]
    assert facts["installed"]["tensorrt-cu13"] == "10.13.3.9"
    assert ("other" in facts["installed"]) is (damaged == "RECORD")


def test_bindings_without_libraries_are_installed_and_not_importable(plant, machine):
    missing = "libnvinfer.so.10: cannot open shared object file: No such file or directory"
    plant("tensorrt", f"raise ImportError({missing!r})")
    installed = {"tensorrt-cu13": "10.13.3.9", "tensorrt-cu13-bindings": "10.13.3.9"}
    facts = {"owners": {"tensorrt": ["tensorrt-cu13"]}, "installed": installed}
    machine(tried=["tensorrt"], distributions=facts, driver=H100, polygraphy=POLYGRAPHY)
    backend = doctor.backend("trt")
    assert not backend.runs
    (gap,) = backend.gaps
    assert gap.problem == (
        "the bindings of TensorRT 10.13.3.9 are installed without its libraries (libnvinfer.so.10 was not found)"
    )
    by_hand = "put the folder that holds libnvinfer.so.10 on LD_LIBRARY_PATH"
    fetch = "pip install {}--extra-index-url https://pypi.nvidia.com tensorrt-cu13-libs==10.13.3.9  # or " + by_hand
    assert gap.fix == fetch.format("")
    machine(
        tried=["tensorrt"],
        distributions=facts | {"installed": installed | {"tensorrt-cu13-libs": "10.13.3.9"}},
        driver=H100,
        polygraphy=POLYGRAPHY,
    )
    assert doctor.backend("trt").fix == fetch.format("--force-reinstall --no-deps ")
    machine(tried=["tensorrt"], driver=H100, polygraphy=POLYGRAPHY)  # bindings that no pip installed
    (gap,) = doctor.backend("trt").gaps
    assert (gap.problem.startswith("the bindings of TensorRT are installed without"), gap.fix) == (True, by_hand)


def test_bindings_alone_say_what_makes_them_whole(machine):
    facts = {"owners": {"tensorrt": []}, "installed": {"tensorrt-cu13-bindings": "11.4.0.106"}}
    machine(distributions=facts, driver=H100, polygraphy=POLYGRAPHY)
    (gap,) = doctor.backend("trt").gaps
    assert gap.problem == "tensorrt-cu13-bindings alone is installed, without the package tensorrt"
    assert gap.fix == "pip install tensorrt-cu13==11.4.0.106"
    machine(distributions=facts, driver=H100, polygraphy=POLYGRAPHY, CPU=ORT)  # whose provider loads no TensorRT 11
    assert doctor.backend("trt").fix == "pip install 'tensorrt-cu13>=10.6,<11'"


@pytest.mark.parametrize(
    ("runtime", "owners", "torch", "command"),
    [
        (ORT, ["onnxruntime-gpu"], "12.8", "pip install 'tensorrt-cu13>=10.6,<11'"),
        (ORT | {"built_for": "12.8"}, ["onnxruntime-gpu"], "13.0", "pip install 'tensorrt-cu12>=10.6,<11'"),
        (ORT | {"linked": ""}, ["onnxruntime-gpu"], "13.0", "pip install 'tensorrt-cu13>=10.6,<11'"),
        (ORT | {"linked": "", "built_for": ""}, ["onnxruntime-gpu"], None, "pip install 'tensorrt>=10.6,<11'"),
        ({"missing": "onnxruntime"}, [], "12.8", "pip install 'tensorrt-cu12>=10.6,<11'"),
        ({"missing": "onnxruntime"}, [], "13.0", "pip install 'shapecheck-controlnet[gpu]'"),
    ],
)
def test_the_tensorrt_that_is_named_goes_with_what_is_there(machine, runtime, owners, torch, command):
    machine(
        distributions={"owners": {"onnxruntime": owners}, "installed": dict.fromkeys(owners, "1.31.1")},
        driver=H100,
        polygraphy=POLYGRAPHY,
        CPU=runtime,
        torch={"version": "2.13.0", "built_for": torch},
    )
    assert doctor.backend("trt").gaps == (Gap("tensorrt is not installed", command),)


def test_an_old_tensorrt_is_not_exchanged_for_one_that_onnx_runtime_cannot_load(machine):
    machine(driver=H100, tensorrt={"version": "10.3.0", "loaded": True}, polygraphy=POLYGRAPHY, CPU=ORT)
    assert doctor.backend("trt").fix == "pip install --upgrade 'tensorrt>=10.6,<11'"


@pytest.mark.parametrize(
    ("code", "problem"),
    [
        ("import ctypes; ctypes.string_at(0)", "the interpreter ended with SIGSEGV"),
        ("import os; os._exit(3)", "the interpreter ended with status 0x3"),
        ("raise SystemExit('needs a licence')", "needs a licence"),
        ("{}['libs']", "KeyError: 'libs'"),
        ("raise RuntimeError('two\\nlines \\x1b[31mred')", "two lines [31mred"),
        ("print('{\"version\": 1}'); raise RuntimeError('after printing to stdout')", "after printing to stdout"),
    ],
)
def test_an_import_that_ends_badly_is_a_finding(plant, code, problem, capfd):
    plant("tensorrt", code)
    answer = ask("tensorrt tensorrt")
    assert answer.problem.startswith(f"cannot import tensorrt: {problem}")
    assert "version" not in answer.facts
    assert capfd.readouterr() == ("", "")


def test_last_words_are_kept(plant, machine):
    plant("tensorrt", "import os; os.write(2, b'first\\nno licence found\\n'); os.abort()")
    machine(tried=["tensorrt"], driver=H100, polygraphy=POLYGRAPHY)
    problem = "cannot import tensorrt: the interpreter ended with SIGABRT; its last words: no licence found"
    assert doctor.backend("trt").gaps == (Gap(problem, "pip install --force-reinstall tensorrt"),)


def test_a_package_without_its_dependency_is_installed_anew(plant, machine):
    plant("polygraphy", "import no_such_module")
    machine(tried=["polygraphy"], driver=H100, tensorrt={"version": "10.16.1", "built": True, "loaded": True})
    gap = Gap("cannot import polygraphy: No module named 'no_such_module'", "pip install --force-reinstall polygraphy")
    assert doctor.backend("trt").gaps == (gap,)


CUT_SHORT = """
import os, stat
for number in range(3, 20):
    try:
        is_pipe = stat.S_ISFIFO(os.fstat(number).st_mode)
    except OSError:
        continue
    if is_pipe:
        os.write(number, b'{"versi')
os.abort()
"""
"""Ends in the middle of a line of its answer, which goes through a pipe that is neither of the standard ones."""


def test_an_answer_that_was_cut_short_counts_as_far_as_it_goes(plant):
    plant("tensorrt", CUT_SHORT)
    answer = ask("tensorrt tensorrt")
    assert answer.facts == {"stage": "import tensorrt"}
    assert answer.problem == "cannot import tensorrt: the interpreter ended with SIGABRT"


def test_an_import_without_end_is_a_finding(plant, monkeypatch):
    monkeypatch.setattr(probes, "_TIMEOUT", 0.5)
    plant("tensorrt", "import time; time.sleep(60)")
    assert ask("tensorrt tensorrt").problem == "cannot import tensorrt: no answer within 0.5 s"


def test_what_lies_in_the_working_folder_is_not_installed(tmp_path, monkeypatch):
    (tmp_path / "polygraphy").mkdir()
    (tmp_path / "polygraphy" / "__init__.py").write_text("raise RuntimeError('mine')", encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    assert "mine" not in ask("importing polygraphy").reason


def test_an_empty_folder_is_no_package(plant, tmp_path):
    (tmp_path / "tensorrt").mkdir()
    assert ask("importing tensorrt").reason == "a folder tensorrt is there, without the package's files"


def test_tensorrt_that_builds_and_loads_an_engine_runs(plant, machine):
    plant("tensorrt", WORKING_TENSORRT.format(version="11.4.0.106"))
    machine(tried=["tensorrt"], driver=H100, polygraphy=POLYGRAPHY)
    assert doctor.backend("trt") == Backend("trt", True, "tensorrt 11.4.0.106: an engine was built and loaded")


@pytest.mark.parametrize(
    ("versions", "old"),
    [
        (("10.6.0", "0.49.26"), ""),
        (("10.5.9.1", "0.53.6"), "tensorrt 10.5.9.1 is older than 10.6"),
        (("10.16.1", "0.49.9"), "polygraphy 0.49.9 is older than 0.49.26"),
        (("10.5.9-vendor.build", "0.53.6"), "tensorrt 10.5.9-vendor.build is older than 10.6"),
        (("10.6.0-vendor.build", "unknown"), ""),
    ],
)
def test_tensorrt_runs_from_the_oldest_versions_on(machine, versions, old):
    tensorrt, polygraphy = versions
    machine(driver=H100, tensorrt={"version": tensorrt, "built": True, "loaded": True}, polygraphy={"version": polygraphy})
    backend = doctor.backend("trt")
    assert backend.runs is not bool(old)
    if old:
        name, oldest = old.split()[0], old.split()[-1]
        assert backend.gaps == (Gap(f"{old}, the oldest that is supported", f"pip install --upgrade '{name}>={oldest}'"),)


@pytest.mark.parametrize(
    ("old", "new", "problem"),
    [
        (
            "def __init__(self, logger): pass\n    def create_n",
            "def create_n",
            "cannot create a builder: CUDA initialization failure",
        ),
        ('return b"engine"', "return None", "cannot build an engine: no reason was given"),
        ("return Engine()", "return None", "cannot load an engine: no reason was given"),
    ],
)
def test_tensorrt_that_imports_and_fails_later_does_not_run(plant, machine, old, new, problem):
    code = WORKING_TENSORRT.format(version="10.16.1").replace(old, new)
    if "builder" in problem:
        code += "\ndef fail(self, logger):\n    import os\n    os.write(2, b'[TRT] [E] CUDA initialization failure\\n')\n"
        code += "    raise TypeError('factory function returned nullptr')\nBuilder.__init__ = fail\n"
    plant("tensorrt", code)
    machine(tried=["tensorrt"], driver=H100, polygraphy=POLYGRAPHY)
    backend = doctor.backend("trt")
    assert (backend.runs, backend.detail) == (False, "")
    assert backend.reason.startswith(problem)
    assert backend.fix == "pip install --force-reinstall tensorrt"


def test_two_onnx_runtimes_are_a_conflict(plant, machine):
    plant("onnxruntime", "__version__ = '1.32.0'\ndef get_available_providers(): return ['CPUExecutionProvider']")
    owners = {"onnxruntime": ["onnxruntime", "onnxruntime-gpu"]}
    facts = {"owners": owners, "installed": {"onnxruntime": "1.32.0", "onnxruntime-gpu": "1.31.1"}}
    machine(tried=["CUDA"], distributions=facts, driver=H100)
    backend = doctor.backend("ort-cuda")
    conflict = "onnxruntime and onnxruntime-gpu own the same folder: the last installed wins, removing one breaks the other"
    command = "pip uninstall -y onnxruntime onnxruntime-gpu && pip install onnxruntime-gpu"
    assert Gap(conflict, command) in backend.gaps
    assert Gap("onnxruntime 1.32.0 is built without the CUDA provider", command) in backend.gaps


def test_no_onnx_runtime_at_all_is_one_gap(machine):
    machine(driver=H100)
    problem, with_cuda = "onnxruntime is not installed", "pip install 'onnxruntime-gpu[cuda,cudnn]'"
    assert doctor.backend("ort").gaps == (Gap(problem, "pip install 'shapecheck-controlnet[onnx]'"),)
    assert {doctor.backend(name).gaps for name in ("ort-cuda", "ort-trt")} == {(Gap(problem, with_cuda),)}


def test_an_onnx_runtime_that_lost_its_files_is_told(machine):
    machine(distributions={"owners": {"onnxruntime": ["onnxruntime-gpu"]}, "installed": {"onnxruntime-gpu": "1.31.1"}})
    (gap,) = doctor.backend("ort").gaps
    assert gap == Gap("cannot import onnxruntime: no reason was given", "pip install --force-reinstall onnxruntime-gpu")


def test_a_conflict_is_told_of_the_package_even_while_it_works(machine):
    owners = {"onnxruntime": ["onnxruntime", "onnxruntime-gpu"]}
    installed = {"onnxruntime": "1.32.0", "onnxruntime-gpu": "1.31.1"}
    machine(distributions={"owners": owners, "installed": installed}, driver=H100, CPU=ORT | {"result": True})
    environment = doctor.examine()
    package = next(each for each in environment.packages if each.module == "onnxruntime")
    assert (package.name, package.version, package.importable) == ("onnxruntime + onnxruntime-gpu", "1.31.1", True)
    assert "own the same folder" in package.gap.problem
    assert environment.backend("ort").runs


@pytest.mark.parametrize(
    ("driver", "problem", "fix"),
    [
        (DRIVERLESS, "no NVIDIA GPU and no driver", "nothing to install"),
        (DRIVERLESS | {"cards": 1}, "there is an NVIDIA GPU, but no driver for it", "https://www.nvidia.com/drivers"),
        (DRIVERLESS | {"cards": 1, "container": True}, "not passed into this container", "docker run --gpus all"),
        (H100 | {"devices": []}, "the NVIDIA driver shows no GPU", "nvidia-smi"),
    ],
)
def test_no_driver_and_no_gpu_are_told_apart(machine, monkeypatch, driver, problem, fix):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    machine(driver=driver, torch={"version": "2.13.0", "built_for": "13.0", "cpu": True})
    (gap,) = doctor.backend("torch-cuda").gaps
    assert problem in gap.problem
    assert fix in gap.fix


def test_a_driver_that_crashes_is_not_taken_for_none(machine):
    machine({"driver": ProbeAnswer({"cards": 0, "stage": "load libcuda.so.1"}, "the interpreter ended with SIGSEGV")})
    assert doctor.backend("trt").reason.endswith("cannot load libcuda.so.1: the interpreter ended with SIGSEGV")


def test_hidden_gpus_are_told(machine, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "-1")
    stage = {"loaded": True, "stage": "start the NVIDIA driver"}
    torch = {"version": "2.13.0", "built_for": "13.0"}
    machine({"driver": ProbeAnswer(stage, "no CUDA-capable device is detected (CUDA error 100)")}, torch=torch)
    gap = Gap("CUDA_VISIBLE_DEVICES is '-1', which hides every GPU", "unset CUDA_VISIBLE_DEVICES")
    assert doctor.backend("torch-cuda").gaps == (gap,)
    machine({"driver": ProbeAnswer(stage, "system has unsupported driver combination (CUDA error 803)")}, torch=torch)
    assert doctor.backend("torch-cuda").reason.startswith("cannot start the NVIDIA driver: system has unsupported driver")


def test_torch_that_cannot_compute_on_the_gpu_still_runs_on_the_cpu(machine):
    facts = {"version": "2.13.0", "built_for": "13.0", "cpu": True, "stage": "compute on the GPU"}
    machine({"torch": ProbeAnswer(facts, "CUDA error: no kernel image is available for execution on the device")}, driver=H100)
    assert doctor.backend("torch").runs
    gap = Gap(
        "cannot compute on the GPU: CUDA error: no kernel image is available for execution on the device",
        "pip install --upgrade torch",
    )
    assert doctor.backend("torch-cuda").gaps == (gap,)
    machine(torch=facts | {"cuda": True}, driver=H100)
    assert doctor.backend("torch-cuda") == Backend("torch-cuda", True, "torch 2.13.0, CUDA 13.0")


@pytest.mark.parametrize(
    ("said", "problem", "fix"),
    [
        ("InvalidCxxCompiler: No working C++ compiler found in …", "no C.. compiler is found, .* on a CPU", "apt install g++"),
        ("TritonMissing: Cannot find a working triton installation", "Triton is not installed", "pip install triton"),
        ("ModuleNotFoundError: No module named 'setuptools'", "setuptools is not installed", "pip install setuptools"),
        (
            "CalledProcessError: Command '['/usr/bin/gcc', '/tmp/main.c' …",
            "the C compiler fails",
            "apt install python3-dev",
        ),
        ("Failed to find C compiler. Please specify via CC", "no C compiler is found, .* on a GPU", "apt install gcc"),
        ("Found a GPU which is too old to be supported by the triton GPU compiler", "too old for Triton", "nothing to install"),
        ("LLVM ERROR: out of range", "cannot compile for the GPU: LLVM ERROR: out of range", "force-reinstall torch"),
    ],
)
def test_what_torch_compile_lacks_is_said_with_what_brings_it(machine, said, problem, fix):
    facts = {"version": "2.13.0", "place": "the GPU", "stage": "compile for the GPU"}
    machine({"torch_compile": ProbeAnswer(facts, said)}, torch={"version": "2.13.0", "cpu": True})
    backend = doctor.backend("torch-compile")
    (gap,) = backend.gaps
    assert not backend.runs
    assert re.search(problem, gap.problem)
    assert fix in gap.fix
    machine(torch={"version": "2.13.0", "cpu": True}, torch_compile=facts | {"compiled": True})
    assert doctor.backend("torch-compile") == Backend("torch-compile", True, "torch 2.13.0: compiles for the GPU")


@no_gpu
@pytest.mark.full
def test_torch_compile_without_a_compiler_is_told(monkeypatch):
    monkeypatch.setenv("CXX", "/no/compiler")
    (gap,) = doctor.backend("torch-compile").gaps
    assert gap == Gap("no C++ compiler is found, and torch.compile needs one on a CPU", "apt install g++")


def test_tensorrt_11_and_the_provider_of_onnx_runtime_exclude_each_other(machine):
    facts = ORT | {"tensorrt": "11.4.0.106", "stage": "start a session with TensorrtExecutionProvider"}
    machine({"Tensorrt": ProbeAnswer(facts, "libnvinfer.so.10 is missing", ("libnvinfer.so.10",))}, driver=H100, CPU=ORT)
    (gap,) = doctor.backend("ort-trt").gaps
    assert gap.problem == "its TensorRT provider is linked with TensorRT 10, and cannot share an environment with 11.4.0.106"
    assert gap.fix == "pip install 'tensorrt-cu13>=10.6,<11'"
    bare = {"installed": {"tensorrt-cu12-bindings": "10.6.0"}}
    machine({"Tensorrt": ProbeAnswer(facts | {"tensorrt": ""}, "")}, driver=H100, CPU=ORT, distributions=bare)
    (gap,) = doctor.backend("ort-trt").gaps
    assert gap.problem == (
        "the bindings of TensorRT 10.6.0 are installed without its libraries (libnvinfer.so.10 was not found)"
    )
    assert gap.fix.startswith("pip install --extra-index-url https://pypi.nvidia.com tensorrt-cu12-libs==10.6.0  # or put")
    machine({"Tensorrt": ProbeAnswer(facts | {"tensorrt": ""}, "")}, driver=H100, CPU=ORT)
    assert "which is not importable here" in doctor.backend("ort-trt").reason
    matching = facts | {"tensorrt": "10.16.1"}
    machine({"Tensorrt": ProbeAnswer(matching, "SM 61 is not supported")}, driver=H100, CPU=ORT)
    assert doctor.backend("ort-trt").reason == "cannot start a session with TensorrtExecutionProvider: SM 61 is not supported"
    machine(driver=H100, CPU=ORT, Tensorrt=matching | {"result": True})
    assert doctor.backend("ort-trt") == Backend("ort-trt", True, "onnxruntime 1.31.1, TensorRT 10.16.1")


@pytest.mark.parametrize(
    ("owners", "module", "command"),
    [
        ([], "onnx", "pip install 'shapecheck-controlnet[onnx]'"),
        (["onnxruntime-gpu"], "onnx", "pip install 'onnx>=1.21'"),
        (["onnxruntime-gpu"], "onnx_ir", "pip install 'onnx-ir>=0.1.15'"),
        (["onnxruntime"], "onnxscript", "pip install 'shapecheck-controlnet[onnx]'"),
        ([], "tensorrt", "pip install 'shapecheck-controlnet[gpu]'"),
        (["onnxruntime"], "tensorrt", "pip uninstall -y onnxruntime && pip install 'shapecheck-controlnet[gpu]'"),
        ([], "tensorrt_rtx", "pip install 'shapecheck-controlnet[rtx]'"),
        ([], "polygraphy", "pip install 'polygraphy>=0.49.26'"),
    ],
)
def test_no_command_brings_a_second_onnx_runtime(machine, owners, module, command):
    machine(distributions={"owners": {"onnxruntime": owners}, "installed": dict.fromkeys(owners, "1.31.1")}, driver=DRIVERLESS)
    package = next(each for each in doctor.examine().packages if each.module == module)
    assert (package.installed, package.gap.fix) == (False, command)


def test_tensorrt_for_rtx_says_which_gpus_it_runs_on(machine):
    built = {"version": "1.7.1", "built": True, "loaded": False, "stage": "load an engine"}
    machine(driver=H100, tensorrt_rtx=built, polygraphy=POLYGRAPHY)
    backend = doctor.backend("rtx")
    assert backend.runs
    assert "but cannot run them here: it makes engines for compute capability 7.5, 8.0, 8.6, 8.9, 12.x, and" in backend.detail
    assert "NVIDIA H100 has 9.0" in backend.detail
    ada = H100 | {"devices": [{"name": "RTX 4090", "capability": "8.9", "memory": 1}]}
    machine({"tensorrt_rtx": ProbeAnswer(built, "out of memory")}, driver=ada, polygraphy=POLYGRAPHY)
    assert doctor.backend("rtx").detail.endswith("cannot run them here: cannot load an engine: out of memory")
    assert doctor.backend("rtx").gaps[0].fix.startswith("nvidia-smi")
    machine(driver=ada, tensorrt_rtx=built | {"loaded": True}, polygraphy=POLYGRAPHY)
    assert doctor.backend("rtx") == Backend("rtx", True, "tensorrt-rtx 1.7.1: builds engines and runs them")
    machine(driver=ada)
    assert (doctor.backend("rtx").runs, doctor.backend("rtx").detail) == (False, "")


DRIVER = Gap("no NVIDIA GPU and no driver", "nothing to install: this needs a machine with an NVIDIA GPU")
ABSENT = Gap("tensorrt is not installed", "pip install 'shapecheck-controlnet[gpu]'")
ONNX = [Gap(f"{name} is not installed", "pip install 'shapecheck-controlnet[onnx]'") for name in ("onnx", "onnx-ir")]
ENVIRONMENT = Environment(
    "3.11.7 (/opt/python)",
    "Linux-6.1-x86_64",
    (
        Package("torch", "torch", "2.13.0+cpu", True),
        Package("onnx", "onnx", "", False, ONNX[0]),
        Package("onnx-ir", "onnx_ir", "", False, ONNX[1]),
        Package("tensorrt", "tensorrt", "", False, ABSENT),
    ),
    Driver("", "", DRIVER),
    (),
    (
        Backend("torch", True, "torch 2.13.0+cpu"),
        Backend("torch-cuda", False, "", (DRIVER,)),
        Backend("trt", False, "", (ABSENT, DRIVER)),
        Backend("rtx", True, f"tensorrt-rtx 1.7.1: builds engines, but cannot run them here: {DRIVER.problem}", (DRIVER,)),
    ),
)
HUMAN = """\
python    3.11.7 (/opt/python)
platform  Linux-6.1-x86_64
driver    no NVIDIA GPU and no driver

Packages

package   version     state
--------  ----------  -------------
torch     2.13.0+cpu  ok
onnx      -           not installed
onnx-ir   -           not installed
tensorrt  -           not installed

Backends

backend     what it is          runs here  with what, or why not
----------  ------------------  ---------  -------------------------------------------------------
torch       PyTorch on the CPU  yes        torch 2.13.0+cpu
torch-cuda  PyTorch on the GPU  no         no NVIDIA GPU and no driver
trt         TensorRT            no         tensorrt is not installed; no NVIDIA GPU and no driver
rtx         TensorRT for RTX    yes        tensorrt-rtx 1.7.1: builds engines, but cannot run them
                                           here: no NVIDIA GPU and no driver

To fix

- no NVIDIA GPU and no driver (torch-cuda, trt, rtx)
    nothing to install: this needs a machine with an NVIDIA GPU
- tensorrt is not installed (trt)
    pip install 'shapecheck-controlnet[gpu]'
- onnx is not installed; onnx-ir is not installed
    pip install 'shapecheck-controlnet[onnx]'

RUNS HERE: torch, rtx (in part); not: torch-cuda, trt
"""


def test_the_report_for_people():
    assert report.render_text(ENVIRONMENT) == HUMAN


def test_what_was_asked_for_is_the_verdict():
    text = report.render_text(ENVIRONMENT, ["trt", "torch"])
    assert text.startswith(HUMAN.split("To fix")[0])
    assert text.endswith(
        "CANNOT RUN: trt: tensorrt is not installed; no NVIDIA GPU and no driver\nREADY: torch: torch 2.13.0+cpu\n"
    )
    assert "[onnx]" not in text
    assert "[gpu]" in text
    assert "To fix" not in report.render_text(ENVIRONMENT, ["torch"])


def test_the_real_report_fits_a_page_and_breaks_no_command(here):
    text = report.render_text(here, list(BACKENDS))
    commands = [line for line in text.splitlines() if line.startswith("    ")]
    for gap in (gap for backend in here.backends for gap in backend.gaps):
        assert any(gap.fix in line for line in commands)
    assert max(map(len, set(text.splitlines()) - set(commands))) <= 100
    assert all(f": {name}: " in text for name in BACKENDS)


def test_a_gpu_is_shown_with_what_it_can():
    device = Device("NVIDIA H100", "9.0", 85017493504)
    environment = Environment("3.11", "Linux", (), Driver("580.159.04", "13.0"), (device, device), ())
    text = report.render_text(environment)
    assert "driver    580.159.04, for CUDA up to 13.0\n" in text
    assert text.count("GPU       NVIDIA H100, compute capability 9.0, 79.2 GiB\n") == 2


def test_the_report_for_machines():
    record = json.loads(report.render_json(ENVIRONMENT, ["trt"]))
    assert (record["required"], record["verdict"]) == (["trt"], "cannot run")
    assert json.loads(report.render_json(ENVIRONMENT, ["torch"]))["verdict"] == "ready"
    assert json.loads(report.render_json(ENVIRONMENT))["verdict"] is None
    backends = {each["name"]: each for each in record["backends"]}
    assert (backends["trt"]["runs"], backends["trt"]["reason"]) == (
        False,
        "tensorrt is not installed; no NVIDIA GPU and no driver",
    )
    assert ENVIRONMENT.backend("trt").fix == f"{ABSENT.fix}; {DRIVER.fix}"
    assert backends["trt"]["gaps"][0]["fix"] == "pip install 'shapecheck-controlnet[gpu]'"
    assert [each["installed"] for each in record["packages"]] == [True, False, False, False]


@pytest.mark.gpu
def test_a_gpu_is_found_and_used(here):
    assert here.driver.gap is None
    assert here.devices
    assert here.backend("torch-cuda").runs
