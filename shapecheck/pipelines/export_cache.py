"""Export a live UNet or ControlNet into a folder and build engines of it, or find there what was made of it before."""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import cached_property
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from torch import nn

from shapecheck import extras
from shapecheck.contract import Role, ShapecheckError
from shapecheck.contract.errors import one_line
from shapecheck.files import lock_folder, make_folder
from shapecheck.models import weights
from shapecheck.models.adapters import remove_adapters
from shapecheck.models.computation import describe_computation
from shapecheck.models.diffusers_models import is_controlnet
from shapecheck.models.forward_call import unwrap_compiled
from shapecheck.observe.subject import resolve_subject
from shapecheck.onnx.contract_metadata import contract_inside
from shapecheck.onnx.file import OnnxFile
from shapecheck.progress import Progress
from shapecheck.tensorrt.build import build_engine
from shapecheck.tensorrt.profiles import Profile
from shapecheck.tensorrt.record import BuildOptions, Target, read_engine
from shapecheck.version import __version__

_OPENED_AFTER = 3600.0
"""Seconds after which what was exported for one time is open, or was given up."""
_log = logging.getLogger(__name__)


class ExportCache:
    """The files of one live UNet or ControlNet in a folder, each made once.

    What has the same graph and other weights, such as another LoRA's, is made of the files of that: an ONNX file is rebound,
    and an engine refitted if it is `refittable`.
    """

    def __init__(self, model: nn.Module, folder: Path, progress: Progress, *, refittable: bool = False) -> None:
        self._model, self._folder, self._progress, self._refittable = model, folder, progress, refittable

    @property
    def role(self) -> Role:
        return "controlnet" if is_controlnet(unwrap_compiled(self._model)) else "unet"

    @property
    def is_exported(self) -> bool:
        """Return whether the ONNX file is there, whole, from this call or an earlier one."""
        path = self.path
        try:
            is_there = path.is_file() and path.with_name(f"{path.name}.data").is_file()
            return is_there and contract_inside(OnnxFile(path)) is not None
        except ShapecheckError:  # damaged: it is exported again
            return False

    @property
    def needs_export(self) -> bool:
        """Return whether the graph has to be traced, which takes minutes: it was not for these weights, nor for others."""
        return not self.is_exported and not self._list_others()

    def export_onnx(self) -> Path:
        """Return the ONNX file, its weights beside it. Raises ShapecheckError if the model cannot be exported."""
        # Imported now, with the exporter's libraries: compiled models never need them.
        from shapecheck.onnx.export import export

        with lock_folder(self._folder):
            if not self.is_exported and not self._rebind_other():
                export(self._model, self.path, weights="copy", progress=self._progress)
        return self.path

    def _rebind_other(self) -> bool:
        """Write the file from one of the same graph with other weights, such as another LoRA's, if there is one."""
        from shapecheck.onnx.rebind import rebind

        for other in self._list_others():
            try:
                rebind(other, self._model, self.path, progress=self._progress)
            except ShapecheckError as error:  # damaged, or changed by somebody: it is exported anew
                _log.info("%s is not used again: %s", other, error)
            else:
                return True
        return False

    def build_engine(self, target: Target, profiles: Sequence[Profile]) -> Path:
        """Return the engine of the ONNX file. Raises ShapecheckError if TensorRT is missing or refuses it."""
        path, options = self.export_onnx(), BuildOptions(target=target, refittable=self._refittable)
        if self._refittable and not self._find_engine(f"{path.stem}-*.plan", target, profiles):
            self._refit_other(path, target, profiles)
        return build_engine(path, cache=self._folder, profiles=profiles, options=options, progress=self._progress).path

    def _refit_other(self, path: Path, target: Target, profiles: Sequence[Profile]) -> None:
        """Make the engine of a file from one of the same graph with other weights, if there is one that can be refitted."""
        from shapecheck.tensorrt.refit import refit

        other = self._find_engine(f"{self._graph}-*.plan", target, profiles)
        if other is not None:
            try:
                refit(other, path, cache=self._folder, progress=self._progress)
            except ShapecheckError as error:  # it is built anew
                _log.info("%s is not refitted: %s", other, error)

    def has_engine(self, target: Target, profiles: Sequence[Profile]) -> bool:
        """Return whether an engine for these profiles lies here, so that `build_engine` finds it, or one that it refits."""
        stem = self._graph if self._refittable else self.path.stem
        return self._find_engine(f"{stem}-*.plan", target, profiles) is not None

    def _find_engine(self, pattern: str, target: Target, profiles: Sequence[Profile]) -> Path | None:
        """Return an engine for these profiles, by a TensorRT of this release."""
        release, options = "", BuildOptions(target=target, refittable=self._refittable)
        with suppress(PackageNotFoundError):
            release = ".".join(version("tensorrt").split(".")[:2])
        for path in self._folder.glob(pattern):
            with suppress(ShapecheckError, OSError):
                request = read_engine(path).request
                # an engine of another TensorRT may lie beside it
                same = request.options == options and request.profiles == tuple(profiles)
                if same and request.tensorrt.startswith(release):
                    return path
        return None

    @contextmanager
    def keep_engine(self, options: Mapping[str, str]) -> Iterator[Mapping[str, str]]:
        """Yield options with which ONNX Runtime's TensorRT provider builds an engine once, for a block that opens the session.

        By itself it takes an engine of other weights for that of the same graph, and a half-written one for a whole one. So
        each has a folder of its own, which is there only when it is whole.
        """
        with lock_folder(self._folder):
            kept = place = self._locate_provider_engine(options)
            if not kept.is_dir():
                place = kept.with_suffix(".partial")
                shutil.rmtree(place, ignore_errors=True)  # of a process that was killed
                make_folder(place)
                for timings in self._folder.glob("*.ort-trt/*.timing"):  # of other weights and sizes: much is the same
                    shutil.copy(timings, place)
            enabled = {f"trt_{kind}_cache_enable": "True" for kind in ("engine", "timing")}
            yield {**options, **enabled, "trt_engine_cache_path": str(place), "trt_timing_cache_path": str(place)}
            if place != kept:
                place.rename(kept)

    def has_provider_engine(self, options: Mapping[str, str]) -> bool:
        """Return whether `keep_engine` has kept the engine of these options."""
        return self._locate_provider_engine(options).is_dir()

    def _locate_provider_engine(self, options: Mapping[str, str]) -> Path:
        makers = extras.list_versions(("onnxruntime", "onnxruntime-gpu"))
        made_for = json.dumps([makers, sorted(options.items())])
        return self.path.with_name(f"{self.path.stem}-{hashlib.sha256(made_for.encode()).hexdigest()[:16]}.ort-trt")

    @property
    def _graph(self) -> str:
        """Return what names of files of the same graph begin with."""
        return self.path.stem.rpartition("-")[0]

    def _list_others(self) -> list[Path]:
        """Return the files of the same graph with other weights."""
        return [path for path in self._folder.glob(f"{self._graph}-{'[0-9a-f]' * 16}.onnx") if path != self.path]

    @cached_property
    def path(self) -> Path:
        """Name the file after all that it depends on: what the model computes and what exports it, then its weights.

        If something of that cannot be described, the file is for this time alone, and is not found again.
        """
        subject = resolve_subject(self._model)
        computation = describe_computation(remove_adapters(unwrap_compiled(self._model)))
        weights_digest = weights.digest_live(subject.live or {}, lambda *sizes: self._progress("hashing the weights", *sizes))
        # Another release of any of these may export another graph.
        makers = [f"shapecheck {__version__}", *(f"{name} {version(name)}" for name in ("torch", "diffusers", "onnxscript"))]
        graph = hashlib.sha256("\n".join([computation.digest, *makers]).encode()).hexdigest()
        if not computation.unseen:
            return self._folder / f"{subject.role}-{graph[:16]}-{weights_digest.removeprefix('sha256:')[:16]}.onnx"
        more = f" (and {len(computation.unseen) - 1} more)" if len(computation.unseen) > 1 else ""
        reason = one_line(computation.unseen[0], longest=200) + more
        _log.warning(
            "the %s is exported for this time alone, for nobody knows what it computes next time: %s", subject.name, reason
        )
        self._remove_used()
        return self._folder / f"{subject.role}-{uuid.uuid4().hex[:16]}-once.onnx"

    def _remove_used(self) -> None:
        """Remove what was for one time alone, once nobody opens it any more."""
        for leftover in self._folder.glob("*-once*"):
            with suppress(OSError):
                if time.time() - leftover.stat().st_mtime > _OPENED_AFTER:
                    shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()
