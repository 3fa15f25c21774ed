"""The examination of a machine: what is installed, importable and really runs here, and what fixes the rest.

Everything is tried by `probes`, in processes of their own; this file judges the answers.
"""

from __future__ import annotations

import os
import platform
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import NamedTuple

from shapecheck.doctor import packages
from shapecheck.doctor.environment import RTX_CAPABILITIES, RTX_NAMES, Backend, Device, Driver, Environment, Gap, check_known
from shapecheck.doctor.packages import CPU, INSTALLED, REQUIREMENTS, Answers
from shapecheck.doctor.probes import ProbeAnswer, ask

_NOT_CUDA = re.compile(r"libcuda\.|nvcuda\.|(lib)?nv(infer|onnxparser)")
"""Libraries of the driver and of TensorRT, which the packages of CUDA and cuDNN do not bring."""
_WITH_CUDA = "pip install 'onnxruntime-gpu[cuda,cudnn]'"
_DRIVER_PAGE = "https://www.nvidia.com/drivers"
_CURES = (
    ("out of memory", "nvidia-smi  # says which process holds the GPU's memory"),
    ("too old|insufficient", f"install a newer NVIDIA driver: {_DRIVER_PAGE}"),
    ("no kernel image|not supported", "pip install --upgrade {}"),
    ("", "pip install --force-reinstall {}"),
)
"""From a library's message to what helps; the braces stand for its distribution."""
_COMPILER_LACKS = (
    ("No working C\\+\\+ compiler", "no C++ compiler is found, and torch.compile needs one on a CPU", "apt install g++"),
    ("working triton|TritonMissing", "Triton is not installed, and torch.compile needs it on a GPU", "pip install triton"),
    ("No module named 'setuptools'", "setuptools is not installed, and this torch.compile needs it", "pip install setuptools"),
    (
        "Command '\\[.*?/(gcc|clang|cc)'|Python\\.h",
        "the C compiler fails, as it does without Python's headers, which torch.compile needs",
        "apt install python3-dev",
    ),
    ("Failed to find C compiler", "no C compiler is found, and Triton needs one on a GPU", "apt install gcc"),
    ("too old to be supported by the triton", "this GPU is too old for Triton", "nothing to install: use ort-cuda or trt here"),
)
"""From the message of torch.compile to what is missing, and what brings it."""


class _Check(NamedTuple):
    modules: tuple[str, ...]
    probes: tuple[str, ...]
    """The backend's own probe first, then those that a reason may need."""
    proof: str
    """The fact that its probe reports when it really ran."""
    detail: str
    """A description of what worked, with the facts of its probe in braces."""
    install: str = ""
    """The command for its packages, if it is not the usual one."""


_ORT, _ORT_DETAIL = ("onnxruntime",), "onnxruntime {version}"
_TRT, _RTX, _POLYGRAPHY = (REQUIREMENTS[module].probe for module in ("tensorrt", "tensorrt_rtx", "polygraphy"))
_TRT_PROBES, _RTX_PROBES = (_TRT, "driver", CPU, "torch", _POLYGRAPHY), (_RTX, "driver", _POLYGRAPHY)
_CUDA_PROBES, _ORT_TRT_PROBES = ((f"onnxruntime {name}ExecutionProvider", "driver", CPU) for name in ("CUDA", "Tensorrt"))
_CHECKS = {
    "torch": _Check(("torch",), ("torch",), "cpu", "torch {version}"),
    "torch-cuda": _Check(("torch",), ("torch", "driver"), "cuda", "torch {version}, CUDA {built_for}"),
    "torch-compile": _Check(("torch",), ("torch_compile", "torch"), "compiled", "torch {version}: compiles for {place}"),
    "ort": _Check(_ORT, (CPU,), "result", _ORT_DETAIL),
    "ort-cuda": _Check(_ORT, _CUDA_PROBES, "result", f"{_ORT_DETAIL}, CUDA {{built_for}}", _WITH_CUDA),
    "ort-trt": _Check(_ORT, _ORT_TRT_PROBES, "result", f"{_ORT_DETAIL}, TensorRT {{release}}", _WITH_CUDA),
    "trt": _Check(("tensorrt", "polygraphy"), _TRT_PROBES, "loaded", "tensorrt {version}: an engine was built and loaded"),
    "rtx": _Check(("tensorrt_rtx", "polygraphy"), _RTX_PROBES, "built", "tensorrt-rtx {version}: builds engines"),
}


def examine(progress: Callable[[str], object] = lambda _: None) -> Environment:
    """Try everything, several at a time; `progress` gets the name of a probe that is still running."""
    answers = _ask_all(_CHECKS, progress, *(requirement.probe for requirement in REQUIREMENTS.values()))
    driver = answers["driver"].facts
    return Environment(
        f"{platform.python_version()} ({sys.executable})",
        platform.platform(),
        tuple(packages.summarize_package(module, answers) for module in REQUIREMENTS),
        Driver(driver.get("version", ""), driver.get("cuda", ""), next(_find_gpu_gaps(answers), None)),
        tuple(Device(**device) for device in driver.get("devices", ())),
        tuple(_judge(name, answers) for name in _CHECKS),
    )


def backend(name: str) -> Backend:
    """Try one backend of `BACKENDS`, and only what it needs. Raises ShapecheckError for any other name."""
    check_known([name])
    return _judge(name, _ask_all([name], lambda _: None))


def _ask_all(names: Iterable[str], progress: Callable[[str], object], *others: str) -> Answers:
    answers = Answers()
    probes = dict.fromkeys((INSTALLED, *others, *(probe for name in names for probe in _CHECKS[name].probes)))
    with ThreadPoolExecutor(os.cpu_count()) as threads:
        running = {threads.submit(ask, probe): probe for probe in probes}
        for done in as_completed(running):
            answers[running[done]] = done.result()
            left = [probe.split()[-1] for probe in probes if probe not in answers]
            progress(f"examining {left[0]}, {len(left)} to go" if left else "judging")
    return answers


def _judge(name: str, answers: Answers) -> Backend:
    """Judge that a backend runs if its probe reached the proof, whatever else looks wrong, with packages that we support."""
    check = _CHECKS[name]
    answer = answers[check.probes[0]]
    cure = next(cure for pattern, cure in _CURES if re.search(pattern, answer.reason))
    usual = Gap(answer.problem, cure.format(answers.distribution(check.modules[0])))
    works = bool(answer.facts.get(check.proof))
    gaps = [gap for module in check.modules if (gap := packages.find_lack(answers, module, check.install))]
    gaps += () if works else _find_gaps(name, answers, answer)
    if gaps or not works:
        return Backend(name, False, "", tuple(gaps) or (usual,))
    detail = check.detail.format(**answer.facts, release=answer.facts.get("tensorrt") or answer.facts.get("linked"))
    if name != "rtx":
        return Backend(name, True, detail)
    if answer.facts.get("loaded"):
        return Backend(name, True, f"{detail} and runs them")
    # It builds engines on any machine, so it stays available though it cannot run them here.
    gap = next(_find_gpu_gaps(answers), None) or next(_find_capability_gaps(answers), usual)
    return Backend(name, True, f"{detail}, but cannot run them here: {gap.problem}", (gap,))


def _find_gaps(name: str, answers: Answers, answer: ProbeAnswer) -> Iterator[Gap]:
    """Say what keeps a backend from running, its packages apart."""
    version, built_for = answer.facts.get("version"), answer.facts.get("built_for")
    if name in ("torch-cuda", "ort-cuda", "ort-trt", "trt"):
        yield from _find_gpu_gaps(answers)
    if name == "torch-cuda" and version and built_for is None:
        yield Gap(f"torch {version} is built without CUDA", "pip uninstall -y torch && pip install torch")
    if name == "torch-compile":
        lacks = (Gap(problem, fix) for pattern, problem, fix in _COMPILER_LACKS if re.search(pattern, answer.reason))
        yield from lacks
    if name == "ort":
        yield from packages.find_conflicts(answers)
    if (provider := {"ort-cuda": "CUDA", "ort-trt": "TensorRT"}.get(name)) is None:
        return
    known = answer.facts.get("providers", ())
    if f"{provider}ExecutionProvider".lower() not in map(str.lower, known):
        yield from packages.find_conflicts(answers)
        if known:
            command = f"pip uninstall -y {' '.join(answers.owners('onnxruntime'))} && pip install onnxruntime-gpu"
            yield Gap(f"onnxruntime {version} is built without the {provider} provider", command)
    if gone := [library for library in answer.gone if not _NOT_CUDA.match(library)]:
        yield Gap(f"{', '.join(gone)} {'is' if len(gone) == 1 else 'are'} missing", _WITH_CUDA)
    linked, release = answer.facts.get("linked"), answer.facts.get("tensorrt")
    if name == "ort-trt" and linked and release is not None and release.split(".")[0] != linked:
        other = f"and cannot share an environment with {release}" if release else "which is not importable here"
        usual = Gap(f"its TensorRT provider is linked with TensorRT {linked}, {other}", packages.recommend_tensorrt(answers))
        yield packages.find_bare_bindings(answers, linked) or usual


def _find_capability_gaps(answers: Answers) -> Iterator[Gap]:
    devices = [Device(**device) for device in answers["driver"].facts["devices"]]
    if not any(device.capability.startswith(RTX_CAPABILITIES) for device in devices):
        own = ", ".join(f"{device.name} has {device.capability}" for device in devices)
        problem = f"it makes engines for compute capability {RTX_NAMES}, and {own}"
        yield Gap(problem, "nothing to install: use trt here, or a GeForce RTX or RTX PRO GPU")


def _find_gpu_gaps(answers: Answers) -> Iterator[Gap]:
    """Say what keeps every GPU backend from running: no driver, or no GPU that it shows."""
    answer = answers["driver"]
    if answer.facts.get("devices"):
        return
    if answer.facts.get("loaded") or "kind" not in answer.facts:  # else the library could not be loaded
        hidden = os.environ.get("CUDA_VISIBLE_DEVICES")
        if hidden is not None and ("devices" in answer.facts or "(CUDA error 100)" in answer.reason):
            yield Gap(f"CUDA_VISIBLE_DEVICES is {hidden!r}, which hides every GPU", "unset CUDA_VISIBLE_DEVICES")
        else:
            problem = "the NVIDIA driver shows no GPU" if "devices" in answer.facts else answer.problem
            yield Gap(problem, "nvidia-smi  # says what the driver sees")
    elif not answer.facts.get("cards"):
        yield Gap("no NVIDIA GPU and no driver", "nothing to install: this needs a machine with an NVIDIA GPU")
    elif answer.facts.get("container"):
        yield Gap("the NVIDIA driver is not passed into this container", "docker run --gpus all …")
    else:
        yield Gap("there is an NVIDIA GPU, but no driver for it", f"install the NVIDIA driver: {_DRIVER_PAGE}")
