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
    "onnxruntime": Requirement(CPU, "1.23", "onnx"),
    "tensorrt": Requirement("tensorrt tensorrt", "10.13", "gpu"),
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
        command = f"pip install --upgrade '{name}>={requirement.oldest}'"
        return Gap(problem, command) if _is_older(version, requirement.oldest) else None
    whole = f"{bindings.removesuffix('-bindings')}=={answers.installed[bindings]}" if bindings else ""
    if answer.facts.get("missing") != module or answers.owners(module):
        return Gap(answer.problem, f"pip install --force-reinstall {whole if whole and answer.gone else name}")
    problem, command = f"{name} is not installed", f"pip install 'shapecheck-controlnet[{requirement.extra}]'"
    if whole:
        problem, command = f"{bindings} alone is installed, without the package {module}", f"pip install {whole}"
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


def recommend_tensorrt(answers: Answers) -> str:
    """Return the command for a TensorRT that the installed ONNX Runtime can use too; empty if that uses none."""
    facts = answers[CPU].facts
    if not facts.get("linked"):
        return ""
    cuda, oldest = (facts.get("built_for") or "").partition(".")[0], REQUIREMENTS["tensorrt"].oldest
    return f"pip install 'tensorrt{cuda and f'-cu{cuda}'}>={oldest},<{int(facts['linked']) + 1}'"


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
