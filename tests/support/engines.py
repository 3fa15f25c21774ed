"""Engines for tests: small real UNets as ONNX files that hold their contract, to be built by TensorRT for RTX without a GPU."""

from __future__ import annotations

import hashlib
import json
import math
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import onnx
import onnx_files
from artefacts import identify, make_once
from diffusers import ControlNetModel
from small import unet
from torch import device, nn

from shapecheck import Contract, Geometry, probe
from shapecheck.onnx.file import CONTRACT_KEY
from shapecheck.progress import Progress
from shapecheck.tensorrt.build import build_engine
from shapecheck.tensorrt.process import EngineError
from shapecheck.tensorrt.profiles import Range
from shapecheck.tensorrt.record import BuildOptions, BuildRequest, Engine, record_of

RTX = BuildOptions("rtx", compute_capabilities=("8.9",))
SIZES = Range(Geometry(1, 8, 9), Geometry(2, 17, 25), Geometry(3, 33, 41))


def exported(path: Path, config: dict, *, latent: tuple[int, int] = (17, 25), **options: bool) -> tuple[Path, Contract]:
    """A small real UNet as one ONNX file with its weights and contract inside; in a second, where `export` takes ten."""
    path, contract = onnx_files.exported(path, config, latent=latent, **options)
    return sealed(path, contract), contract


def export_sealed(unet: nn.Module, *, latent: tuple[int, int] = (9, 13)) -> Path:
    """Return the ONNX file of a live UNet with its contract inside, made once a run. Who changes it changes a copy."""

    def make(folder: Path) -> None:
        sealed(*onnx_files.written(folder / "unet.onnx", unet, latent=latent))

    return make_once({"sealed": True, "latent": latent, **identify(unet)}, make) / "unet.onnx"


def exported_quickly(unet: nn.Module, path: Path, *, weights: str, progress: object) -> None:
    """Stands in for `export` at 9×13 cells, which takes a minute: torch's older exporter, an empty file of data."""
    assert weights == "copy"
    model = getattr(unet, "_orig_mod", unet)
    if isinstance(model, ControlNetModel):
        onnx_files.controlnet_written(path, model, latent=(9, 13))
    else:
        shutil.copyfile(export_sealed(model), path)
    path.with_name(f"{path.name}.data").touch()


def sealed(path: Path, contract: Contract) -> Path:
    """Write the contract into an ONNX file."""
    model = onnx.load(path)
    model.metadata_props.add(key=CONTRACT_KEY, value=contract.to_json())
    onnx.save(model, path)
    return path


def built(folder: Path, config: Mapping[str, Any], sizes: Sequence[Range] = (SIZES,)) -> tuple[Path, Contract]:
    """Copy to a folder `unet.onnx`, `unet.plan`, its record and `timings`, of a small UNet: built once a run.

    Return the engine and its contract.
    """

    def build(made: Path) -> None:
        file, contract = exported(made / "unet.onnx", dict(config))
        (made / "contract.json").write_text(contract.to_json(), encoding="utf-8")
        build_engine(file, made / "unet.plan", profiles=list(sizes), options=RTX, timing_cache=made / "timings")

    ranges = [[repr(geometry) for geometry in each.geometries] for each in sizes]
    made = make_once({"builder": "TensorRT for RTX", "config": config, "sizes": ranges}, build)
    for name in ("unet.onnx", "unet.plan", record_of(Path("unet.plan")).name, "timings"):
        shutil.copyfile(made / name, folder / name)
    return folder / "unet.plan", Contract.from_json((made / "contract.json").read_text(encoding="utf-8"))


def drawn(path: Path, config: Mapping[str, Any]) -> tuple[Path, Contract]:
    """Draw the plan of a UNet with weights of zeros and its contract inside: followed in no time, and never to be computed."""
    with device("meta"):
        contract = probe(unet(**config))
    model = onnx.load(onnx_files.plan(path, contract, inside=True), load_external_data=False)
    for tensor in model.graph.initializer:
        if tensor.external_data:
            tensor.ClearField("external_data")
            tensor.data_location = onnx.TensorProto.DEFAULT
            tensor.raw_data = bytes(4 * math.prod(tensor.dims))
    onnx.save(model, path)
    return path, contract


def recorded(path: Path, request: BuildRequest, content: bytes = b"an engine") -> Path:
    """Write a file that no TensorRT made and a sound record of it, as of an engine that this request came to."""
    path.write_bytes(content)
    engine = Engine(request, f"sha256:{hashlib.sha256(content).hexdigest()}", len(content))
    record_of(path).write_text(engine.to_json(), encoding="utf-8")
    return path


@dataclass(slots=True)
class ScriptedTensorRT:
    """Stands in for `shapecheck.tensorrt.build.EngineProcess`: reads the inputs that a file declares, builds its digest.

    What TensorRT itself does is not tested with it, but all that is done before, between and after.
    """

    alter: Callable[[dict[str, Any]], object] = lambda parsed: None
    """Changes what the parser tells: `inputs` and `outputs`."""
    failure: EngineError | None = None
    """What the parser raises where its stage is `parse`, else the builder."""
    words: tuple[str, ...] = ()
    """What is said while it builds."""
    jobs: list[dict[str, Any]] = field(default_factory=list)
    """What was asked of it, in order; what was found in a cache is not."""

    def __call__(self, target: str, progress: Progress) -> _ScriptedProcess:
        return _ScriptedProcess(self, progress)


@dataclass(slots=True)
class _ScriptedProcess:
    script: ScriptedTensorRT
    progress: Progress
    messages: list[str] = field(default_factory=list)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def send(self, job: dict[str, Any]) -> None:
        self.script.jobs += [job] if job else []

    def receive(self, event: str) -> dict[str, Any]:
        if event == "ready":
            return {"tensorrt": "1.7.1", "gpu": ""}
        job, failure = self.script.jobs[-1], self.script.failure
        if event == "refitted":
            return self._refit(job, failure)
        if failure is not None and (failure.stage == "parse") == (event == "parsed"):
            raise failure
        if event == "parsed":
            graph = onnx.load(job["onnx"], load_external_data=False).graph
            parsed = {"inputs": list(map(_parse, graph.input)), "outputs": list(map(_parse, graph.output))}
            self.script.alter(parsed)
            return parsed
        assert event == "built"
        self.messages += self.script.words
        asked = json.dumps([job["profiles"], job["options"]]).encode()
        digest = hashlib.sha256(Path(job["onnx"]).read_bytes() + asked).hexdigest()
        Path(job["output"]).write_text(f"{job['name']} {digest}", encoding="utf-8")
        return {"seconds": 0.5}

    def _refit(self, job: dict[str, Any], failure: EngineError | None) -> dict[str, Any]:
        """Write what was in the engine before its weights, and a digest of the bytes that it is told to take now."""
        if failure is not None:
            raise failure
        digest = hashlib.sha256()
        for name, (file, offset, shape, dtype) in sorted(job["weights"].items()):
            nbytes = math.prod(shape) * {"float32": 4, "float16": 2}[dtype]
            digest.update(f"{name} {shape} {dtype}".encode() + Path(file).read_bytes()[offset : offset + nbytes])
        kept = Path(job["refit"]).read_text(encoding="utf-8").partition(" refitted ")[0]
        Path(job["output"]).write_text(f"{kept} refitted {digest.hexdigest()}", encoding="utf-8")
        return {"seconds": 0.25}

    def finish(self) -> None:
        pass


def _parse(value: onnx.ValueInfoProto) -> dict[str, Any]:
    """An input or output as TensorRT's parser tells of it."""
    tensor = value.type.tensor_type
    words = {onnx.TensorProto.FLOAT: "FLOAT", onnx.TensorProto.FLOAT16: "HALF", onnx.TensorProto.INT64: "INT64"}
    dims = [axis.dim_param or axis.dim_value for axis in tensor.shape.dim]
    return {"name": value.name, "dtype": words[tensor.elem_type], "dims": dims}
