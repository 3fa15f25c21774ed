"""The probes of `shapecheck doctor`, each in a process of its own, because what is loaded may end the interpreter.

`ask("torch")` runs this file as `python probes.py torch`, with the standard library and without this package: what is
examined is imported by name. Standard output gets one JSON object a line, as far as the probe came: `stage` says what it was
about to do, `problem` what was raised. Whatever libraries print goes to standard error.
"""

from __future__ import annotations

import ctypes
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from importlib import import_module, metadata
from pathlib import Path
from typing import Any

Facts = dict[str, object]
MODEL = (
    b'\x08\x08:5\n\x0e\n\x01x\n\x01x\x12\x01y"\x03Add\x12\x01gZ\x0f\n\x01x\x12\n\n\x08\x08\x01\x12\x04\n\x02\x08\x01'
    b"b\x0f\n\x01y\x12\n\n\x08\x08\x01\x12\x04\n\x02\x08\x01B\x04\n\x00\x10\x11"
)
"""An ONNX file, y = x + x for one float32: written out, since `onnx` may not be there to write it."""
_TIMEOUT = 120
"""Seconds; loading TensorRT from a slow disk takes tens."""
_LONGEST = 240
_GONE = re.compile(r"(lib[\w.+-]+\.so[.\d]*): cannot open shared object file|\"?([\w.-]+\.dll)\"? which is missing")
_LOGGED = (r"\(cudaError \d+: ([^)]+)\)", r"(CUDA failure \d+: [^;\n]+)", r"with error: (.+)", r"\[E\] (.+)")
"""Places in a log where libraries say what went wrong, the plainest first."""


@dataclass(frozen=True, slots=True)
class ProbeAnswer:
    """The facts that a probe found, and the reason why it found no more."""

    facts: Mapping[str, Any]
    reason: str
    gone: tuple[str, ...] = ()
    """The shared libraries that it missed."""

    @property
    def problem(self) -> str:
        return f"cannot {self.facts.get('stage', 'begin')}: {self.reason or 'no reason was given'}"


def ask(probe: str) -> ProbeAnswer:
    """Run a probe, given as its name and arguments in one text. Raises nothing if its process ends badly."""
    command, ended = [sys.executable, "-P", __file__, *probe.split()], ""
    try:
        result = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, timeout=_TIMEOUT)  # noqa: S603
        output, errors, status = result.stdout, result.stderr, result.returncode
        if status:
            ended = f"the interpreter ended with {signal.Signals(-status).name if status < 0 else f'status {status:#x}'}"
    except subprocess.TimeoutExpired as late:
        output, errors, ended = late.stdout or b"", late.stderr or b"", f"no answer within {_TIMEOUT} s"
    except OSError as error:  # no memory, no processes left
        return ProbeAnswer({}, f"{command[0]}: {error.strerror}")
    log = re.sub(r"\x1b\[[\d;]*m", "", errors.decode("utf-8", "replace"))
    facts: dict[str, Any] = {}
    for line in output.decode("utf-8", "replace").splitlines(keepends=True):
        if line.endswith("\n"):  # else a crash cut it short
            facts |= json.loads(line)
    raised = str(facts.get("problem", ""))
    gone = tuple(dict.fromkeys(unix or windows for unix, windows in _GONE.findall(f"{log}\n{raised}")))
    if gone:
        reason = f"{', '.join(gone)} {'is' if len(gone) == 1 else 'are'} missing"
    elif ended:
        reason = "; its last words: ".join((ended, *log.strip().splitlines()[-1:]))
    else:
        logged = next((match[1] for pattern in _LOGGED if (match := re.search(pattern, log))), "")
        reason = logged or (raised if " " in raised or not raised else f"{facts['kind']}: {raised}")
    line = " ".join("".join(letter if letter.isprintable() else " " for letter in reason).split())
    return ProbeAnswer(facts, line if len(line) <= _LONGEST else f"{line[:_LONGEST]} …", gone)


def importing(module: str) -> Iterator[Facts]:
    """Import a module."""
    yield {"stage": f"import {module}"}
    yield {"version": _import(module)[1]}


def distributions(*modules: str) -> Iterator[Facts]:
    """Find which installed distributions own these modules, and the versions of all distributions."""

    def normalize(name: str | None) -> str:
        return re.sub(r"[-_.]+", "-", name or "").lower()

    installed: dict[str, str] = {}
    owners: dict[str, list[str]] = {module: [] for module in modules}
    found = [*metadata.distributions()]
    for distribution in found:
        with suppress(Exception):  # METADATA that is damaged hides its own distribution alone
            installed.setdefault(normalize(distribution.name), distribution.version)  # the first wins
    yield {"installed": installed}
    for distribution in found:
        with suppress(Exception):  # so does RECORD
            name, declared = normalize(distribution.name), (distribution.read_text("top_level.txt") or "").split()
            brought = {*(declared or (file.parts[0] for file in distribution.files or ()))}
            for module in brought.intersection(modules):
                owners[module].append(name)
    yield {"owners": {module: list(dict.fromkeys(names)) for module, names in owners.items()}}


def driver() -> Iterator[Facts]:
    """Load the NVIDIA driver and ask it for its GPUs, without any CUDA library."""
    library, management = ("nvcuda.dll", "nvml.dll") if sys.platform == "win32" else ("libcuda.so.1", "libnvidia-ml.so.1")
    cards = 0
    for folder in Path("/sys/bus/pci/devices").glob("*"):
        with suppress(OSError):
            vendor, kind = ((folder / name).read_text(encoding="ascii").strip() for name in ("vendor", "class"))
            cards += vendor == "0x10de" and kind.startswith("0x03")  # NVIDIA's display devices, with or without a driver
    yield {"cards": cards, "container": any(Path(mark).exists() for mark in ("/.dockerenv", "/run/.containerenv"))}
    yield {"stage": f"load {library}"}
    cuda = ctypes.CDLL(library)
    version, number, memory = ctypes.create_string_buffer(96), ctypes.c_int(), ctypes.c_size_t()
    with suppress(OSError):
        nvml = ctypes.CDLL(management)
        if not nvml.nvmlInit_v2():
            nvml.nvmlSystemGetDriverVersion(version, len(version))
    yield {"loaded": True, "version": version.value.decode("utf-8", "replace"), "stage": "start the NVIDIA driver"}

    def call(function: str, *arguments: Any) -> None:
        if code := getattr(cuda, function)(*arguments):
            text = ctypes.c_char_p()
            cuda.cuGetErrorString(code, ctypes.byref(text))
            raise RuntimeError(f"{(text.value or b'unknown error').decode()} (CUDA error {code})")

    call("cuInit", 0)
    call("cuDriverGetVersion", ctypes.byref(number))
    yield {"cuda": f"{number.value // 1000}.{number.value % 1000 // 10}", "stage": "list the GPUs"}
    call("cuDeviceGetCount", ctypes.byref(number))
    devices: list[Facts] = []
    for index in range(number.value):
        handle, name, capability = ctypes.c_int(), ctypes.create_string_buffer(256), []
        call("cuDeviceGet", ctypes.byref(handle), index)
        call("cuDeviceGetName", name, len(name), handle)
        call("cuDeviceTotalMem_v2", ctypes.byref(memory), handle)
        for attribute in (75, 76):  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR, …_MINOR
            call("cuDeviceGetAttribute", ctypes.byref(number), attribute, handle)
            capability.append(str(number.value))
        text = name.value.decode("utf-8", "replace")
        devices.append({"name": text, "capability": ".".join(capability), "memory": memory.value})
    yield {"devices": devices}


def torch() -> Iterator[Facts]:
    """Add two numbers on the CPU, then on the GPU."""
    yield {"stage": "import torch"}
    library, version = _import("torch")
    yield {"version": version, "built_for": library.version.cuda, "stage": "compute on the CPU"}
    yield {"cpu": float(library.ones(2).sum()) == 2}
    if library.version.cuda is not None:
        yield {"stage": "compute on the GPU"}
        yield {"cuda": float(library.ones(2, device="cuda").sum()) == 2}


def torch_compile() -> Iterator[Facts]:
    """Compile a sum, for the GPU if PyTorch has one."""
    yield {"stage": "import torch"}
    library, version = _import("torch")
    device, place = ("cuda", "the GPU") if library.cuda.is_available() else ("cpu", "the CPU")
    yield {"version": version, "place": place, "stage": f"compile for {place}"}
    double = library.compile(lambda number: number + number, fullgraph=True)
    yield {"compiled": float(double(library.ones(2, device=device)).sum()) == 4}


def onnxruntime(provider: str) -> Iterator[Facts]:
    """Run a session on one provider, and on no other: ONNX Runtime falls back to the CPU without an error."""
    yield {"stage": "import onnxruntime"}
    library, version = _import("onnxruntime")
    linked = ""  # the major version of libnvinfer that the TensorRT provider is linked with
    for file in Path(library.__file__).parent.glob("capi/*onnxruntime_providers_tensorrt.*"):
        if match := re.search(rb"nvinfer(?:\.so\.|_)(\d+)", file.read_bytes()):
            linked = match[1].decode()
            break
    yield {"version": version, "providers": library.get_available_providers(), "linked": linked}
    yield {"built_for": getattr(library, "cuda_version", ""), "stage": f"start a session with {provider}"}
    if provider not in library.get_available_providers():
        return
    if provider != "CPUExecutionProvider" and hasattr(library, "preload_dlls"):
        library.preload_dlls()  # CUDA as pip installs it is not where the loader looks
    if provider == "TensorrtExecutionProvider":
        tensorrt = ""
        with suppress(ImportError):  # importing it loads its libraries, which the provider then finds
            tensorrt = _import("tensorrt")[1]
        yield {"tensorrt": tensorrt}
    session = library.InferenceSession(MODEL, providers=[provider], enable_fallback=0)
    if session.get_providers()[0] != provider:
        return
    yield {"stage": f"compute with {provider}"}
    number = import_module("numpy").array([1.5], "float32")
    yield {"result": float(session.run(None, {"x": number})[0][0]) == 3}


def tensorrt(module: str) -> Iterator[Facts]:
    """Build an engine, then load it as if to run it."""
    yield {"stage": f"import {module}"}
    trt, version = _import(module)
    yield {"version": version, "stage": "create a builder"}
    logger = trt.Logger()
    builder = trt.Builder(logger)

    def build(capability: Any = None) -> Any:
        network, config = builder.create_network(0), builder.create_builder_config()
        if capability is not None:
            config.num_compute_capabilities = 1
            config.set_compute_capability(capability, 0)
        parser = trt.OnnxParser(network, logger)
        return builder.build_serialized_network(network, config) if parser.parse(MODEL) else None

    def load(plan: Any) -> bool:
        runtime = trt.Runtime(logger)
        engine = None if plan is None else runtime.deserialize_cuda_engine(plan)
        return engine is not None and engine.create_execution_context() is not None

    yield {"stage": "build an engine"}
    plan = build()
    if plan is None:
        return
    yield {"built": True, "stage": "load an engine"}
    loads = load(plan)
    capability = getattr(trt, "ComputeCapability", None)
    if not loads and capability is not None:  # the engines that TensorRT for RTX builds unasked leave old GPUs out
        loads = load(build(capability.CURRENT))
    yield {"loaded": loads}


def main(name: str, *arguments: str) -> None:
    """Run one probe, and write line by line how far it came."""
    probes: dict[str, Callable[..., Iterator[Facts]]] = {
        probe.__name__: probe for probe in (importing, distributions, driver, torch, torch_compile, onnxruntime, tensorrt)
    }
    answer = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    with answer:
        try:
            for facts in probes[name](*arguments):
                answer.write(json.dumps(facts) + "\n")
                answer.flush()
        except (Exception, SystemExit) as error:
            missing = error.name if isinstance(error, ModuleNotFoundError) else None
            answer.write(json.dumps({"problem": str(error), "kind": type(error).__name__, "missing": missing}) + "\n")


def _import(name: str) -> tuple[Any, str]:
    module = import_module(name)
    if getattr(module, "__file__", None) is None:
        raise ImportError(f"a folder {name} is there, without the package's files")
    return module, str(getattr(module, "__version__", "unknown"))


if __name__ == "__main__":
    main(*sys.argv[1:])
