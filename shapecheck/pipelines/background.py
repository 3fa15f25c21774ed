"""Engines that are built while a pipeline runs: in a process of its own, of the lowest priority, which ends with this one.

Run as `python -m shapecheck.pipelines.background` it reads a job from stdin, one line of JSON, and writes one line when all is
made or something failed. When stdin ends, the requesting process is gone, and so is this one; nothing half written stays.
"""

from __future__ import annotations

import _thread
import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from torch import nn

from shapecheck.contract import ShapecheckError
from shapecheck.contract.errors import one_line
from shapecheck.contract.json_codec import decode, encode
from shapecheck.files import make_folder
from shapecheck.logs import silence_logger
from shapecheck.models import diffusers_models
from shapecheck.models.computation import describe_computation
from shapecheck.models.config_file import CLASSES, ModelSource
from shapecheck.models.forward_call import unwrap_compiled
from shapecheck.pipelines.candidates import CandidateMaker
from shapecheck.pipelines.export_cache import ExportCache
from shapecheck.tensorrt.build import build_engine
from shapecheck.tensorrt.profiles import Profile
from shapecheck.tensorrt.record import BuildOptions

_GRACE = 20.0
"""Seconds in which this process may tidy up once the requesting one is gone."""
_log = logging.getLogger(__name__)


class BackgroundBuild:
    """Engines of several models under way. `is_running` says whether they still are."""

    def __init__(self, maker: CandidateMaker, models: Sequence[nn.Module], on_failure: Callable[[str], object]) -> None:
        """Start it. Weights of what is not exported yet are saved into the folder first.

        Raises ShapecheckError if a model cannot be made again from its config, which holds no attention processors,
        or the process does not start.
        """
        entries: list[dict[str, Any]] = []
        try:
            entries.extend(_describe_model(maker, model) for model in models)  # those before one that fails are there too
            self._process = _start_process()
        except BaseException:
            _remove_saved(entries)
            raise
        self._is_told_to_end = False
        assert self._process.stdin is not None
        job = {"cache": str(maker.folder.absolute()), "models": entries, "refittable": maker.refittable}
        with suppress(OSError):  # it is gone already, which is told below
            self._process.stdin.write(json.dumps(job) + "\n")
            self._process.stdin.flush()
        self._thread = threading.Thread(target=self._wait, args=(on_failure,), daemon=True)
        self._thread.start()

    @property
    def is_running(self) -> bool:
        return self._thread.is_alive()

    def end(self) -> None:
        """Tell it to end, as the end of this process does."""
        assert self._process.stdin is not None
        self._is_told_to_end = True
        with suppress(OSError):  # flushing to a process that is gone
            self._process.stdin.close()

    def wait(self) -> None:
        """Wait until it has ended."""
        self._thread.join()

    def _wait(self, on_failure: Callable[[str], object]) -> None:
        assert self._process.stdout is not None
        failure = None
        for line in self._process.stdout:  # libraries print there too
            if line.startswith('{"failure": '):
                failure = json.loads(line)["failure"]
        status = self._process.wait()
        self._process.stdout.close()
        is_stopped = self._is_told_to_end or status in (-signal.SIGINT, -signal.SIGTERM)
        self.end()
        if failure is None and is_stopped:  # as when somebody stops the whole program: it says nothing of the engines
            _log.info("trt was being built in the background and was stopped: the next start goes on")
        elif failure or failure is None:
            failure = failure or f"the building process ended without a word (exit status {status})"
            _log.warning("trt cannot be built in the background: %s", failure)
            on_failure(failure)
        else:
            _log.info("trt has been built in the background: the next start measures it")


def _start_process() -> subprocess.Popen[str]:
    # what Windows calls the lowest priority; elsewhere the process sets it by itself
    flags = getattr(subprocess, "IDLE_PRIORITY_CLASS", 0) | getattr(subprocess, "CREATE_NEW_PROCESS_GROUP", 0)
    try:
        return subprocess.Popen(  # our own module, by our own interpreter
            [sys.executable, "-P", "-m", "shapecheck.pipelines.background"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            encoding="utf-8",
            creationflags=flags,
            start_new_session=True,  # Ctrl-C is for the requesting process, which may go on after it
        )
    except OSError as error:
        raise ShapecheckError(f"cannot start {sys.executable}: {error.strerror or error}") from None


def _describe_model(maker: CandidateMaker, model: nn.Module) -> dict[str, Any]:
    """Return what the process needs of a model: its ONNX file, or a folder that it can be exported from, and profiles."""
    cache, module = maker.find_cache(model), unwrap_compiled(model)
    entry = {"onnx": str(cache.path.absolute()), "folder": "", "profiles": encode(maker.make_profiles(model))}
    if cache.needs_export:
        entry["folder"] = str(_save_model(cache, module))
    else:
        cache.export_onnx()  # which takes seconds
    return entry


def _save_model(cache: ExportCache, module: Any) -> Path:
    """Save a model as diffusers does, into a folder of its own: two processes may do so at the same time."""
    name = type(module).__name__
    if name not in CLASSES:
        raise ShapecheckError(f"a {name} is not exported in the background")
    again = diffusers_models.build(ModelSource(name, "its config", name, dict(module.config)))
    ours, theirs = describe_computation(module), describe_computation(again)
    if ours.unseen or ours.settings != theirs.settings:
        raise ShapecheckError(f"the {name} has settings that its config does not hold, such as attention processors")
    folder = cache.path.absolute().with_suffix(f".{os.getpid()}.saved")
    for leftover in folder.parent.glob("*.saved"):  # of processes that were killed; no build takes three days
        with suppress(OSError):
            if time.time() - leftover.stat().st_mtime > 3 * 24 * 3600:
                shutil.rmtree(leftover, ignore_errors=True)
    try:
        with silence_logger("diffusers"):
            module.save_pretrained(make_folder(folder) / cache.role)
    except Exception as error:  # of the system, or of safetensors
        shutil.rmtree(folder, ignore_errors=True)
        raise ShapecheckError(f"cannot write into {folder}: {one_line(error, longest=200)}") from None
    return folder


def _remove_saved(entries: Sequence[dict[str, Any]]) -> None:
    for entry in entries:
        if entry["folder"]:
            shutil.rmtree(entry["folder"], ignore_errors=True)


def main() -> None:
    """Carry out one job: export what is not exported, and build the engines."""
    from shapecheck.onnx.export import export

    job, failure = json.loads(sys.stdin.readline()), ""
    options = BuildOptions(refittable=job["refittable"])
    threading.Thread(target=_end_with_requester, daemon=True).start()
    if hasattr(os, "nice"):
        os.nice(19)
    try:
        for entry in job["models"]:
            onnx, folder = Path(entry["onnx"]), Path(entry["folder"])
            if entry["folder"]:
                is_unet = (folder / "unet").is_dir()
                export(folder if is_unet else folder / "controlnet", onnx, weights="copy", offline=True)
            profiles = decode(tuple[Profile, ...], entry["profiles"])
            build_engine(onnx, cache=job["cache"], profiles=profiles, options=options)
    except (ShapecheckError, ModuleNotFoundError, MemoryError) as error:
        failure = one_line(str(error) or type(error).__name__, longest=500)
    finally:
        _remove_saved(job["models"])
    sys.stdout.write(json.dumps({"failure": failure}) + "\n")


def _end_with_requester() -> None:
    """Interrupt the work as soon as the requesting process is gone, so that whatever is half written is removed."""
    sys.stdin.read()
    if hasattr(signal, "pthread_kill"):
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)  # interrupts waiting for the builder, too
    else:
        _thread.interrupt_main()
    threading.Event().wait(_GRACE)
    os._exit(1)


if __name__ == "__main__":
    main()
