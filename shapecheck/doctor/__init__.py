"""What is installed, importable and can really run here, and what puts right what does not.

Everything is tried by `probes`, in processes of their own; this file judges what they answer.
"""

from __future__ import annotations

import os
import platform
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import replace

from shapecheck.doctor.environment import BACKENDS, RTX_CAPABILITIES, Backend, Device, Driver, Environment, Gap, check_known
from shapecheck.doctor.packages import (
    CPU,
    INSTALLED,
    WANTED,
    Seen,
    conflicts,
    lacks,
    name_of,
    owners_of,
    package,
    shared_tensorrt,
)
from shapecheck.doctor.probes import Answer, ask

_CUDA, _TENSORRT = "onnxruntime CUDAExecutionProvider", "onnxruntime TensorrtExecutionProvider"
_NO_DEVICE = "(CUDA error 100)"
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
"""From what a library said to what helps; the braces stand for its distribution."""


def examine(progress: Callable[[str], object] = lambda _: None) -> Environment:
    """Try everything, several at a time; `progress` is told what is still being tried."""
    seen = _ask_all((*(wanted.probe for wanted in WANTED.values()), *_probes(BACKENDS)), progress)
    cuda = seen["driver"].facts
    return Environment(
        f"{platform.python_version()} ({sys.executable})",
        platform.platform(),
        tuple(package(module, seen) for module in WANTED),
        Driver(cuda.get("version", ""), cuda.get("cuda", ""), next(_gpu_gaps(seen), None)),
        tuple(Device(**each) for each in cuda.get("devices", ())),
        tuple(judge(seen) for judge, _ in _JUDGES.values()),
    )


def backend(name: str) -> Backend:
    """Try one backend of `BACKENDS`, and only what it needs. Raises ShapecheckError for any other name."""
    check_known([name])
    return _JUDGES[name][0](_ask_all(_probes([name]), lambda _: None))


def _probes(names: Iterable[str]) -> tuple[str, ...]:
    return (INSTALLED, *(probe for name in names for probe in _JUDGES[name][1]))


def _ask_all(probes: Iterable[str], progress: Callable[[str], object]) -> Seen:
    seen = {}
    with ThreadPoolExecutor(os.cpu_count()) as threads:
        asked = {threads.submit(ask, probe): probe for probe in dict.fromkeys(probes)}
        for done in as_completed(asked):
            seen[asked[done]] = done.result()
            left = [probe.split()[-1] for probe in asked.values() if probe not in seen]
            progress(f"examining {left[0]}, {len(left)} to go" if left else "judging")
    return seen


def _torch(seen: Seen) -> Backend:
    answer = seen["torch"]
    return _verdict("torch", seen, answer, "cpu", f"torch {answer.facts.get('version')}", ["torch"])


def _torch_cuda(seen: Seen) -> Backend:
    answer = seen["torch"]
    version, cuda = answer.facts.get("version"), answer.facts.get("built_for")
    hindrances = [*_gpu_gaps(seen)]
    if version and cuda is None:
        hindrances.append(Gap(f"torch {version} is built without CUDA", "pip uninstall -y torch && pip install torch"))
    return _verdict("torch-cuda", seen, answer, "cuda", f"torch {version}, CUDA {cuda}", ["torch"], hindrances)


def _ort(seen: Seen) -> Backend:
    answer = seen[CPU]
    detail = f"onnxruntime {answer.facts.get('version')}"
    return _verdict("ort", seen, answer, "result", detail, ["onnxruntime"], conflicts(seen))


def _ort_cuda(seen: Seen) -> Backend:
    answer = seen[_CUDA]
    hindrances = [*_gpu_gaps(seen), *_provider_gaps(seen, answer, "CUDA")]
    detail = f"onnxruntime {answer.facts.get('version')}, CUDA {answer.facts.get('built_for')}"
    return _verdict("ort-cuda", seen, answer, "result", detail, ["onnxruntime"], hindrances, _WITH_CUDA)


def _ort_trt(seen: Seen) -> Backend:
    answer = seen[_TENSORRT]
    linked, found = answer.facts.get("linked"), answer.facts.get("tensorrt")
    detail = f"onnxruntime {answer.facts.get('version')}, TensorRT {found or linked}"
    hindrances = [*_gpu_gaps(seen), *_provider_gaps(seen, answer, "TensorRT")]
    if linked and found is not None and found.split(".")[0] != linked:
        other = f"and cannot share an environment with {found}" if found else "which is not importable here"
        hindrances.append(Gap(f"its TensorRT provider is linked with TensorRT {linked}, {other}", shared_tensorrt(seen)))
    return _verdict("ort-trt", seen, answer, "result", detail, ["onnxruntime"], hindrances, _WITH_CUDA)


def _trt(seen: Seen) -> Backend:
    answer = seen[WANTED["tensorrt"].probe]
    detail = f"tensorrt {answer.facts.get('version')}: an engine was built and loaded"
    return _verdict("trt", seen, answer, "loaded", detail, ["tensorrt", "polygraphy"], _gpu_gaps(seen))


def _rtx(seen: Seen) -> Backend:
    answer = seen[WANTED["tensorrt_rtx"].probe]
    detail = f"tensorrt-rtx {answer.facts.get('version')}: builds engines"
    built = _verdict("rtx", seen, answer, "built", detail, ["tensorrt_rtx", "polygraphy"])
    if not built.runs:
        return built
    if answer.facts.get("loaded"):
        return replace(built, detail=f"{detail} and runs them")
    gap = next(_gpu_gaps(seen), None) or _capability_gap(seen) or _cured(answer, name_of(seen, "tensorrt_rtx"))
    return replace(built, detail=f"{detail}, but cannot run them here: {gap.problem}", gaps=(gap,))


def _verdict(
    name: str,
    seen: Seen,
    answer: Answer,
    proof: str,
    detail: str,
    modules: Sequence[str],
    hindrances: Iterable[Gap] = (),
    install: str = "",
) -> Backend:
    """A backend runs where its probe got as far as the proof, whatever else looks wrong, with packages that we support.

    `install` is the command for its packages, where it is another than the usual one.
    """
    works = bool(answer.facts.get(proof))
    gaps = [*lacks(seen, modules, install), *(() if works else hindrances)]
    if not works and not gaps:
        gaps.append(_cured(answer, name_of(seen, modules[0])))
    return Backend(name, not gaps, "" if gaps else detail, tuple(gaps))


def _cured(answer: Answer, distribution: str) -> Gap:
    cure = next(cure for said, cure in _CURES if re.search(said, answer.reason))
    return Gap(answer.problem, cure.format(distribution))


def _provider_gaps(seen: Seen, answer: Answer, provider: str) -> Iterator[Gap]:
    """What keeps ONNX Runtime from using a provider."""
    known = answer.facts.get("providers", ())
    if f"{provider}ExecutionProvider".lower() not in map(str.lower, known):
        yield from conflicts(seen)
        if known:
            command = f"pip uninstall -y {' '.join(owners_of(seen, 'onnxruntime'))} && pip install onnxruntime-gpu"
            yield Gap(f"onnxruntime {answer.facts['version']} is built without the {provider} provider", command)
    gone = [each for each in answer.gone if not _NOT_CUDA.match(each)]
    if gone:
        yield Gap(f"{', '.join(gone)} {'is' if len(gone) == 1 else 'are'} missing", _WITH_CUDA)


def _capability_gap(seen: Seen) -> Gap | None:
    devices = [Device(**each) for each in seen["driver"].facts["devices"]]
    if any(each.capability.startswith(RTX_CAPABILITIES) for each in devices):
        return None
    mine = ", ".join(f"{each.name} has {each.capability}" for each in devices)
    known = ", ".join(f"{each}x" if each.endswith(".") else each for each in RTX_CAPABILITIES)
    problem = f"it makes engines for compute capability {known}, and {mine}"
    return Gap(problem, "nothing to install: use trt here, or a GeForce RTX or RTX PRO GPU")


def _gpu_gaps(seen: Seen) -> Iterator[Gap]:
    """What keeps every GPU backend from running: no driver, or no GPU that it shows."""
    answer = seen["driver"]
    if answer.facts.get("devices"):
        return
    if answer.facts.get("loaded") or "kind" not in answer.facts:  # else the library could not be loaded
        hidden = os.environ.get("CUDA_VISIBLE_DEVICES")
        if hidden is not None and ("devices" in answer.facts or _NO_DEVICE in answer.reason):
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


_JUDGES: dict[str, tuple[Callable[[Seen], Backend], tuple[str, ...]]] = {
    "torch": (_torch, ("torch",)),
    "torch-cuda": (_torch_cuda, ("driver", "torch")),
    "ort": (_ort, (CPU,)),
    "ort-cuda": (_ort_cuda, ("driver", CPU, _CUDA)),
    "ort-trt": (_ort_trt, ("driver", CPU, _TENSORRT)),
    "trt": (_trt, ("driver", CPU, WANTED["tensorrt"].probe, WANTED["polygraphy"].probe)),
    "rtx": (_rtx, ("driver", WANTED["tensorrt_rtx"].probe, WANTED["polygraphy"].probe)),
}
"""How each backend is judged, and the probes that takes."""
