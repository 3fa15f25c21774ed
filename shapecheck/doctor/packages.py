"""The packages that matter here: installed or not, importable or not, old or not, and the command that fixes each."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass

from packaging.version import InvalidVersion, parse

from shapecheck.doctor.environment import Gap, Package
from shapecheck.doctor.probes import ProbeAnswer

CPU = "onnxruntime CPUExecutionProvider"
NVIDIA_INDEX = "https://pypi.nvidia.com"
"""The index that holds TensorRT's libraries; on PyPI are its bindings, and packages that fetch the libraries from here."""
_NEWEST = 10
"""The newest major release of TensorRT whose library a provider of ONNX Runtime loads (1.31)."""


@dataclass(frozen=True, slots=True)
class Requirement:
    """A package that some backend needs: the probe that imports it, and the oldest release that is supported."""

    probe: str
    oldest: str
    extra: str = ""
    """The extra that brings it and more; without one it is installed by name."""


REQUIREMENTS = {
    "torch": Requirement("torch", "2.6"),
    "diffusers": Requirement("importing diffusers", "0.36"),
    "onnx": Requirement("importing onnx", "1.21", "onnx"),
    "onnx_ir": Requirement("importing onnx_ir", "0.1.15", "onnx"),
    "onnxscript": Requirement("importing onnxscript", "0.5", "onnx"),
    "onnxruntime": Requirement(CPU, "1.23.2", "onnx"),
    "tensorrt": Requirement("tensorrt tensorrt", "10.6", "gpu"),
    "tensorrt_rtx": Requirement("tensorrt tensorrt_rtx", "1.4", "rtx"),
    "polygraphy": Requirement("importing polygraphy", "0.49.26"),
    "pytest": Requirement("importing pytest", "8.3"),
}
INSTALLED = " ".join(("distributions", *REQUIREMENTS))


class Answers(dict[str, ProbeAnswer]):
    """The answers by probe, and the distributions that they show."""

    @property
    def installed(self) -> dict[str, str]:
        return dict(self[INSTALLED].facts.get("installed", {}))

    def owners(self, module: str) -> list[str]:
        return list(self[INSTALLED].facts.get("owners", {}).get(module, ()))

    def distribution(self, module: str) -> str:
        """Return the distribution that brings a module, or that should."""
        return next(iter(self.owners(module)), suggest_distribution(module))

    def bindings(self, module: str) -> str:
        """Return the distribution of TensorRT's bare Python bindings for a module, or an empty text."""
        pattern = re.compile(rf"{module.replace('_', '-')}-cu\d+-bindings")
        return next((name for name in self.installed if pattern.fullmatch(name)), "")


def summarize_package(module: str, answers: Answers) -> Package:
    """Return the state of a package here."""
    facts, installed = answers[REQUIREMENTS[module].probe].facts, answers.installed
    gap = find_lack(answers, module)
    if module == "onnxruntime":
        gap = next(find_conflicts(answers), gap)
    names = answers.owners(module) or [answers.bindings(module) or suggest_distribution(module)]
    known = " + ".join(dict.fromkeys(installed[name] for name in names if name in installed))
    version = facts.get("version") or known or ("" if facts.get("missing") == module else "unknown")
    return Package(" + ".join(names), module, version, "version" in facts, gap)


def find_lack(answers: Answers, module: str, install: str = "") -> Gap | None:
    """Say what keeps a module from being used: not there, not importable, or too old.

    `install` is the command if it is not there, unless it is the usual one.
    """
    requirement, name, bindings = REQUIREMENTS[module], answers.distribution(module), answers.bindings(module)
    answer, runtimes = answers[requirement.probe], answers.owners("onnxruntime")
    if (version := answer.facts.get("version")) is not None:
        problem = f"{name} {version} is older than {requirement.oldest}, the oldest that is supported"
        command = f"pip install --upgrade '{name}>={requirement.oldest}{_cap_release(answers, module)}'"
        return Gap(problem, command) if _is_older(version, requirement.oldest) else None
    whole = f"{bindings.removesuffix('-bindings')}=={answers.installed[bindings]}" if bindings else ""
    if answer.facts.get("missing") != module or answers.owners(module):
        if gone := [library for library in answer.gone if "nvinfer" in library]:
            return _explain_missing_libraries(answers, gone[0])
        return Gap(answer.problem, f"pip install --force-reinstall {whole if whole and answer.gone else name}")
    problem, command = f"{name} is not installed", f"pip install 'shapecheck-controlnet[{requirement.extra}]'"
    if whole:
        problem, command = f"{bindings} alone is installed, without the package {module}", f"pip install {whole}"
        linked = answers[CPU].facts.get("linked") if module == "tensorrt" else ""
        if linked and linked != answers.installed[bindings].partition(".")[0]:
            command = recommend_tensorrt(answers)
    elif module == "tensorrt" and (shared := recommend_tensorrt(answers)):
        command = shared
    elif not requirement.extra or (requirement.extra == "onnx" and runtimes not in ([], ["onnxruntime"])):
        # The extra would bring a second ONNX Runtime.
        command = f"pip install '{name}>={requirement.oldest}'"
    elif requirement.extra == "gpu" and "onnxruntime" in runtimes:
        command = f"pip uninstall -y onnxruntime && {command}"
    return Gap(problem, install or command)


def _is_older(version: str, oldest: str) -> bool:
    # By release, so that a vendor's pre-release of the oldest one passes.
    return _read_release(version) < _read_release(oldest)


def _read_release(version: str) -> tuple[int, ...]:
    """Return the numbers of a release; a text without any counts as the newest."""
    try:
        return parse(version).release
    except InvalidVersion:
        return tuple(int(number) for number in re.findall(r"\d+", version)[:3]) or (sys.maxsize,)


def find_bare_bindings(answers: Answers, linked: str) -> Gap | None:
    """Say that TensorRT's bindings of the release that ONNX Runtime is linked with are here without their libraries."""
    bindings, installed = answers.bindings("tensorrt"), answers.installed
    if not bindings or installed[bindings].partition(".")[0] != linked or bindings.replace("-bindings", "-libs") in installed:
        return None
    return _explain_missing_libraries(answers, f"libnvinfer.so.{linked}")


def _explain_missing_libraries(answers: Answers, library: str) -> Gap:
    """Say that TensorRT's Python bindings are here without the libraries that they load."""
    installed, path = answers.installed, "PATH" if sys.platform == "win32" else "LD_LIBRARY_PATH"
    bindings = answers.bindings("tensorrt")
    version = installed.get(bindings) or installed.get(answers.distribution("tensorrt"), "")
    problem = (
        f"the bindings of TensorRT{version and f' {version}'} are installed without its libraries ({library} was not found)"
    )
    by_hand = f"put the folder that holds {library} on {path}"
    if not bindings:
        return Gap(problem, by_hand)
    libraries = bindings.replace("-bindings", "-libs")
    again = "--force-reinstall --no-deps " if libraries in installed else ""
    return Gap(problem, f"pip install {again}--extra-index-url {NVIDIA_INDEX} {libraries}=={version}  # or {by_hand}")


def recommend_tensorrt(answers: Answers) -> str:
    """Return the command for a TensorRT that goes with the ONNX Runtime and the CUDA that are here.

    Empty if nothing here decides that: the extra then brings both.
    """
    runtime, torch = answers[CPU].facts, answers.get("torch")
    cuda = (runtime.get("built_for") or (torch.facts.get("built_for") if torch else "") or "").partition(".")[0]
    # The extra brings libraries for CUDA 13, and a second ONNX Runtime.
    if not runtime.get("linked") and cuda in ("", "13") and "onnxruntime-gpu" not in answers.owners("onnxruntime"):
        return ""
    release = f">={REQUIREMENTS['tensorrt'].oldest}{_cap_release(answers, 'tensorrt') or f',<{_NEWEST + 1}'}"
    return f"pip install 'tensorrt{cuda and f'-cu{cuda}'}{release}'"


def _cap_release(answers: Answers, module: str) -> str:
    """Return the bound of a TensorRT that ONNX Runtime's provider can load too; empty if it loads none."""
    linked = answers[CPU].facts.get("linked") if module == "tensorrt" else ""
    return f",<{int(linked) + 1}" if linked else ""


def find_conflicts(answers: Answers) -> Iterator[Gap]:
    """Report two distributions of ONNX Runtime beside each other."""
    owners = answers.owners("onnxruntime")
    if len(owners) > 1:
        kept = "onnxruntime-gpu" if "onnxruntime-gpu" in owners else owners[0]
        problem = f"{' and '.join(owners)} own the same folder: the last installed wins, removing one breaks the other"
        yield Gap(problem, f"pip uninstall -y {' '.join(owners)} && pip install {kept}")


def suggest_distribution(module: str) -> str:
    """Return the distribution to install for a module."""
    return "tensorrt-rtx-cu13" if module == "tensorrt_rtx" else module.replace("_", "-")
