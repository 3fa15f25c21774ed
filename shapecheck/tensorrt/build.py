"""An ONNX file as an engine: profiles and graph checked first, then built in a process of its own, then written whole."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shapecheck import doctor
from shapecheck.contract import Contract, ContractError, Mismatch, ShapecheckError
from shapecheck.contract.errors import one_line
from shapecheck.contract.json_codec import decode, encode
from shapecheck.contract.mismatch import Port
from shapecheck.contract.naming import torch_name
from shapecheck.doctor.environment import RTX_CAPABILITIES
from shapecheck.files import locked, refuse_unwritable, whole
from shapecheck.models import weights as checkpoints
from shapecheck.onnx import contract_metadata
from shapecheck.onnx.file import WEIGHTS_KEY, OnnxFile, file_digest
from shapecheck.progress import Progress, silent
from shapecheck.tensorrt import graph_inputs, profile_check, size_trial
from shapecheck.tensorrt.engine_io import DeclaredEngine, differences
from shapecheck.tensorrt.process import EngineError, EngineProcess, has_driver
from shapecheck.tensorrt.profile_formats import MOST_PROFILES
from shapecheck.tensorrt.profiles import Profile, Range, profile_of, range_of
from shapecheck.tensorrt.record import ENGINES, BuildOptions, Built, Engine, Request, read_engine, record_of, size_of_engine

_DIGITS = 16


_LONGEST_STEM = 100


def place(folder: Path, onnx: Path, request: Request) -> Path:
    """Where the cache keeps the engine of this request."""
    return folder / f"{onnx.stem[:_LONGEST_STEM]}-{request.key.removeprefix('sha256:')[:_DIGITS]}.plan"


def find(path: Path, request: Request, progress: Callable[[int, int], object] = lambda done, total: None) -> Engine | None:
    """The engine in this file, if it is the one that is asked for, unchanged since it was built; else None."""
    try:
        engine = read_engine(path)
        if engine.request.key != request.key or size_of_engine(path) != engine.size:
            return None
        return engine if file_digest(path, progress) == engine.digest else None
    except (ShapecheckError, OSError):  # no engine, no record, or one that cannot be read: build it
        return None


_NO_TIMINGS = (".onnx", ".data", ".safetensors", ".bin", ".json", *ENGINES)
"""How no timing cache's name ends."""


_IMPOSSIBLE = "not self-consistent"
"""What TensorRT says of a profile whose largest sizes no engine can run at, and then builds."""


_LONGEST = 500
"""Characters of one of TensorRT's own messages."""


_ANY_GPU = "every one that TensorRT for RTX supports, but 7.5"
"""What it builds for where no compute capability is named, by its own message (1.7.1)."""


@dataclass(frozen=True, slots=True)
class Source:
    """The ONNX file an engine is made from, with what it is known to be."""

    file: OnnxFile
    contract: Contract
    names: Mapping[str, str]
    """From the contract's name of an input to the file's."""


def source_of(
    file: OnnxFile, contract: Contract | None = None, names: Mapping[str, str] | None = None, progress: Progress = silent
) -> Source:
    """Read an ONNX file to build from. `names` says what it calls each input; by default as the naming scheme in it does.

    Raises ShapecheckError where it is no ONNX file, or holds no contract and none is given.
    """
    progress(f"reading {file}")
    inputs = file.reading.inputs
    known = contract or contract_metadata.contract_inside(file)
    if known is None:
        raise ShapecheckError(f"{file} holds no contract: say which UNet it is with --model, or contract= from Python")
    known = contract_metadata.make_printable(known)
    called = names or known.match_names([tensor.name for tensor in inputs])
    return Source(file, known, {name: called.get(name, name) for name in known.input_rules})


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
    .trt; without it `cache` is a folder in which engines are kept by all that they depend on. `contract` is needed for a file
    that holds none. `timing_cache` is a file that TensorRT's timings are read from and added to; in a cache folder there is
    one by default. `force` builds even what is there unchanged.

    Beside the engine appears its record, `output` + `.shapecheck.json`. Both appear when they are whole.

    Raises ContractError with everything that is wrong where graph, profiles and contract disagree, before TensorRT is loaded;
    EngineError where TensorRT refuses the graph or cannot build it; ShapecheckError where files or TensorRT are missing.
    """
    options = _checked(options or BuildOptions())
    target = _target(output, cache)
    source = file if isinstance(file, Source) else source_of(OnnxFile(file), contract, progress=progress)
    timings = Path(timing_cache) if timing_cache else Path(cache) / f"{options.target}.timings" if cache else None
    if timings is not None:
        _refuse_as_timings(timings, source, target)
    wanted = _made(source.contract, profiles)
    check(source, wanted, progress)
    digests = _digests(source, progress)
    with EngineProcess(options.target, progress) as process:
        ready = _ready(process, options)
        outputs = tuple(each.name for each in source.file.reading.outputs)
        gpu = one_line(ready["gpu"]) or ", ".join(options.compute_capabilities) or _ANY_GPU
        release = one_line(ready["tensorrt"])
        request = Request(
            source.contract, wanted, tuple(source.names.items()), outputs, **digests, options=options, tensorrt=release, gpu=gpu
        )
        Engine.from_json(Engine(request, "", 0).to_json())  # what could not be read again is told before it is built
        path = target or place(Path(cache or ""), source.file.path, request)
        progress(f"looking for {path}")
        hashing = lambda *bytes_: progress(f"hashing {path}", *bytes_)  # noqa: E731
        if not force and (engine := find(path, request, hashing)) is not None:
            return Built(path, engine, True, 0.0)
        return _build(process, source, request, path, timings, progress)


def check(source: Source, profiles: Sequence[Profile], progress: Progress = silent) -> None:
    """Raise ContractError with everything that is wrong between graph, profiles and contract, or return in silence.

    Needs no TensorRT: inputs of the graph as in the contract; every profile with exactly those inputs, all images of one
    range; dtypes; and sizes at which the graph works.
    """
    declared = graph_inputs.ports_of(source.file.reading.inputs)
    found: list[Mismatch] = [*graph_inputs.mismatches(source.contract, declared, source.names)]
    for profile in profiles:
        found += profile_check.mismatches(source.contract, profile)
        found += [each for each in graph_inputs.profile_mismatches(profile, declared, source.names) if _is_new(each, found)]
    for profile in () if found else profiles:
        sizes = range_of(source.contract, profile)
        wrong = size_trial.refusal(source.file.reading, source.contract, source.names, sizes, progress)
        found += [wrong] if wrong else []
    if not profiles:
        raise ShapecheckError("no profile was given; give --sizes, such as --sizes 512x512:768x768:1024x1024")
    if found:
        raise ContractError(
            tuple(found), subject=f"{source.file}: graph, profile and contract do not agree", contract=source.contract
        )


def read_back(path: Path, engine: Engine, progress: Progress = silent) -> DeclaredEngine:
    """What TensorRT shows of an engine. Raises ShapecheckError where it cannot be loaded here: no TensorRT, driver or GPU."""
    if not has_driver():
        raise ShapecheckError("no NVIDIA GPU and driver here to load it with")
    with EngineProcess(engine.request.options.target, progress) as process:
        progress("loading TensorRT")
        process.hear("ready")
        process.say({"read": str(path.absolute()), "host_code": engine.request.options.version_compatible})
        progress(f"loading {path}")
        declared: DeclaredEngine = decode(DeclaredEngine, process.hear("read"))
        return declared


def _is_new(each: Mismatch, found: Sequence[Mismatch]) -> bool:
    """Whether it says more than what is known of an input: a second fault of one input is mostly the first again."""
    return all(each.where != other.where or (each.kind == "dtype" != other.kind) for other in found)


def _made(contract: Contract, given: Profile | Range | Sequence[Profile | Range]) -> tuple[Profile, ...]:
    """The profiles that are asked for, ranges made into profiles. Raises ShapecheckError where they are something else."""
    several = (given,) if isinstance(given, (Profile, Range)) else tuple(given)
    if strange := [type(each).__name__ for each in several if not isinstance(each, (Profile, Range))]:
        raise ShapecheckError(f"profiles= takes Profile or Range, not {strange[0]}; parse_ranges makes them of texts")
    if len(several) > MOST_PROFILES:
        raise ShapecheckError(f"{len(several)} profiles; an engine has at most {MOST_PROFILES} here")
    return tuple(profile_of(contract, each) if isinstance(each, Range) else each for each in several)


def _checked(options: BuildOptions) -> BuildOptions:
    """Raise ShapecheckError for options that no build can keep."""
    if options.target == "rtx" and options.version_compatible:
        raise ShapecheckError("--version-compatible is for --target trt: TensorRT for RTX comes without the library it needs")
    for each in options.compute_capabilities:
        if options.target != "rtx":
            raise ShapecheckError("--compute-capability is for --target rtx; TensorRT builds for the GPU it runs on")
        if not re.fullmatch(r"[0-9]{1,2}\.[0-9]", each):
            raise ShapecheckError(f"--compute-capability: {each!r:.40} is no compute capability such as 8.9")
        if not each.startswith(RTX_CAPABILITIES):
            known = ", ".join(f"{one}x" if one.endswith(".") else one for one in RTX_CAPABILITIES)
            raise ShapecheckError(f"--compute-capability {each}: TensorRT for RTX builds for {known}")
    return options


def _target(output: str | Path | None, cache: str | Path | None) -> Path | None:
    """Where the engine goes, if that is known before the build. Raises ShapecheckError where nothing can be written there."""
    if (output is None) == (cache is None):
        raise ShapecheckError("say where the engine goes: -o FILE.plan, or --cache FOLDER, and not both")
    if output is None:
        try:
            Path(cache or "").mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ShapecheckError(f"cannot write to {cache}: {error.strerror or error}") from None
        refuse_unwritable(Path(cache or "") / "engine.plan")
        return None
    path = Path(output).resolve() if Path(output).is_symlink() else Path(output)  # the record lies beside the file
    if path.suffix.lower() not in ENGINES:
        raise ShapecheckError(f"cannot write {path}: the name of an engine ends in {', '.join(ENGINES)}")
    _refuse_unfit(path)
    _refuse_unfit(record_of(path))
    return path


def _refuse_unfit(path: Path) -> None:
    """Raise ShapecheckError unless a regular file can be written here: nothing may wait for a pipe."""
    refuse_unwritable(path)
    if path.exists() and not path.is_file():
        raise ShapecheckError(f"cannot write {path}: it is a pipe or a device")


def _refuse_as_timings(timings: Path, source: Source, target: Path | None) -> None:
    """Raise ShapecheckError where a timing cache would be written over something else."""
    _refuse_unfit(timings)
    others = {source.file.path, *(each.file for each in source.file.external_tensors.values())}
    others |= {target, record_of(target)} if target else set()
    if timings.suffix.lower() in _NO_TIMINGS or timings.resolve() in {each.resolve() for each in others}:
        raise ShapecheckError(f"--timing-cache {timings}: that is another file's name, and it would be written over")


def _digests(source: Source, progress: Progress) -> dict[str, str]:
    """What the file and its weights are, by their bytes: what its metadata says may be older than the weights beside it."""
    weights = checkpoints.digest(source.file.tensors, lambda *bytes_: progress("hashing the weights", *bytes_))
    checkpoint = one_line(source.file.metadata.get(WEIGHTS_KEY, ""))
    return {"onnx": source.file.digest, "weights": weights, "checkpoint": checkpoint}


def _ready(process: EngineProcess, options: BuildOptions) -> Mapping[str, Any]:
    """What TensorRT there is. Raises ShapecheckError with what to do where there is none."""
    process.progress("loading TensorRT")
    try:
        return process.hear("ready")
    except EngineError as error:
        known = doctor.backend(options.target)
        lines = [f"cannot build with --target {options.target}{':' if not known.runs else f': {error}'}"]
        lines += [f"  {gap.problem}: {gap.fix}" for gap in known.gaps if not known.runs]
        lines += ["  or --target rtx: TensorRT for RTX builds without a GPU"] if options.target == "trt" else []
        raise ShapecheckError("\n".join(lines)) from error


def _build(
    process: EngineProcess, source: Source, request: Request, path: Path, timings: Path | None, progress: Progress
) -> Built:
    with ExitStack() as lock, whole(record_of(path)) as beside, whole(path) as partial:
        try:
            process.say(_job(source, request, partial, timings))
            _check_network(source, request, process.hear("parsed"))
            process.say({})
            progress("building")
            done = process.hear("built")
            process.finish()  # and gives the memory of the GPU back
            if any(_IMPOSSIBLE in message for message in process.messages):
                raise EngineError("build", "TensorRT built for sizes that it cannot run at", tuple(process.messages))
        except EngineError as error:
            if error.stage == "write":
                raise ShapecheckError(f"cannot write {path}: {error}") from error
            raise _told(error, source, request.options) from error
        engine = Engine(request, file_digest(partial), partial.stat().st_size)
        if request.options.target == "trt":  # the other builds for GPUs that are not here
            _check_built(partial, engine, path, progress)
        beside.write_text(engine.to_json(), encoding="utf-8")
        lock.enter_context(locked(path.parent))  # no other build comes between the engine and its record
    return Built(path, engine, False, done["seconds"], tuple(process.messages))


def _job(source: Source, request: Request, partial: Path, timings: Path | None) -> dict[str, Any]:
    return {
        "onnx": str(source.file.path.absolute()),
        "name": request.contract.digest,
        "profiles": encode([profile.renamed(request.engine_names) for profile in request.profiles]),
        "options": encode(request.options),
        "output": str(partial.absolute()),
        "timing_cache": str(timings.absolute()) if timings else None,
    }


def _check_network(source: Source, request: Request, parsed: Mapping[str, Any]) -> None:
    """Raise ContractError where TensorRT's parser made other inputs or outputs of the file than it declares."""
    seen = [Port(each["name"], torch_name(each["dtype"]), tuple(each["dims"])) for each in parsed["inputs"]]
    found = graph_inputs.mismatches(source.contract, seen, source.names)
    outputs = tuple(each["name"] for each in parsed["outputs"])
    if sorted(outputs) != sorted(request.outputs):
        found += (Mismatch("name", "the outputs", ", ".join(outputs), ", ".join(request.outputs)),)
    if found:
        raise ContractError(found, subject=f"TensorRT's parser reads {source.file} otherwise", contract=source.contract)


def _check_built(partial: Path, engine: Engine, path: Path, progress: Progress) -> None:
    """Raise ContractError where the engine that was built is not what was asked for."""
    if found := differences(engine.request, read_back(partial, engine, progress)):
        raise ContractError(found, subject=f"{path} came out otherwise than asked for", contract=engine.request.contract)


def _told(error: EngineError, source: Source, options: BuildOptions) -> EngineError:
    """The same error in the contract's words, TensorRT's own kept below."""
    places = source.file.reading.places(source.contract, source.names)
    if error.errors:
        lines = [f"TensorRT's parser refuses {len(error.errors)} of the nodes of {source.file}:"]
        for each in error.errors:
            place = places.of_node(each.node)
            lines.append(f"  {one_line(each.operator)} {one_line(each.node)}{f' ({place})' if place else ''}:")
            lines.append(f"    {one_line(each.text, _LONGEST)}")
    else:
        lines = [f"TensorRT could not {'parse' if error.stage == 'parse' else 'build'} {source.file}:"]
        lines += [f"  {text}" for text in error.texts]
        lines += [f"  {name}: {place}" for name, place in places.named_in(" ".join(error.texts)).items()]
    if error.stage == "build" and options.target == "rtx" and options.refittable:
        lines.append("  refittable engines are compiled on the GPU they are for: elsewhere TensorRT for RTX builds none")
    return EngineError(error.stage, "\n".join(lines), (), error.errors)
