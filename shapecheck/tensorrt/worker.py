"""The process that builds an engine. TensorRT is loaded here and nowhere else: what it does to a process it does to this one.

Run as `python -m shapecheck.tensorrt.worker trt|rtx`. It tells on stdout, one JSON object a line: `ready` with what there
is; then takes a job from stdin. One to build: it tells `parsed`, takes the word to go on, and tells `built`. One to read an
engine: it tells `read`. In between `progress` and `message`; in
place of any of them `failed`. When stdin ends, whoever asked is gone, and so is this process.
"""

from __future__ import annotations

import importlib
import json
import logging
import os
import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TextIO

from shapecheck.contract.json_codec import encode
from shapecheck.tensorrt.engine_io import describe
from shapecheck.tensorrt.record import MODULES

_OFTEN = 0.1
"""Seconds between two tellings of progress."""


class Teller:
    """Tells the asking process, one JSON object a line, from whatever thread."""

    def __init__(self, stream: TextIO) -> None:
        self._stream, self._lock = stream, threading.Lock()

    def __call__(self, event: str, **values: Any) -> None:
        """Tell of one event."""
        with self._lock:
            self._stream.write(json.dumps({"event": event} | values) + "\n")
            self._stream.flush()


class _Messages(logging.Handler):
    """What TensorRT and Polygraphy say that is a warning or worse, to the asking process."""

    def __init__(self, tell: Teller) -> None:
        super().__init__(logging.WARNING)
        self._tell = tell

    def emit(self, record: logging.LogRecord) -> None:
        """Pass it on."""
        self._tell("message", severity=record.levelname.lower(), text=record.getMessage())


def main(target: str) -> None:
    """Carry out one job."""
    tell = Teller(_own_stdout())
    if target == "rtx":
        os.environ["POLYGRAPHY_USE_TENSORRT_RTX"] = "1"  # read once, when polygraphy is imported
    try:
        trt = importlib.import_module(MODULES[target])
        _listen(tell)
        tell("ready", tensorrt=trt.__version__, gpu=_gpu() if target == "trt" else "")
    except Exception as error:  # importing may fail in any way
        tell("failed", stage="load", text=f"{type(error).__name__}: {error}")
        return
    if job := _next_line():
        _read(trt, job, tell) if "read" in job else _carry_out(trt, target, job, tell)


def _read(trt: Any, job: Mapping[str, Any], tell: Teller) -> None:
    """Tell what an engine says of itself. Needs the driver, and the GPU it was built for."""
    try:
        from polygraphy.backend.trt import get_trt_logger

        runtime = trt.Runtime(get_trt_logger())
        if job["host_code"]:
            runtime.engine_host_code_allowed = True
        engine = runtime.deserialize_cuda_engine(Path(job["read"]).read_bytes())
        if engine is None:
            tell("failed", stage="refused", text="TensorRT cannot load it here")
            return
        tell("read", **encode(describe(trt, engine)))
    except Exception as error:  # whatever TensorRT raises is told
        tell("failed", stage="read", text=f"{type(error).__name__}: {error}")


def _carry_out(trt: Any, target: str, job: Mapping[str, Any], tell: Teller) -> None:
    stage = "parse"
    try:
        builder, network, errors = _parsed(trt, job["onnx"])
        if errors:
            tell("failed", stage=stage, text="", errors=errors)
            return
        network.name = job["name"]
        tell("parsed", inputs=_tensors(network, "input"), outputs=_tensors(network, "output"))
        if _next_line() is None:
            return
        _leave_with(Path(job["output"]))
        stage = "build"
        start = time.monotonic()
        config = _config(trt, target, builder, network, job, tell)
        plan = memoryview(_built(builder, network, config))
        seconds = time.monotonic() - start
        try:
            with Path(job["output"]).open("wb") as file:
                file.write(plan)
        except OSError as error:
            tell("failed", stage="write", text=f"{error.strerror}; it takes {plan.nbytes / 1e9:.2f} GB")
            return
        _save_timing_cache(config, job["timing_cache"], tell)
        tell("built", seconds=seconds)
    except Exception as error:  # whatever TensorRT or Polygraphy raises is told, with what they logged before it
        tell("failed", stage=stage, text=f"{type(error).__name__}: {error}")


def _parsed(trt: Any, onnx: str) -> tuple[Any, Any, list[dict[str, str]]]:
    """The network in a file, and what the parser refuses in it. Polygraphy's own loader keeps the errors to its log."""
    from polygraphy.backend.trt import CreateNetwork, get_trt_logger

    builder, network = CreateNetwork(strongly_typed=True)()
    parser = trt.OnnxParser(network, get_trt_logger())
    done = parser.parse_from_file(onnx)
    errors = [_error(parser.get_error(number)) for number in range(parser.num_errors)]
    if not done and not errors:
        errors = [{"node": "", "operator": "", "text": "TensorRT's parser gives no reason"}]
    return builder, network, errors


def _error(parser_error: Any) -> dict[str, str]:
    text = f"{parser_error.code()}: {parser_error.desc()}"
    return {"node": parser_error.node_name(), "operator": parser_error.node_operator(), "text": text}


def _tensors(network: Any, kind: str) -> list[dict[str, Any]]:
    get = network.get_input if kind == "input" else network.get_output
    count = network.num_inputs if kind == "input" else network.num_outputs
    return [_tensor(get(number)) for number in range(count)]


def _tensor(tensor: Any) -> dict[str, Any]:
    dims = [size if size >= 0 else tensor.get_dimension_name(axis) for axis, size in enumerate(tensor.shape)]
    return {"name": tensor.name, "dtype": tensor.dtype.name, "dims": dims}


def _config(trt: Any, target: str, builder: Any, network: Any, job: Mapping[str, Any], tell: Teller) -> Any:
    from polygraphy.backend.trt import Profile

    options = job["options"]
    profiles = [Profile() for _ in job["profiles"]]
    for profile, inputs in zip(profiles, job["profiles"], strict=True):
        for each in inputs:
            profile.add(each["name"], each["min"], each["opt"], each["max"])
    timing = job["timing_cache"] if job["timing_cache"] and Path(job["timing_cache"]).is_file() else None
    settings = {
        "profiles": profiles,
        "refittable": options["refittable"],
        "version_compatible": options["version_compatible"],
        "builder_optimization_level": options["optimization_level"],
        "progress_monitor": _monitor(trt, tell),
        "load_timing_cache": timing,
    }
    if options["workspace"] is not None:
        settings["memory_pool_limits"] = {trt.MemoryPoolType.WORKSPACE: options["workspace"]}
    config = _create_config(target, settings, options["compute_capabilities"])(builder, network)
    (config.set_flag if options["tf32"] else config.clear_flag)(trt.BuilderFlag.TF32)
    return config


def _create_config(target: str, settings: Mapping[str, Any], capabilities: list[str]) -> Any:
    if target == "trt":
        from polygraphy.backend.trt import CreateConfig

        return CreateConfig(**settings)
    from polygraphy.backend.tensorrt_rtx import CreateConfigRTX

    pairs = [tuple(map(int, each.split("."))) for each in capabilities]
    return CreateConfigRTX(compute_capabilities=pairs or None, **settings)


def _built(builder: Any, network: Any, config: Any) -> Any:
    from polygraphy.backend.trt import EngineBytesFromNetwork

    return EngineBytesFromNetwork((builder, network), config=config)()


def _monitor(trt: Any, tell: Teller) -> Any:
    class Monitor(trt.IProgressMonitor):  # type: ignore[misc]
        """Phases are nested; the innermost is told."""

        def __init__(self) -> None:
            super().__init__()
            self.phases: dict[str, int] = {}
            self.told = 0.0

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            self.phases[phase_name] = num_steps

        def step_complete(self, phase_name: str, step: int) -> bool:
            now = time.monotonic()
            if now - self.told > _OFTEN:
                self.told = now
                tell("progress", phase=phase_name, step=step, steps=self.phases.get(phase_name, 0))
            return True

        def phase_finish(self, phase_name: str) -> None:
            self.phases.pop(phase_name, None)

    return Monitor()


def _save_timing_cache(config: Any, path: str | None, tell: Teller) -> None:
    """Write what was timed, with what another build has written meanwhile; whole or not at all. The engine is worth more."""
    if path is None or (cache := config.get_timing_cache()) is None:
        return
    from polygraphy.util import LockFile

    from shapecheck.files import whole

    file = Path(path)
    try:
        with LockFile(path):
            if file.is_file():
                before = config.create_timing_cache(file.read_bytes())
                if before is not None:
                    cache.combine(before, True)
            with whole(file) as partial:
                partial.write_bytes(cache.serialize())
    except Exception as error:  # whatever is wrong with a cache, the engine is built
        tell("message", severity="warning", text=f"the timing cache {file} was not written: {error}")


def _listen(tell: Teller) -> None:
    from polygraphy.logger import G_LOGGER

    G_LOGGER.use_python_logging_system = True
    G_LOGGER.module_severity = G_LOGGER.WARNING
    logger = logging.getLogger("Polygraphy")
    logger.propagate = False
    logger.addHandler(_Messages(tell))


def _gpu() -> str:
    import torch

    major, minor = torch.cuda.get_device_capability()
    return f"{torch.cuda.get_device_name()} ({major}.{minor})"


def _next_line() -> dict[str, Any] | None:
    """What the asking process says next; None where it is gone."""
    line = sys.stdin.readline()
    return json.loads(line) if line.endswith("\n") else None


def _leave_with(partial: Path) -> None:
    """End this process as soon as the asking one is gone, whatever TensorRT is doing, and leave nothing half written."""

    def wait() -> None:
        sys.stdin.read()
        partial.unlink(missing_ok=True)
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def _own_stdout() -> TextIO:
    """The stream to tell on; what libraries print goes to stderr instead."""
    own = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    return own


if __name__ == "__main__":
    main(sys.argv[1])
