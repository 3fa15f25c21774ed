"""The process that builds an engine. TensorRT is loaded here and nowhere else: what it does to a process it does to this one.

Run as `python -m shapecheck.tensorrt.worker trt|rtx`. It writes events to stdout, one JSON object a line: first `ready`, with
the release and the GPU. Then it reads a job from stdin. For a build it writes `parsed`, waits for a line to go on, and writes
`built`; for an engine to read it writes `read`, for one to refit `refitted`. In between come `progress` and `message`, and
instead of any of them `failed`. When stdin ends, the requesting process is gone, and so is this one.
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
from shapecheck.tensorrt.engine_tensors import describe_engine
from shapecheck.tensorrt.record import MODULES
from shapecheck.tensorrt.refitting import exchange_weights


class EventWriter(logging.Handler):
    """Writes events to the requesting process, one JSON object a line, from any thread; what is logged becomes `message`."""

    def __init__(self, stream: TextIO) -> None:
        super().__init__(logging.WARNING)
        self._stream, self._writing = stream, threading.Lock()

    def __call__(self, event: str, **values: Any) -> None:
        with self._writing:
            self._stream.write(json.dumps({"event": event} | values) + "\n")
            self._stream.flush()

    def fail(self, stage: str, error: Exception) -> None:
        self("failed", stage=stage, text=f"{type(error).__name__}: {error}")

    def emit(self, record: logging.LogRecord) -> None:
        self("message", severity=record.levelname.lower(), text=record.getMessage())


def main(target: str) -> None:
    """Carry out one job."""
    # Libraries print to stdout: their output goes to stderr, so that only events come from here.
    write = EventWriter(os.fdopen(os.dup(1), "w", encoding="utf-8"))
    os.dup2(2, 1)
    if target == "rtx":
        os.environ["POLYGRAPHY_USE_TENSORRT_RTX"] = "1"  # read once, when polygraphy is imported
    try:
        trt = importlib.import_module(MODULES[target])
        from polygraphy.logger import G_LOGGER

        G_LOGGER.use_python_logging_system = True
        G_LOGGER.module_severity = G_LOGGER.WARNING
        logger = logging.getLogger("Polygraphy")
        logger.propagate = False
        logger.addHandler(write)
        gpu = ""
        if target == "trt":
            import torch

            gpu = "{} ({}.{})".format(torch.cuda.get_device_name(), *torch.cuda.get_device_capability())
        write("ready", tensorrt=trt.__version__, gpu=gpu)
    except Exception as error:  # importing may fail in any way
        write.fail("load", error)
        return
    job = _read_line()
    if job and "read" in job:
        _read_engine(trt, job, write)
    elif job and "refit" in job:
        _refit_engine(trt, job, write)
    elif job:
        _build_engine(trt, target, job, write)


def _read_engine(trt: Any, job: Mapping[str, Any], write: EventWriter) -> None:
    """Write what an engine says of itself. Needs the driver, and the GPU it was built for."""
    try:
        engine = _load_engine(trt, Path(job["read"]), host_code=job["host_code"])
        if engine is None:
            write("failed", stage="refused", text="TensorRT cannot load it here")
        else:
            write("read", **encode(describe_engine(trt, engine)))
    except Exception as error:  # whatever TensorRT raises is reported
        write.fail("read", error)


def _refit_engine(trt: Any, job: Mapping[str, Any], write: EventWriter) -> None:
    """Write an engine with other weights. Needs the driver, and the GPU it was built for."""
    threading.Thread(target=_end_with_requester, args=(Path(job["output"]),), daemon=True).start()
    try:
        from polygraphy.backend.trt import get_trt_logger

        start = time.monotonic()
        engine = _load_engine(trt, Path(job["refit"]), host_code=job["host_code"])
        if engine is None:
            write("failed", stage="refused", text="TensorRT cannot load it here")
            return
        if refusal := exchange_weights(trt, engine, get_trt_logger(), job["weights"]):
            write("failed", stage="refit", text=refusal)
            return
        settings = engine.create_serialization_config()
        # By default an engine that is saved again can be refitted no more.
        if (stays := getattr(trt.SerializationFlag, "INCLUDE_REFIT", None)) is not None:
            settings.set_flag(stays)
        plan = memoryview(engine.serialize_with_config(settings))
        try:
            with Path(job["output"]).open("wb") as file:
                file.write(plan)
        except OSError as error:
            write("failed", stage="write", text=f"{error.strerror}; it needs {plan.nbytes / 1e9:.2f} GB")
            return
        write("refitted", seconds=time.monotonic() - start)
    except Exception as error:  # whatever TensorRT raises is reported
        write.fail("refit", error)


def _load_engine(trt: Any, path: Path, *, host_code: bool) -> Any:
    """Return the engine in a file, or None if TensorRT refuses it."""
    from polygraphy.backend.trt import get_trt_logger

    runtime = trt.Runtime(get_trt_logger())
    if host_code:
        runtime.engine_host_code_allowed = True
    return runtime.deserialize_cuda_engine(path.read_bytes())


def _build_engine(trt: Any, target: str, job: Mapping[str, Any], write: EventWriter) -> None:
    stage = "parse"
    try:
        from polygraphy.backend.trt import CreateNetwork, EngineBytesFromNetwork, get_trt_logger

        builder, network = CreateNetwork(strongly_typed=True)()
        parser = trt.OnnxParser(network, get_trt_logger())  # Polygraphy's own loader leaves the errors in its log
        is_parsed = parser.parse_from_file(job["onnx"])
        errors = []
        for parser_error in (parser.get_error(number) for number in range(parser.num_errors)):
            text = f"{parser_error.code()}: {parser_error.desc()}"
            errors.append({"node": parser_error.node_name(), "operator": parser_error.node_operator(), "text": text})
        if errors or not is_parsed:
            reasons = errors or [{"node": "", "operator": "", "text": "TensorRT's parser gives no reason"}]
            write("failed", stage=stage, text="", errors=reasons)
            return
        network.name = job["name"]
        inputs = [_encode_tensor(network.get_input(number)) for number in range(network.num_inputs)]
        outputs = [_encode_tensor(network.get_output(number)) for number in range(network.num_outputs)]
        write("parsed", inputs=inputs, outputs=outputs)
        if _read_line() is None:
            return
        threading.Thread(target=_end_with_requester, args=(Path(job["output"]),), daemon=True).start()
        stage = "build"
        start = time.monotonic()
        config = _create_config(trt, target, builder, network, job, write)
        plan = memoryview(EngineBytesFromNetwork((builder, network), config=config)())
        seconds = time.monotonic() - start
        try:
            with Path(job["output"]).open("wb") as file:
                file.write(plan)
        except OSError as error:
            write("failed", stage="write", text=f"{error.strerror}; it needs {plan.nbytes / 1e9:.2f} GB")
            return
        _save_timing_cache(config, job["timing_cache"], write)
        write("built", seconds=seconds)
    except Exception as error:  # whatever TensorRT or Polygraphy raises is reported, with what they logged before it
        write.fail(stage, error)


def _encode_tensor(tensor: Any) -> dict[str, Any]:
    dims = [size if size >= 0 else tensor.get_dimension_name(axis) for axis, size in enumerate(tensor.shape)]
    return {"name": tensor.name, "dtype": tensor.dtype.name, "dims": dims}


def _create_config(trt: Any, target: str, builder: Any, network: Any, job: Mapping[str, Any], write: EventWriter) -> Any:
    from polygraphy.backend.trt import CreateConfig, Profile

    options, timing_cache = job["options"], job["timing_cache"]
    profiles = [Profile() for _ in job["profiles"]]
    for profile, inputs in zip(profiles, job["profiles"], strict=True):
        for bounds in inputs:
            profile.add(bounds["name"], bounds["min"], bounds["opt"], bounds["max"])
    settings = {
        "profiles": profiles,
        "refittable": options["refittable"],
        "version_compatible": options["version_compatible"],
        "builder_optimization_level": options["optimization_level"],
        "progress_monitor": _create_monitor(trt, write),
        "load_timing_cache": timing_cache if timing_cache and Path(timing_cache).is_file() else None,
    }
    if options["workspace"] is not None:
        settings["memory_pool_limits"] = {trt.MemoryPoolType.WORKSPACE: options["workspace"]}
    if target == "rtx":
        from polygraphy.backend.tensorrt_rtx import CreateConfigRTX

        pairs = [tuple(map(int, capability.split("."))) for capability in options["compute_capabilities"]]
        config = CreateConfigRTX(compute_capabilities=pairs or None, **settings)(builder, network)
    else:
        config = CreateConfig(**settings)(builder, network)
    (config.set_flag if options["tf32"] else config.clear_flag)(trt.BuilderFlag.TF32)
    return config


def _create_monitor(trt: Any, write: EventWriter) -> Any:
    class Monitor(trt.IProgressMonitor):  # type: ignore[misc]
        """Reports the innermost of nested phases."""

        def __init__(self) -> None:
            super().__init__()
            self.phases: dict[str, int] = {}
            self.last_report = 0.0

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            self.phases[phase_name] = num_steps

        def step_complete(self, phase_name: str, step: int) -> bool:
            now = time.monotonic()
            if now - self.last_report > 0.1:  # seconds
                self.last_report = now
                write("progress", phase=phase_name, step=step, steps=self.phases.get(phase_name, 0))
            return True

        def phase_finish(self, phase_name: str) -> None:
            self.phases.pop(phase_name, None)

    return Monitor()


def _save_timing_cache(config: Any, path: str | None, write: EventWriter) -> None:
    """Write the timings, with those another build has written meanwhile; whole or not at all. The engine is worth more."""
    if path is None or (cache := config.get_timing_cache()) is None:
        return
    from polygraphy.util import LockFile

    from shapecheck.files import atomic_write

    file = Path(path)
    try:
        with LockFile(path):
            if file.is_file() and (before := config.create_timing_cache(file.read_bytes())) is not None:
                cache.combine(before, True)
            with atomic_write(file) as partial:
                partial.write_bytes(cache.serialize())
    except Exception as error:  # whatever is wrong with a cache, the engine is built
        write("message", severity="warning", text=f"the timing cache {file} was not written: {error}")


def _read_line() -> dict[str, Any] | None:
    """Return what the requesting process sends next, or None if it is gone."""
    line = sys.stdin.readline()
    return json.loads(line) if line.endswith("\n") else None


def _end_with_requester(partial: Path) -> None:
    """End this process as soon as the requesting one is gone, whatever TensorRT is doing, and leave nothing half written."""
    sys.stdin.read()
    partial.unlink(missing_ok=True)
    os._exit(1)


if __name__ == "__main__":
    main(sys.argv[1])
