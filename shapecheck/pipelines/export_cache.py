"""Export a live UNet into a folder and build engines of it, or find there what was made of the same UNet before."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from importlib.metadata import version
from pathlib import Path

from torch import nn

from shapecheck import extras
from shapecheck.contract import ShapecheckError
from shapecheck.files import lock_folder, make_folder
from shapecheck.models import weights
from shapecheck.observe.subject import resolve_subject
from shapecheck.onnx.contract_metadata import contract_inside
from shapecheck.onnx.export import export
from shapecheck.onnx.file import OnnxFile
from shapecheck.progress import Progress
from shapecheck.tensorrt.build import build_engine
from shapecheck.tensorrt.profiles import Profile
from shapecheck.tensorrt.record import BuildOptions, Target
from shapecheck.version import __version__


class ExportCache:
    """The files of one live UNet in a folder, each made once."""

    def __init__(self, unet: nn.Module, folder: Path, progress: Progress) -> None:
        self._unet, self._folder, self._progress = unet, folder, progress

    @property
    def is_exported(self) -> bool:
        """Return whether the ONNX file is there, whole, from this call or an earlier one."""
        path = self._path
        try:
            is_there = path.is_file() and path.with_name(f"{path.name}.data").is_file()
            return is_there and contract_inside(OnnxFile(path)) is not None
        except ShapecheckError:  # damaged: it is exported again
            return False

    def export_onnx(self) -> Path:
        """Return the ONNX file, its weights beside it. Raises ShapecheckError if the UNet cannot be exported."""
        with lock_folder(self._folder):
            if not self.is_exported:
                export(self._unet, self._path, weights="copy", progress=self._progress)
        return self._path

    def build_engine(self, target: Target, profiles: Sequence[Profile]) -> Path:
        """Return the engine of the ONNX file. Raises ShapecheckError if TensorRT is missing or refuses it."""
        path, options = self.export_onnx(), BuildOptions(target=target)
        return build_engine(path, cache=self._folder, profiles=profiles, options=options, progress=self._progress).path

    @contextmanager
    def keep_engine(self, options: Mapping[str, str]) -> Iterator[Mapping[str, str]]:
        """Yield options with which ONNX Runtime's TensorRT provider builds an engine once, for a block that opens the session.

        By itself it takes an engine of other weights for that of the same graph, and a half-written one for a whole one. So
        each has a folder of its own, which is there only when it is whole.
        """
        makers = extras.list_versions(("onnxruntime", "onnxruntime-gpu"))
        made_for = json.dumps([makers, sorted(options.items())])
        digest = hashlib.sha256(made_for.encode()).hexdigest()
        with lock_folder(self._folder):
            kept = place = self._path.with_name(f"{self._path.stem}-{digest[:16]}.ort-trt")
            if not kept.is_dir():
                place = kept.with_suffix(".partial")
                shutil.rmtree(place, ignore_errors=True)  # of a process that was killed
                make_folder(place)
                for timings in self._folder.glob("*.ort-trt/*.timing"):  # of other weights and sizes: much is the same
                    shutil.copy(timings, place)
            enabled = {f"trt_{kind}_cache_enable": "1" for kind in ("engine", "timing")}
            yield {**options, **enabled, "trt_engine_cache_path": str(place), "trt_timing_cache_path": str(place)}
            if place != kept:
                place.rename(kept)

    @cached_property
    def _path(self) -> Path:
        """Name the file after all that it depends on: the modules and their settings, the weights, and what exports it."""
        subject = resolve_subject(self._unet)
        # A config holds no settings, such as FreeU's factors or an attention processor: they are attributes of modules.
        layers = [
            (
                name,
                type(module).__qualname__,
                {key: value for key, value in vars(module).items() if not key.startswith("_") and key != "training"},
            )
            for name, module in subject.module.named_modules()
        ]
        settings = json.dumps(layers, sort_keys=True, skipkeys=True, default=lambda value: type(value).__qualname__)
        weights_digest = weights.digest(subject.live or {}, lambda *sizes: self._progress("hashing the weights", *sizes))
        # Another release of any of these may export another graph.
        makers = [f"shapecheck {__version__}", *(f"{name} {version(name)}" for name in ("torch", "diffusers", "onnxscript"))]
        digest = hashlib.sha256("\n".join([settings, weights_digest, *makers]).encode()).hexdigest()
        return self._folder / f"unet-{digest[:16]}.onnx"
