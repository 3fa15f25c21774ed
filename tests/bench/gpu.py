"""Everything of reports/gpu.md, measured on this machine's GPU: `python tests/bench/gpu.py -o reports/gpu.md`.

Models have random weights at the presets' real sizes and are made on the GPU. What was measured is written to a JSON file
beside the page after every part, and read again by the next run on the same machine, so that parts may be measured one by one:

  python tests/bench/gpu.py --models sd15 --parts latency --backends torch,torch-reduce-overhead,torch-compile -o reports/gpu.md
  python tests/bench/gpu.py --models sd15 --parts prepare --engines /tmp/engines -o reports/gpu.md      # exports and builds
  python tests/bench/gpu.py --models sd15 --parts latency,limit,parity --engines /tmp/engines -o reports/gpu.md
  python tests/bench/gpu.py --render reports/gpu.json -o reports/gpu.md                                  # needs no GPU

FOLDER of --engines holds, for each model, unet/ and controlnet/ (diffusers' folders), unet.onnx, controlnet.onnx, unet.plan and
controlnet.plan; part `prepare` makes what is missing. --cache keeps what torch.compile compiled. --seconds bounds each part.
"""

from __future__ import annotations

import argparse
import copy
import inspect
import json
import logging
import math
import os
import platform
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import date
from pathlib import Path
from typing import Any

import gpu_page

from shapecheck.report.numbers import dump_json

ROOT = Path(__file__).parents[2]
PARTS = ("prepare", "latency", "limit", "parity")
PACKAGES = (
    "torch",
    "diffusers",
    "transformers",
    "onnxruntime",
    "onnxruntime-gpu",
    "tensorrt",
    "tensorrt-cu12-bindings",
    "triton",
)
FRAMES = 50
TIMES_OWN = 4.0
"""As parity allows by default."""
STARTED = time.monotonic()


@dataclass(frozen=True)
class Model:
    """A preset at one size; a picture has so many steps."""

    name: str
    size_px: int
    batch: int
    steps: int


MODELS = {model.name: model for model in (Model("sd15", 512, 2, 20), Model("sd-turbo", 512, 1, 1), Model("sdxl", 1024, 1, 20))}


def say(text: str) -> None:
    print(f"[{time.monotonic() - STARTED:6.1f} s] {text}", flush=True)


class Deadline:
    """The end of a part: what is too long is interrupted once, and nothing long begins after that."""

    def __init__(self, seconds: float) -> None:
        self._end = time.monotonic() + seconds

    @property
    def left(self) -> float:
        return max(0.0, self._end - time.monotonic())

    def require(self) -> None:
        if not self.left > 0:
            raise TimeoutError("not begun: the time for this part was up (--seconds)")

    @contextmanager
    def interrupt(self) -> Iterator[None]:
        def stop(*_: object) -> None:
            raise TimeoutError("interrupted: the time for this part was up (--seconds)")

        self.require()
        before = signal.signal(signal.SIGALRM, stop)
        signal.setitimer(signal.ITIMER_REAL, self.left)
        try:
            yield
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, before)


class Lab:
    """One model on the GPU, its files, and what all parts need."""

    def __init__(self, model: Model, contract: Any, options: argparse.Namespace) -> None:
        import torch

        from shapecheck import Geometry
        from shapecheck.pipelines.frame import FrameMaker
        from shapecheck.runtime.load import load

        self.model, self.contract, self.options = model, contract, options
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.geometry = Geometry.from_px(model.size_px, model.size_px, batch=model.batch, vae_factor=contract.header.vae_factor)
        self.folder = Path(options.engines) / model.name if options.engines else None
        self.cache = Path(options.cache)
        # as a loop that wants speed loads them: nothing waits for the image, no output is copied
        self.settings: dict[str, Any] = {"finite": False, "own_outputs": False, "graphs": True}
        if "cache" in inspect.signature(load).parameters:
            self.settings["cache"] = self.cache
        self.maker = FrameMaker(contract, self.geometry, self.device, [None])

    def find_file(self, name: str) -> Path | None:
        path = self.folder / name if self.folder else None
        return path if path is not None and path.exists() else None

    def build_modules(self, dtype: Any) -> list[Any]:
        """Return UNet and ControlNet in eager PyTorch: those in the folder, from which its files were made, else new ones."""
        from shapecheck.observe.subject import TorchModel

        folders = [self.find_file(role) for role in ("unet", "controlnet")]
        if all(folders):
            precision = str(dtype).removeprefix("torch.")
            return [TorchModel(str(folder)).load(precision).to(self.device).requires_grad_(False) for folder in folders]
        return [module.to(dtype) for module in (self.maker.build_unet(), *self.maker.build_controlnets())]

    def make_loader(self, suffix: str) -> Any:
        """Return what loads the models of this suffix, .onnx or .plan, and the UNet's file."""
        from shapecheck.artefact import read_contract
        from shapecheck.pipelines.frame_loading import Loader

        unet, net = self.find_file(f"unet{suffix}"), self.find_file(f"controlnet{suffix}")
        nets = [read_contract(net)] if net else [None]
        files = [str(net)] if net else []
        return Loader(str(unet), self.contract, self.geometry, self.device, files, nets, self.settings)


def build_lab(name: str, options: argparse.Namespace) -> Lab:
    from shapecheck.observe.subject import resolve_subject

    return Lab(MODELS[name], resolve_subject(name).contract("float16", control=True), options)


# prepare: exports, engines


def run_child(arguments: list[str], deadline: Deadline, **environment: str) -> dict[str, Any]:
    """Run a process; return its seconds, what it printed last, and the reason if it failed."""
    start = time.monotonic()
    say(f"running {' '.join(arguments)}"[:200])
    paths = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    try:
        done = subprocess.run(
            [sys.executable, *arguments],
            capture_output=True,
            text=True,
            timeout=max(1.0, deadline.left),
            env=os.environ | {"PYTHONPATH": paths} | environment,
            check=False,
        )
        reason = "" if done.returncode == 0 else " ".join(done.stderr.split())[-400:] or f"exit status {done.returncode}"
        output = done.stdout.strip()
    except subprocess.TimeoutExpired:
        reason, output = f"not done after {time.monotonic() - start:.0f} s", ""
    return {"seconds": time.monotonic() - start, "reason": reason, "output": output}


def prepare(lab: Lab, record: Callable[[dict[str, Any]], None], deadline: Deadline) -> dict[str, Any]:
    """Save the models, export both side by side, build their engines one after the other or at once, and find these again."""
    from concurrent.futures import ThreadPoolExecutor

    folder, model = lab.folder, lab.model
    if folder is None:
        raise ValueError("part prepare needs --engines FOLDER")
    folder.mkdir(parents=True, exist_ok=True)
    rows: list[dict[str, Any]] = []

    def note(step: str, child: Mapping[str, Any]) -> None:
        rows.append({"step": step, "seconds": child["seconds"], "reason": child["reason"]})
        say(f"{step}: {child['reason'] or 'done'}, {child['seconds']:.0f} s")
        record({"steps": rows})

    roles = ("unet", "controlnet")
    if not all((folder / role).is_dir() for role in roles):
        start = time.monotonic()
        for role, module in zip(roles, (lab.maker.build_unet(), *lab.maker.build_controlnets()), strict=True):
            module.save_pretrained(folder / role, max_shard_size="100GB")
        say(f"models saved in {time.monotonic() - start:.0f} s")
    missing = [role for role in roles if not (folder / f"{role}.onnx").exists()]
    with ThreadPoolExecutor(2) as threads:
        exports = {
            role: threads.submit(
                run_child, ["-m", "shapecheck", "export", str(folder / role), "-o", str(folder / f"{role}.onnx")], deadline
            )
            for role in missing
        }
        for role, export in exports.items():
            note(f"export of the {role}, both side by side", export.result())
    if "trt" in lab.options.backends:
        size, together = f"{model.size_px}x{model.size_px}", lab.options.together

        def build(role: str) -> None:
            command = ["-m", "shapecheck", "build", str(folder / f"{role}.onnx"), "-o", str(folder / f"{role}.plan")]
            command += ["--sizes", size, "--batch", str(model.batch)]
            there = (folder / f"{role}.plan").exists()
            for again in [True] if there else [False, True]:
                deadline.require()
                how = ", found again" if again else ", both side by side" if together else ""
                note(f"engine of the {role}{how}", run_child(command, deadline))

        with ThreadPoolExecutor(len(roles) if together else 1) as threads:
            list(threads.map(build, roles))
    return {"steps": rows}


# latency


def compile_first(lab: Lab, backends: list[str], deadline: Deadline) -> list[dict[str, Any]]:
    """Compile in processes of their own, which fill the cache that this one then reads. Return their seconds.

    They run side by side where the memory is enough for several sets of models.
    """
    from concurrent.futures import ThreadPoolExecutor

    import torch

    memory = torch.cuda.get_device_properties(lab.device).total_memory if lab.device.type == "cuda" else 0
    together = max(1, len(backends) if memory > 40e9 else 1)

    def compile_one(backend: str) -> dict[str, Any]:
        marker = lab.cache / f"{lab.model.name}-{backend}.json"
        if marker.exists():
            return json.loads(marker.read_text())
        command = [str(Path(__file__)), "--models", lab.model.name, "--compile", backend, "--cache", str(lab.cache)]
        child = run_child(command, deadline)
        row = {"backend": backend, "seconds": child["seconds"], "reason": child["reason"], "side_by_side": together}
        if not child["reason"]:
            row |= json.loads(child["output"].splitlines()[-1])
            marker.write_text(json.dumps(row))
        say(f"{backend} compiled for the first time: {child['reason'] or 'done'}, {child['seconds']:.0f} s")
        return row

    with ThreadPoolExecutor(together) as threads:
        return list(threads.map(compile_one, backends))


def compile_child(lab: Lab, backend: str) -> None:
    """Play a first frame, which compiles all of it; print how long its parts took."""
    import torch

    from shapecheck.pipelines.frame import Clock

    clock, start = Clock(lab.device), time.monotonic()
    with torch.no_grad():
        play = lab.make_loader(".onnx").make_candidate(backend).make_frame()
        clock.begin()
        play(clock)
        controlnet, _, unet, _ = clock.measure_parts()
    ready = time.monotonic() - start
    print(json.dumps({"ready": ready, "controlnet": controlnet / 1000, "unet": unet / 1000}))


def measure_latency(lab: Lab, record: Callable[[dict[str, Any]], None], deadline: Deadline) -> dict[str, Any]:
    """Time frames of all backends in turns, then the VAE and the text encoders."""
    import torch

    from shapecheck import extras
    from shapecheck.pipelines import bench_report
    from shapecheck.pipelines.bench_record import COMPILED, Bench, Timing
    from shapecheck.pipelines.frame_timing import TimedBackend, time_candidates
    from shapecheck.pipelines.picture_parts import find_picture_models, time_parts

    options = lab.options
    first = compile_first(lab, [name for name in options.backends if name in COMPILED], deadline)
    record({"compiled_first": first})
    loaders = {suffix: lab.make_loader(suffix) for suffix in (".onnx", ".plan")}
    candidates: list[TimedBackend] = []
    absent: list[Timing] = []
    for backend in options.backends:
        suffix = ".plan" if backend == "trt" else ".onnx"
        if not backend.startswith("torch") and lab.find_file(f"unet{suffix}") is None:
            absent.append(Timing(backend, "", reason=f"no unet{suffix} in --engines: part prepare makes it"))
            continue
        candidate = loaders[suffix].make_candidate(backend)

        def make_frame(make: Callable[[], Any] = candidate.make_frame) -> Any:
            deadline.require()
            return make()

        candidates.append(replace(candidate, make_frame=make_frame))

    def progress(step: str, *_: int) -> None:
        if not step.startswith("timing frame") or step.endswith(" of 1") or step.startswith("timing frame 1 "):
            say(step)

    with torch.no_grad():
        with deadline.interrupt():
            timings = time_candidates(candidates, lab.device, frames=FRAMES, warm_up=5, progress=progress, caught=Exception)
        bench = Bench(
            lab.model.name,
            lab.contract.digest,
            lab.geometry,
            1,
            describe_gpu(),
            (*timings, *absent),
            extras.list_versions(PACKAGES),
            lab.model.steps,
        )

        def to_part(bench: Bench) -> dict[str, Any]:
            return {"bench": json.loads(bench_report.render_json(bench)), "compiled_first": first}

        record(to_part(bench))
        models, compiled = find_picture_models(lab.contract, ()), any(timing.backend in COMPILED for timing in timings)
        with deadline.interrupt():
            parts = time_parts(
                models, lab.contract, lab.geometry, lab.device, compiled=compiled and not options.quick, progress=progress
            )
    print(bench_report.render_text(bench := replace(bench, parts=parts)), flush=True)
    return to_part(bench)


# limit


def measure_limit(lab: Lab, _record: Callable[[dict[str, Any]], None], deadline: Deadline) -> dict[str, Any]:
    """Count the arithmetic of both models, and measure at what rate this GPU multiplies matrices."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    flops = {}
    with torch.no_grad(), deadline.interrupt():
        for module in lab.build_modules(torch.float16):
            contract = find_contract(lab, module)
            with FlopCounterMode(display=False) as counter:
                call_model(module, contract, draw_inputs(lab, contract, 0))
            flops[contract.role] = counter.get_total_flops()
        side = 8192 if lab.device.type == "cuda" else 256
        one, other = (torch.randn(side, side, device=lab.device, dtype=torch.float16) for _ in range(2))
        times = [time_once(lambda: one @ other, lab.device) for _ in range(60)]
    rate = 2 * side**3 / statistics.median(times[20:]) * 1000
    say(f"{ {role: count / 1e12 for role, count in flops.items()} } TFLOP at {rate / 1e12:.0f} TFLOP/s")
    return {"flops": flops, "rate": rate, "side": side}


def time_once(call: Callable[[], object], device: Any) -> float:
    from shapecheck.pipelines.frame import Clock

    clock = Clock(device)
    clock.begin()
    clock.mark()
    call()
    clock.mark()
    return clock.measure_parts()[0]


# parity


def find_contract(lab: Lab, module: Any) -> Any:
    from shapecheck.observe.subject import resolve_subject

    dtype = str(next(module.parameters()).dtype).removeprefix("torch.")
    return resolve_subject(module).contract(dtype, control=True)


def draw_inputs(lab: Lab, contract: Any, seed: int, *, control: bool = True) -> dict[str, Any]:
    """Return a tensor for every input and slot of a model, drawn on the GPU; without `control` zeros for every slot."""
    import torch

    generator = torch.Generator(lab.device).manual_seed(seed)
    slots = {slot.name for slot in contract.residuals}
    values = {}
    for name, shape in contract.input_shapes(lab.geometry).items():
        dtype = getattr(torch, contract.input_dtypes[name])
        value = torch.randn(shape, generator=generator, device=lab.device)
        if name in ("timestep", "conditioning_scale"):
            value = torch.full(shape, 500.3 if name == "timestep" else 0.8, device=lab.device)
        values[name] = (value if control or name not in slots else value * 0).to(dtype)
    return values


def call_model(model: Any, contract: Any, values: Mapping[str, Any]) -> list[Any]:
    """Call a model as diffusers does; return its outputs, copied, in the order of its slots."""
    import torch

    from shapecheck.models.forward_call import build_arguments

    dtype = next(model.parameters()).dtype if list(model.parameters()) else getattr(torch, contract.dtype)
    cast = {
        name: value.to(dtype) if value.is_floating_point() and name != "timestep" else value for name, value in values.items()
    }
    with torch.no_grad():
        first, *rest = model(**build_arguments(contract, cast), return_dict=False)
    return [output.clone() for output in ([first] if contract.role == "unet" else [*first, *rest])]


Outputs = dict[str, Any]


def call_all(lab: Lab, model: Any, contract: Any) -> Outputs:
    """Return every output to be compared, by what is to be told of it."""
    if contract.role == "controlnet":
        names = [slot.name for slot in contract.slots]
        calls = [call_model(model, contract, draw_inputs(lab, contract, seed)) for seed in (0, 1)]
        return {
            f"{name}, call {number}": output
            for number, outputs in enumerate(calls)
            for name, output in zip(names, outputs, strict=True)
        }
    plain, other = draw_inputs(lab, contract, 0), draw_inputs(lab, contract, 1)
    cases = {"control off": draw_inputs(lab, contract, 0, control=False), "control on": plain}
    cases |= {f"another {slot.name}": plain | {slot.name: other[slot.name]} for slot in contract.slots}
    return {name: call_model(model, contract, values)[0] for name, values in cases.items()}


def measure_errors(outputs: Outputs, expected: Outputs) -> dict[str, float]:
    """Return the largest difference of each output as a share of its largest value; infinity if it is not a number."""
    errors = {}
    for name, output in outputs.items():
        error = float((output.float() - expected[name]).abs().max() / expected[name].abs().max())
        errors[name] = error if math.isfinite(error) else math.inf
    return errors


def judge(backend: str, precision: str, role: str, errors: Mapping[str, float], own: Mapping[str, float]) -> dict[str, Any]:
    """Return the row of a backend: its worst error, and the worst as a multiple of PyTorch's own."""
    from shapecheck.parity.metrics import find_room

    ratios = {name: error / own[name] for name, error in errors.items()}
    at, ratio_at = max(errors, key=errors.__getitem__), max(ratios, key=ratios.__getitem__)
    allowed = TIMES_OWN * find_room(backend, precision)
    row = {"backend": backend, "precision": precision, "role": role, "compared": len(errors), "error": errors[at], "at": at}
    return row | {"ratio": ratios[ratio_at], "ratio_at": ratio_at, "passes": ratios[ratio_at] <= allowed}


def measure_parity(lab: Lab, record: Callable[[dict[str, Any]], None], deadline: Deadline) -> dict[str, Any]:
    """Compare every backend with PyTorch in float32: the image with each slot exchanged in turn, and every residual."""
    import torch

    from shapecheck.runtime.gpu import free_memory
    from shapecheck.runtime.torch_session import forbid_tf32

    rows: list[dict[str, Any]] = []

    def note(row: dict[str, Any]) -> None:
        rows.append(row)
        result = row.get("reason") or f"{row['error']:.1e} at {row['at']}, {row['ratio']:.2f} times PyTorch's own"
        say(f"{row['backend']} {row['precision']}, {row['role']}: {result}")
        record({"rows": rows})

    for dtype in (torch.float16,) if lab.options.quick else (torch.float16, torch.bfloat16):
        precision = str(dtype).removeprefix("torch.")
        for module in lab.build_modules(dtype):
            deadline.require()
            contract = find_contract(lab, module)
            reference = copy.deepcopy(module).float()
            with forbid_tf32(), deadline.interrupt():
                expected = call_all(lab, reference, contract)
            del reference
            free_memory()
            # at least half a unit in the last place, by which the result itself is rounded
            least = torch.finfo(dtype).eps / 2
            own = {name: max(error, least) for name, error in measure_errors(call_all(lab, module, contract), expected).items()}
            note(judge("torch", precision, contract.role, own, own))
            for backend in lab.options.backends if dtype == torch.float16 else ():
                if backend in ("torch", "torch-reduce-overhead"):
                    continue
                try:
                    with deadline.interrupt():
                        model = open_for_parity(lab, backend, module, contract)
                        row = judge(
                            backend, precision, contract.role, measure_errors(call_all(lab, model, contract), expected), own
                        )
                    del model
                except Exception as error:  # whatever it is, it is told
                    reason = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
                    row = {"backend": backend, "precision": precision, "role": contract.role, "reason": reason}
                note(row)
                free_memory()
    return {"rows": rows}


def open_for_parity(lab: Lab, backend: str, module: Any, contract: Any) -> Any:
    from shapecheck.artefact import read_contract
    from shapecheck.pipelines.frame import compile_module

    if backend == "torch-compile":
        return compile_module(copy.deepcopy(module), backend, lab.settings)
    suffix = ".plan" if backend == "trt" else ".onnx"
    file = lab.find_file(f"{contract.role}{suffix}")
    if file is None:
        raise FileNotFoundError(f"no {contract.role}{suffix} in --engines: part prepare makes it")
    return lab.make_loader(suffix).open_file(str(file), backend, read_contract(file))


# the machine, the record, the command line


def describe_gpu() -> str:
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"


def run_quietly(*command: str) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""


def describe_machine() -> dict[str, Any]:
    import torch

    from shapecheck import extras

    found = {"gpu": describe_gpu(), "python": platform.python_version(), "system": platform.platform(terse=True)}
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        found |= {
            "capability": f"{properties.major}.{properties.minor}",
            "memory": properties.total_memory,
            "driver": run_quietly("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader").splitlines()[0:1],
            "cuda": torch.version.cuda,
        }
    return found | {"versions": dict(extras.list_versions(PACKAGES))}


def read_options(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = gpu_page.BACKENDS

    def split(text: str) -> list[str]:
        return [part.strip() for part in text.split(",") if part.strip()]

    parser.add_argument("-o", "--output", type=Path, default=Path("reports/gpu.md"), help="the page; the JSON lies beside it")
    parser.add_argument("--models", type=split, default=list(MODELS), help=",".join(MODELS))
    parser.add_argument("--parts", type=split, default=["latency", "limit", "parity"], help=",".join(PARTS))
    parser.add_argument("--backends", type=split, default=list(names), help=",".join(names))
    parser.add_argument("--engines", help="folder of exported files and engines that exist, or are to be made")
    parser.add_argument("--cache", help="folder that keeps what torch.compile compiled  [a new one]")
    parser.add_argument("--seconds", type=float, default=540, help="for each part of a model")
    parser.add_argument(
        "--commit", default=run_quietly("git", "-C", str(ROOT), "rev-parse", "--short=12", "HEAD") or "not known"
    )
    parser.add_argument("--together", action="store_true", help="build both engines at once, which disturbs how they are tuned")
    parser.add_argument("--quick", action="store_true", help="no bfloat16, the VAE not compiled")
    parser.add_argument("--note", default="", help="what a reader has to know of this run, such as other work beside it")
    parser.add_argument("--render", type=Path, metavar="JSON", help="only make the page of what was measured")
    parser.add_argument("--compile", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    for chosen, known in ((options.models, MODELS), (options.parts, PARTS), (options.backends, names)):
        if unknown := [name for name in chosen if name not in known]:
            parser.error(f"not known: {', '.join(unknown)}; known: {', '.join(known)}")
    return options


def run_part(lab: Callable[[], Lab], part: str, save: Callable[[dict[str, Any]], None], seconds: float) -> None:
    """Measure one part; a failure is told in the record, beside what was measured before it."""
    measure = {"prepare": prepare, "latency": measure_latency, "limit": measure_limit, "parity": measure_parity}[part]
    found: dict[str, Any] = {}

    def record(values: dict[str, Any]) -> None:
        found.update(values)
        save(found)

    start = time.monotonic()
    try:
        found.update(measure(lab(), record, Deadline(seconds)))
    except Exception as error:  # whatever it is, it is told, and the next part begins
        found["reason"] = f"{type(error).__name__}: {' '.join(str(error).split())[:400]}"
        say(f"{part} ended: {found['reason']}")
    found["seconds"] = time.monotonic() - start
    save(found)


def main(arguments: list[str] | None = None, build: Callable[[str, argparse.Namespace], Lab] = build_lab) -> None:
    options = read_options(arguments)
    if options.render:
        options.output.write_text(gpu_page.render(json.loads(options.render.read_text())))
        return
    options.cache = options.cache or tempfile.mkdtemp(prefix="shapecheck-compiled-")
    Path(options.cache).mkdir(parents=True, exist_ok=True)
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(Path(options.cache) / "inductor"))  # before torch is imported
    if options.compile:
        compile_child(build(options.models[0], options), options.compile)
        return
    logging.getLogger("diffusers").setLevel(logging.ERROR)
    file = options.output.with_suffix(".json")
    machine = describe_machine()
    whole: dict[str, Any] = {"shapecheck_gpu": 1, "machine": machine, "parts": {}}
    if file.exists() and (before := json.loads(file.read_text())).get("machine") == machine:
        whole = before
    say(f"{machine['gpu']}, {machine['versions']}")
    for name in options.models:
        labs: list[Lab] = []

        def lab(name: str = name, labs: list[Lab] = labs) -> Lab:
            if not labs:
                labs.append(build(name, options))
            return labs[0]

        for part in (part for part in PARTS if part in options.parts):
            say(f"{name}: {part}")

            def save(values: dict[str, Any], key: str = f"{name}/{part}") -> None:
                about = {"commit": options.commit, "date": date.today().isoformat(), "quick": options.quick}
                about |= {"note": options.note} if options.note else {}
                whole["parts"][key] = about | values
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_text(dump_json(whole))
                options.output.write_text(gpu_page.render(json.loads(file.read_text())))

            run_part(lab, part, save, options.seconds)
        labs.clear()
    say(f"written: {options.output} and {file}")


if __name__ == "__main__":
    main()
