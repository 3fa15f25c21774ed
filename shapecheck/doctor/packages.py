"""The packages that matter here: installed or not, importable or not, old or not, and the command that puts each right."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from shapecheck.doctor.environment import Gap, Package
from shapecheck.doctor.probes import Answer

CPU = "onnxruntime CPUExecutionProvider"
"""The probe of ONNX Runtime itself."""
Seen = Mapping[str, Answer]
"""From each probe to what it found."""


@dataclass(frozen=True, slots=True)
class Wanted:
    """A package that some backend needs: the probe that imports it, and the oldest release that is supported."""

    probe: str
    oldest: str
    extra: str = ""
    """The extra that brings it and more; without one it is installed by name."""


WANTED = {
    "torch": Wanted("torch", "2.6"),
    "diffusers": Wanted("importing diffusers", "0.36"),
    "onnx": Wanted("importing onnx", "1.21", "onnx"),
    "onnx_ir": Wanted("importing onnx_ir", "0.1.15", "onnx"),
    "onnxscript": Wanted("importing onnxscript", "0.5", "onnx"),
    "onnxruntime": Wanted(CPU, "1.23", "onnx"),
    "tensorrt": Wanted("tensorrt tensorrt", "10.13", "gpu"),
    "tensorrt_rtx": Wanted("tensorrt tensorrt_rtx", "1.4", "rtx"),
    "polygraphy": Wanted("importing polygraphy", "0.49.26"),
    "pytest": Wanted("importing pytest", "8.3"),
}
INSTALLED = " ".join(("distributions", *WANTED))


def package(module: str, seen: Seen) -> Package:
    """One package as it was found."""
    answer, owners = seen[WANTED[module].probe], owners_of(seen, module)
    gaps = [*(conflicts(seen) if module == "onnxruntime" else ()), *lacks(seen, [module])]
    name = " + ".join(owners) or _bindings(module, seen) or distribution(module)
    known = " + ".join(dict.fromkeys(_installed(seen)[each] for each in name.split(" + ") if each in _installed(seen)))
    version = answer.facts.get("version") or known or ("" if answer.facts.get("missing") == module else "unknown")
    return Package(name, module, version, "version" in answer.facts, gaps[0] if gaps else None)


def lacks(seen: Seen, modules: Sequence[str], install: str = "") -> Iterator[Gap]:
    """What keeps these modules from being used: not there, not importable, or too old."""
    for module in modules:
        wanted, name = WANTED[module], name_of(seen, module)
        answer = seen[wanted.probe]
        version = answer.facts.get("version")
        if version is None and answer.facts.get("missing") == module and not owners_of(seen, module):
            absent = _absent(module, seen)
            yield replace(absent, fix=install) if install else absent
        elif version is None:
            yield Gap(answer.problem, _cure_of_import(module, answer, seen, name))
        elif _number(version) < _number(wanted.oldest):
            problem = f"{name} {version} is older than {wanted.oldest}, the oldest that is supported"
            yield Gap(problem, f"pip install --upgrade '{name}>={wanted.oldest}'")


def shared_tensorrt(seen: Seen) -> str:
    """The command for a TensorRT that the installed ONNX Runtime can use too; empty where that uses none."""
    facts = seen[CPU].facts
    if not facts.get("linked"):
        return ""
    cuda, oldest = (facts.get("built_for") or "").partition(".")[0], WANTED["tensorrt"].oldest
    return f"pip install 'tensorrt{cuda and f'-cu{cuda}'}>={oldest},<{int(facts['linked']) + 1}'"


def _absent(module: str, seen: Seen) -> Gap:
    wanted, runtimes = WANTED[module], owners_of(seen, "onnxruntime")
    if bindings := _bindings(module, seen):
        command = f"pip install {bindings.removesuffix('-bindings')}=={_installed(seen)[bindings]}"
        return Gap(f"{bindings} alone is installed, without the package {module}", command)
    command = f"pip install 'shapecheck-controlnet[{wanted.extra}]'"
    if module == "tensorrt" and (shared := shared_tensorrt(seen)):
        command = shared
    elif not wanted.extra or (wanted.extra == "onnx" and runtimes not in ([], ["onnxruntime"])):
        command = f"pip install '{distribution(module)}>={wanted.oldest}'"  # the extra would bring a second ONNX Runtime
    elif wanted.extra == "gpu" and "onnxruntime" in runtimes:
        command = f"pip uninstall -y onnxruntime && {command}"
    return Gap(f"{distribution(module)} is not installed", command)


def _cure_of_import(module: str, answer: Answer, seen: Seen, name: str) -> str:
    bindings = _bindings(module, seen)
    if bindings and answer.gone:
        return f"pip install --force-reinstall {bindings.removesuffix('-bindings')}=={_installed(seen)[bindings]}"
    return f"pip install --force-reinstall {name}"


def conflicts(seen: Seen) -> Iterator[Gap]:
    """Two distributions of ONNX Runtime beside each other."""
    owners = owners_of(seen, "onnxruntime")
    if len(owners) > 1:
        kept = "onnxruntime-gpu" if "onnxruntime-gpu" in owners else owners[0]
        problem = f"{' and '.join(owners)} own the same folder: the last installed wins, removing one breaks the other"
        yield Gap(problem, f"pip uninstall -y {' '.join(owners)} && pip install {kept}")


def _installed(seen: Seen) -> dict[str, str]:
    """Versions of the installed distributions that matter here."""
    return dict(seen[INSTALLED].facts.get("installed", {}))


def owners_of(seen: Seen, module: str) -> list[str]:
    """The installed distributions that bring this module."""
    return list(seen[INSTALLED].facts.get("owners", {}).get(module, ()))


def _bindings(module: str, seen: Seen) -> str:
    """The distribution of TensorRT's bare Python bindings for this module."""
    name = re.compile(rf"{module.replace('_', '-')}-cu\d+-bindings")
    return next((each for each in _installed(seen) if name.fullmatch(each)), "")


def name_of(seen: Seen, module: str) -> str:
    """The distribution that brings a module, or that should."""
    return next(iter(owners_of(seen, module)), distribution(module))


def distribution(module: str) -> str:
    """The distribution to install for a module."""
    return "tensorrt-rtx-cu13" if module == "tensorrt_rtx" else module.replace("_", "-")


def _number(version: str) -> list[int]:
    return [int(part) for part in re.findall(r"\d+", version)[:3]] or [sys.maxsize]
