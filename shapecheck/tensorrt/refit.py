"""Exchange the weights of an engine that was built refittable for those of an ONNX file or a model: nothing is built again."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

from torch import nn

from shapecheck.contract import ShapecheckError
from shapecheck.contract.errors import one_line
from shapecheck.files import atomic_write, ensure_writable, lock_folder
from shapecheck.models import weights as checkpoints
from shapecheck.models.adapters import LiveTensor
from shapecheck.models.safetensors import TensorLocation
from shapecheck.models.weights import Embedded
from shapecheck.observe.subject import resolve_subject
from shapecheck.onnx.file import WEIGHTS_KEY, OnnxFile, file_digest
from shapecheck.onnx.rebind import require_same_computation
from shapecheck.progress import Progress, silent
from shapecheck.tensorrt.build import describe_origin, locate_in_cache, wait_until_ready
from shapecheck.tensorrt.process import EngineError, EngineProcess
from shapecheck.tensorrt.record import ENGINES, BuildRequest, Built, Engine, read_engine, record_of

Locations = Mapping[str, TensorLocation]


def refit(
    engine: str | Path,
    model: str | Path | nn.Module,
    output: str | Path | None = None,
    *,
    cache: str | Path | None = None,
    variant: str | None = None,
    offline: bool = False,
    progress: Progress = silent,
) -> Built:
    """Write an engine with the weights of `model`, from one that was built with `refittable`: in seconds, nothing is built.

    `model` is an ONNX file with the graph that the engine was built from, such as one that was rebound; or what `rebind`
    takes: a folder, or a live model with other LoRAs. `output` is by default the engine itself; a session that has it open
    goes on with the old weights. With `cache` it is the file in that folder in which `build_engine` finds the engine of that
    ONNX file. The record is written with it, and both appear when they are whole. Needs the GPU that the engine was built for,
    and the same TensorRT.

    Raises ShapecheckError, with nothing changed, if the engine is not refittable or not what its record says, the graph is
    another, or TensorRT folded a weight into something else; EngineError if TensorRT does not load or refit the engine.
    """
    path = Path(engine)
    path = path.resolve() if path.is_symlink() else path
    target, built = Path(output) if output is not None else path, read_engine(path)
    if target.suffix.lower() not in ENGINES:
        raise ShapecheckError(f"cannot write {target}: the name of an engine ends in {', '.join(ENGINES)}")
    ensure_writable(target)
    if not built.request.options.refittable:
        raise ShapecheckError(f"{path} was not built to be refitted: build it again, with --refittable")
    with _locate_weights(model, built.request, target, variant, offline, progress) as (weights, request):
        if file_digest(path, lambda *bytes_: progress(f"hashing {path}", *bytes_)) != built.digest:
            raise ShapecheckError(f"{path} is not the engine of its record; copy both together, or build again")
        if cache is not None:
            target = locate_in_cache(Path(cache), Path(str(model)), request)
        return _refit(path, built, request, target, weights, progress)


@contextmanager
def _locate_weights(
    model: str | Path | nn.Module, request: BuildRequest, target: Path, variant: str | None, offline: bool, progress: Progress
) -> Iterator[tuple[Locations, BuildRequest]]:
    """Yield the new weights by the names that the engine knows them by, and the request that the engine then answers."""
    hashed = lambda *bytes_: progress("hashing the weights", *bytes_)  # noqa: E731
    with ExitStack() as stack:
        if not isinstance(model, nn.Module) and Path(model).suffix.lower() == ".onnx":
            file = OnnxFile(model)
            graph, computation = describe_origin(file, request.options)
            if graph != request.graph:
                raise ShapecheckError(
                    f"{file} is not the graph that the engine was built from, with other weights: build an engine of it"
                )
            tensors: Mapping[str, TensorLocation | Embedded | LiveTensor] = file.tensors
            dtype: str | None = None
            checkpoint: str | None = one_line(file.metadata.get(WEIGHTS_KEY, ""))
            onnx = file.digest
        else:
            subject = resolve_subject(model, variant=variant, offline=offline)
            require_same_computation(subject, request.contract, request.computation, "the engine")
            if subject.live is None and subject.stored is None:
                raise ShapecheckError(f"no weights for {subject.name}: {subject.absent}; give a folder that holds them")
            tensors = subject.tensors(list(subject.module.state_dict()), linked=False)
            dtype, checkpoint, onnx, computation = request.contract.dtype, None, request.onnx, request.computation
        located = {name: value for name, value in tensors.items() if isinstance(value, TensorLocation)}
        if len(located) < len(tensors) or any(dtype not in (None, value.dtype) for value in located.values()):
            # TensorRT's process reads files: what lies in memory, or in another precision, is written to one for as long.
            folder = stack.enter_context(TemporaryDirectory(prefix=".shapecheck.", dir=target.parent))
            copied = lambda *bytes_: progress("copying the weights", *bytes_)  # noqa: E731
            located = checkpoints.copy_tensors(tensors, dtype, Path(folder) / "weights", copied)
        identity = checkpoints.digest(located, hashed)
        if checkpoint is None:  # LoRAs are merged once: what was written has its digest, unless it is in another precision
            dtypes = {str(value.dtype).removeprefix("torch.") for value in tensors.values()}
            checkpoint = identity if dtypes == {dtype} else checkpoints.digest(tensors, hashed)
        yield located, replace(request, onnx=onnx, weights=identity, checkpoint=checkpoint, computation=computation)


def _refit(path: Path, built: Engine, request: BuildRequest, target: Path, weights: Locations, progress: Progress) -> Built:
    options = request.options
    with EngineProcess(options.target, progress) as process:
        wait_until_ready(process, options, "refit")
        with ExitStack() as lock, atomic_write(record_of(target)) as beside, atomic_write(target) as partial:
            places = {name: (str(at.file.absolute()), at.offset, at.shape, at.dtype) for name, at in weights.items()}
            job = {"refit": str(path.absolute()), "weights": places, "output": str(partial.absolute())}
            progress("refitting")
            try:
                process.send(job | {"host_code": options.version_compatible})
                seconds = process.receive("refitted")["seconds"]
                process.finish()
            except EngineError as error:
                if error.stage == "write":
                    raise ShapecheckError(f"cannot write {target}: {error}") from error
                lines = [f"TensorRT cannot refit {path}:", *(f"  {text}" for text in error.texts)]
                lines.append("  build it again from the rebound ONNX file, with --refittable")
                raise EngineError(error.stage, "\n".join(lines), ()) from error
            engine = Engine(request, file_digest(partial), partial.stat().st_size)
            beside.write_text(engine.to_json(), encoding="utf-8")
            lock.enter_context(lock_folder(target.parent))  # nothing comes between the engine and its record
    return Built(target, engine, False, seconds, tuple(process.messages))
