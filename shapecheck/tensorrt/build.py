"""The build of an engine: profiles and graph are checked first, then TensorRT builds in a process of its own."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from shapecheck import doctor
from shapecheck.contract import Contract, ContractError, Mismatch, ShapecheckError
from shapecheck.contract.errors import one_line
from shapecheck.contract.json_codec import decode, encode
from shapecheck.contract.mismatch import Port
from shapecheck.contract.naming import torch_name
from shapecheck.doctor.environment import RTX_CAPABILITIES, RTX_NAMES
from shapecheck.files import atomic_write, ensure_writable, lock_folder, make_folder
from shapecheck.models import weights as checkpoints
from shapecheck.onnx.file import COMPUTATION_KEY, GRAPH_KEY, WEIGHTS_KEY, OnnxFile, digest_graph, file_digest
from shapecheck.progress import Progress, silent
from shapecheck.tensorrt.engine_tensors import DeclaredEngine, compare_engine
from shapecheck.tensorrt.graph_check import compare_graph, compare_profile, try_sizes
from shapecheck.tensorrt.process import EngineError, EngineProcess, has_driver
from shapecheck.tensorrt.profile_formats import MOST_PROFILES
from shapecheck.tensorrt.profiles import Profile, Range, find_profile_mismatches, profile_of, range_of
from shapecheck.tensorrt.record import (
    ENGINES,
    BuildOptions,
    BuildRequest,
    Built,
    Engine,
    read_engine,
    record_of,
    size_of_engine,
)
from shapecheck.tensorrt.source import Source, read_source


def build_engine(
    file: str | Path | Source,
    output: str | Path | None = None,
    *,
    profiles: Profile | Range | Sequence[Profile | Range],
    cache: str | Path | None = None,
    contract: Contract | None = None,
    options: BuildOptions | None = None,
    timing_cache: str | Path | None = None,
    force: bool = False,
    progress: Progress = silent,
) -> Built:
    """Build the engine of an ONNX file, or find it where it was built before.

    `profiles` are ranges of geometries, or profiles made of them, in the contract's names. `output` ends in .plan, .engine or
    .trt; without it `cache` is a folder in which engines are kept by everything that they depend on. `contract` is needed for
    a file that holds none. `timing_cache` is a file that TensorRT's timings are read from and added to; in a cache folder
    there is one by default. `force` builds even if the same engine is there unchanged.

    Beside the engine appears its record, `output` + `.shapecheck.json`. Both appear when they are whole.

    Raises ContractError with everything that is wrong if graph, profiles and contract disagree, before TensorRT is loaded;
    EngineError if TensorRT refuses the graph or cannot build it; ShapecheckError if files or TensorRT are missing.
    """
    options = options or BuildOptions()
    _refuse_options(options)
    target = _resolve_output(output, cache)
    source = file if isinstance(file, Source) else read_source(OnnxFile(file), contract, progress=progress)
    timings = Path(timing_cache) if timing_cache else Path(cache) / f"{options.target}.timings" if cache else None
    if timings is not None:
        _refuse_timing_cache(timings, source, target)
    requested = _make_profiles(source.contract, profiles)
    check(source, requested, progress)
    # By their bytes: the digest in the file's metadata may be older than the weights beside it.
    weights = checkpoints.digest(source.file.tensors, lambda *bytes_: progress("hashing the weights", *bytes_))
    with EngineProcess(options.target, progress) as process:
        ready = wait_until_ready(process, options)
        names, outputs = tuple(source.names.items()), tuple(tensor.name for tensor in source.file.reading.outputs)
        digests = source.file.digest, weights, one_line(source.file.metadata.get(WEIGHTS_KEY, ""))
        # By its own message (1.7.1) it builds for all of these if none is named.
        any_gpu = "every one that TensorRT for RTX supports, but 7.5"
        gpu = one_line(ready["gpu"]) or ", ".join(options.compute_capabilities) or any_gpu
        graph, computation = describe_origin(source.file, options)
        tensorrt = one_line(ready["tensorrt"])
        request = BuildRequest(source.contract, requested, names, outputs, *digests, options, tensorrt, gpu, graph, computation)
        Engine.from_json(Engine(request, "", 0).to_json())  # a record that could not be read again is refused before the build
        path = target or locate_in_cache(Path(cache or ""), source.file.path, request)
        progress(f"looking for {path}")
        if not force and (engine := find_built(path, request, progress)) is not None:
            return Built(path, engine, True, 0.0)
        return _build(process, source, request, path, timings)


def check(source: Source, profiles: Sequence[Profile], progress: Progress = silent) -> None:
    """Raise ContractError with everything that is wrong between graph, profiles and contract, or return in silence.

    Inputs of the graph have to be the contract's; every profile has to have exactly those inputs, all images of one range,
    in their dtypes, at sizes that the graph works at. Needs no TensorRT.
    """
    inputs = source.file.reading.inputs
    if shapeless := [tensor.name for tensor in inputs if tensor.dims is None]:
        raise ShapecheckError(f"no shape is declared for {', '.join(shapeless)}: TensorRT needs the rank of every input")
    if not profiles:
        raise ShapecheckError("no profile was given; give --sizes, such as --sizes 512x512:768x768:1024x1024")
    ports = [Port(tensor.name, tensor.dtype, tensor.dims) for tensor in inputs]
    mismatches = [*compare_graph(source.contract, ports, source.names)]
    for profile in profiles:
        mismatches += find_profile_mismatches(source.contract, profile)
        # A second fault of one input is mostly the first again, unless it is the dtype.
        known = {mismatch.where for mismatch in mismatches}
        dtypes = {mismatch.where for mismatch in mismatches if mismatch.kind == "dtype"}
        mismatches += [
            mismatch
            for mismatch in compare_profile(profile, ports, source.names)
            if mismatch.where not in (dtypes if mismatch.kind == "dtype" else known)
        ]
    for profile in () if mismatches else profiles:
        sizes = range_of(source.contract, profile)
        if mismatch := try_sizes(source.file.reading, source.contract, source.names, sizes, progress):
            mismatches.append(mismatch)
    if mismatches:
        subject = f"{source.file}: graph, profile and contract do not agree"
        raise ContractError(tuple(mismatches), subject=subject, contract=source.contract)


def read_back(path: Path, engine: Engine | None, progress: Progress = silent) -> DeclaredEngine:
    """Return what TensorRT shows of an engine; without a record it is taken for one of TensorRT that brings no code.

    Raises ShapecheckError without TensorRT, driver or GPU to load it here.
    """
    if not has_driver():
        raise ShapecheckError("no NVIDIA GPU and driver here to load it with")
    options = engine.request.options if engine is not None else BuildOptions()
    with EngineProcess(options.target, progress) as process:
        progress("loading TensorRT")
        process.receive("ready")
        process.send({"read": str(path.absolute()), "host_code": options.version_compatible})
        progress(f"loading {path}")
        declared: DeclaredEngine = decode(DeclaredEngine, process.receive("read"))
        return declared


def locate_in_cache(folder: Path, onnx: Path, request: BuildRequest) -> Path:
    """Return the file in a cache folder that holds the engine of this request."""
    stem = onnx.stem[:100]  # a file system takes names of 255 bytes
    return folder / f"{stem}-{request.key.removeprefix('sha256:')[:16]}.plan"


def find_built(path: Path, request: BuildRequest, progress: Progress = silent) -> Engine | None:
    """Return the engine in this file if it is the requested one, unchanged since it was built; else None."""
    try:
        engine = read_engine(path)
        if engine.request.key != request.key or size_of_engine(path) != engine.size:
            return None
        digest = file_digest(path, lambda *bytes_: progress(f"hashing {path}", *bytes_))
        return engine if digest == engine.digest else None
    except (ShapecheckError, OSError):  # no engine, no record, or one that cannot be read: build it
        return None


def describe_origin(file: OnnxFile, options: BuildOptions) -> tuple[str, str]:
    """Return the digest of a file's graph, and of what the model computes that it is of, by which an engine is refitted."""
    if not options.refittable:
        return "", ""
    graph = digest_graph(file.proto)
    is_unchanged = file.metadata.get(GRAPH_KEY) == graph  # no other tool rewrote it
    return graph, one_line(file.metadata.get(COMPUTATION_KEY, "")) if is_unchanged else ""


def _refuse_options(options: BuildOptions) -> None:
    if options.target == "rtx" and options.version_compatible:
        raise ShapecheckError("--version-compatible is for --target trt: TensorRT for RTX comes without the library it needs")
    for capability in options.compute_capabilities:
        if options.target != "rtx":
            raise ShapecheckError("--compute-capability is for --target rtx; TensorRT builds for the GPU it runs on")
        if not re.fullmatch(r"[0-9]{1,2}\.[0-9]", capability):
            raise ShapecheckError(f"--compute-capability: {capability!r:.40} is not a compute capability such as 8.9")
        if not capability.startswith(RTX_CAPABILITIES):
            raise ShapecheckError(f"--compute-capability {capability}: TensorRT for RTX builds for {RTX_NAMES}")


def _resolve_output(output: str | Path | None, cache: str | Path | None) -> Path | None:
    """Return the file of the engine, or None in a cache. Raises ShapecheckError if nothing can be written there."""
    if (output is None) == (cache is None):
        raise ShapecheckError("say where the engine goes: -o FILE.plan, or --cache FOLDER, and not both")
    if output is None:
        ensure_writable(make_folder(Path(cache or "")) / "engine.plan")
        return None
    path = Path(output).resolve() if Path(output).is_symlink() else Path(output)  # the record lies beside the file
    if path.suffix.lower() not in ENGINES:
        raise ShapecheckError(f"cannot write {path}: the name of an engine ends in {', '.join(ENGINES)}")
    _refuse_pipe(path)
    _refuse_pipe(record_of(path))
    return path


def _refuse_pipe(path: Path) -> None:
    """Raise ShapecheckError unless a regular file can be written here: nothing may wait for a pipe."""
    ensure_writable(path)
    if path.exists() and not path.is_file():
        raise ShapecheckError(f"cannot write {path}: it is a pipe or a device")


def _refuse_timing_cache(timings: Path, source: Source, target: Path | None) -> None:
    """Raise ShapecheckError if a timing cache would overwrite something else."""
    _refuse_pipe(timings)
    others = {source.file.path, *(tensor.file for tensor in source.file.external_tensors.values())}
    others |= {target, record_of(target)} if target else set()
    models = (".onnx", ".data", ".safetensors", ".bin", ".json", *ENGINES)
    if timings.suffix.lower() in models or timings.resolve() in {other.resolve() for other in others}:
        raise ShapecheckError(f"--timing-cache {timings}: that file is not a timing cache, and it would be overwritten")


def _make_profiles(contract: Contract, requested: Profile | Range | Sequence[Profile | Range]) -> tuple[Profile, ...]:
    several = (requested,) if isinstance(requested, (Profile, Range)) else tuple(requested)
    if strangers := [type(sizes).__name__ for sizes in several if not isinstance(sizes, (Profile, Range))]:
        raise ShapecheckError(f"profiles: expected Profile or Range, got {strangers[0]}; parse_ranges makes them from text")
    if len(several) > MOST_PROFILES:
        raise ShapecheckError(f"{len(several)} profiles; an engine has at most {MOST_PROFILES} here")
    return tuple(profile_of(contract, sizes) if isinstance(sizes, Range) else sizes for sizes in several)


def wait_until_ready(process: EngineProcess, options: BuildOptions, action: str = "build") -> Mapping[str, Any]:
    """Return TensorRT's release and GPU. Raises ShapecheckError with what to do if there is no TensorRT."""
    process.progress("loading TensorRT")
    try:
        return process.receive("ready")
    except EngineError as error:
        backend = doctor.backend(options.target)
        lines = [f"cannot {action} with --target {options.target}{':' if not backend.runs else f': {error}'}"]
        lines += [f"  {gap.problem}: {gap.fix}" for gap in backend.gaps if not backend.runs]
        if (options.target, action) == ("trt", "build"):
            lines.append("  or --target rtx: TensorRT for RTX builds without a GPU")
        raise ShapecheckError("\n".join(lines)) from error


def _build(process: EngineProcess, source: Source, request: BuildRequest, path: Path, timings: Path | None) -> Built:
    with ExitStack() as lock, atomic_write(record_of(path)) as beside, atomic_write(path) as partial:
        job = {
            "onnx": str(source.file.path.absolute()),
            "name": request.contract.digest,
            "profiles": encode([profile.renamed(request.engine_names) for profile in request.profiles]),
            "options": encode(request.options),
            "output": str(partial.absolute()),
            "timing_cache": str(timings.absolute()) if timings else None,
        }
        try:
            process.send(job)
            _check_network(source, request, process.receive("parsed"))
            process.send({})
            process.progress("building")
            seconds = process.receive("built")["seconds"]
            process.finish()  # and frees the memory of the GPU
            # TensorRT says this of a profile whose largest sizes no engine can run at, and builds all the same.
            if any("not self-consistent" in message for message in process.messages):
                raise EngineError("build", "TensorRT built for sizes that it cannot run at", tuple(process.messages))
        except EngineError as error:
            if error.stage == "write":
                raise ShapecheckError(f"cannot write {path}: {error}") from error
            raise _explain_failure(error, source, request.options) from error
        if file_digest(source.file.path) != request.onnx:
            raise ShapecheckError(f"{source.file} changed while the engine was built: build it again")
        engine = Engine(request, file_digest(partial), partial.stat().st_size)
        # TensorRT for RTX builds for GPUs that are not here.
        if request.options.target == "trt":
            declared = read_back(partial, engine, process.progress)
            if mismatches := compare_engine(request, declared):
                raise ContractError(mismatches, subject=f"{path} is not what was requested", contract=request.contract)
        beside.write_text(engine.to_json(), encoding="utf-8")
        lock.enter_context(lock_folder(path.parent))  # no other build comes between the engine and its record
    return Built(path, engine, False, seconds, tuple(process.messages))


def _check_network(source: Source, request: BuildRequest, parsed: Mapping[str, Any]) -> None:
    """Raise ContractError if TensorRT's parser made other inputs or outputs of the file than it declares."""
    ports = [Port(tensor["name"], torch_name(tensor["dtype"]), tuple(tensor["dims"])) for tensor in parsed["inputs"]]
    mismatches = compare_graph(source.contract, ports, source.names)
    outputs = tuple(tensor["name"] for tensor in parsed["outputs"])
    if sorted(outputs) != sorted(request.outputs):
        mismatches += (Mismatch("name", "the outputs", ", ".join(outputs), ", ".join(request.outputs)),)
    if mismatches:
        subject = f"TensorRT's parser reads a different graph from {source.file}"
        raise ContractError(mismatches, subject=subject, contract=source.contract)


def _explain_failure(error: EngineError, source: Source, options: BuildOptions) -> EngineError:
    """Return the same error in the contract's words, TensorRT's own kept below."""
    places = source.file.reading.places(source.contract, source.names)
    if error.errors:
        lines = [f"TensorRT's parser refuses {len(error.errors)} of the nodes of {source.file}:"]
        for refusal in error.errors:
            place = places.of_node(refusal.node)
            lines.append(f"  {one_line(refusal.operator)} {one_line(refusal.node)}{f' ({place})' if place else ''}:")
            lines.append(f"    {one_line(refusal.text, 500)}")
    else:
        lines = [f"TensorRT could not {'parse' if error.stage == 'parse' else 'build'} {source.file}:"]
        lines += [f"  {text}" for text in error.texts]
        lines += [f"  {name}: {place}" for name, place in places.named_in(" ".join(error.texts)).items()]
    if error.stage == "build" and options.target == "rtx" and options.refittable:
        lines.append("  refittable engines are compiled on the GPU they are for: TensorRT for RTX cannot build them elsewhere")
    return EngineError(error.stage, "\n".join(lines), (), error.errors)
