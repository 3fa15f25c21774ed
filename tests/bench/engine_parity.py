"""Engines of UNet and ControlNet at their real sizes on a GPU: exported, built, held to PyTorch slot by slot, and served.

Run a part of it: python tests/bench/engine_parity.py FOLDER [--model sdxl] [--net controlnet] [--profile ranged]
[--steps make,export,build,compare,serve,parity] [--seconds 540]. Files stay in FOLDER, so that steps may be run one by
one; what is there already is not made again. Everything is printed as it happens, with the seconds since the start.

An engine of SD1.5's UNet takes four minutes to build on an H200. `compare` gives every input its own change, and shows how far
the engine is from PyTorch in float32 with the same weights, beside how far PyTorch in float16 is; `parity` runs the command.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import torch
from diffusers import ControlNetModel, UNet2DConditionModel
from torch import Tensor, nn

from shapecheck import Contract, EngineSession, Geometry, presets
from shapecheck.tensorrt.record import read_engine

START = time.perf_counter()
DEVICE = "cuda"
PROFILES = {
    ("sd15", "static"): ("--sizes", "512x512", "--batch", "2"),
    ("sd15", "ranged"): ("--sizes", "384x512:512x512:768x768", "--batch", "1:2:4"),
    ("sdxl", "static"): ("--sizes", "1024x1024", "--batch", "1"),
    ("sdxl", "ranged"): ("--sizes", "768x1024:1024x1024:1152x1152", "--batch", "1:1:2"),
}
STEPS = ("make", "export", "build", "compare", "serve")
Run = Callable[[Mapping[str, Tensor]], list[Tensor]]


def tell(*texts: object) -> None:
    print(f"{time.perf_counter() - START:7.1f} s ", *texts, flush=True)


def make(folder: Path, model: str) -> None:
    """Write the preset's UNet and a ControlNet of it, with random weights in half precision."""
    if (folder / "controlnet" / "config.json").is_file():
        return
    torch.manual_seed(0)
    with torch.device(DEVICE):
        unet = UNet2DConditionModel.from_config(json.loads(json.dumps(presets.load(model).config)))
        net = ControlNetModel.from_unet(unet)
        for name, parameter in net.named_parameters():
            if "controlnet_" in name:  # its zero convolutions, which emit nothing
                parameter.data = torch.randn_like(parameter) * 0.02
    for name, module in (("unet", unet), ("controlnet", net)):
        module.half().save_pretrained(folder / name)


def call(end: float, *arguments: object) -> None:
    """Run a command of shapecheck for as long as there is time."""
    left = end - time.perf_counter()
    if left < 5:
        raise SystemExit(f"no time is left for {arguments[0]}: give more --seconds, or this step alone with --steps")
    command = [sys.executable, "-m", "shapecheck", *map(str, arguments)]
    try:
        status = subprocess.run(command, timeout=left).returncode
    except subprocess.TimeoutExpired:
        raise SystemExit(f"{arguments[0]} did not end within {left:.0f} s") from None
    tell(f"shapecheck {arguments[0]}: status {status}")
    if status and arguments[0] != "parity":
        raise SystemExit(status)


def draw(contract: Contract, geometry: Geometry) -> dict[str, Tensor]:
    generator = torch.Generator(DEVICE).manual_seed(1)
    shapes, dtypes = contract.input_shapes(geometry), contract.input_dtypes
    inputs = {}
    for name, shape in shapes.items():
        value = torch.randn(shape, generator=generator, device=DEVICE)
        inputs[name] = value.to(getattr(torch, dtypes[name]))
    inputs["timestep"] = torch.full_like(inputs["timestep"], 500)
    if "conditioning_scale" in inputs:
        inputs["conditioning_scale"] = torch.full_like(inputs["conditioning_scale"], 0.8)
    return inputs


def run_torch(module: nn.Module, contract: Contract) -> Run:
    """Return what calls a model in PyTorch, in its own precision, with inputs by the contract's names."""
    dtype = next(module.parameters()).dtype

    def run(inputs: Mapping[str, Tensor]) -> list[Tensor]:
        values = {name: value.to(dtype) for name, value in inputs.items()}
        added = {name: values[name] for name in ("text_embeds", "time_ids") if name in values}
        arguments = [values[name] for name in ("sample", "timestep", "encoder_hidden_states")]
        with torch.no_grad():
            if contract.role == "controlnet":
                scale = float(values["conditioning_scale"])
                options = {"controlnet_cond": values["controlnet_cond"], "conditioning_scale": scale}
                downs, mid = module(*arguments, added_cond_kwargs=added or None, return_dict=False, **options)
                return [*downs, mid]
            *downs, mid = (values[slot.name] for slot in contract.slots)
            options = {"down_block_additional_residuals": downs, "mid_block_additional_residual": mid}
            return [module(*arguments, added_cond_kwargs=added or None, **options).sample]

    return run


def run_engine(session: EngineSession) -> Run:
    names = [slot.name for slot in session.contract.slots]

    def run(inputs: Mapping[str, Tensor]) -> list[Tensor]:
        outputs = session(inputs)
        return [outputs[name].clone() for name in (names if names[0] in outputs else outputs)]

    return run


def measure(found: list[Tensor], expected: list[Tensor]) -> float:
    """The largest difference of any output, as a share of the largest value of that output."""
    pairs = [(one.double(), other.double()) for one, other in zip(found, expected, strict=True)]
    return max(float((one - other).abs().max() / other.abs().max()) for one, other in pairs)


def compare_changes(found: list[Tensor], found_before: list[Tensor], wanted: list[Tensor], before: list[Tensor]) -> float:
    """Return the cosine between what an input's change does to the engine's outputs and to the reference's."""
    ours = torch.cat([(one.double() - two.double()).flatten() for one, two in zip(found, found_before, strict=True)])
    theirs = torch.cat([(one.double() - two.double()).flatten() for one, two in zip(wanted, before, strict=True)])
    return float(ours @ theirs / (ours.norm() * theirs.norm()))


def compare(plan: Path, module: nn.Module, geometry: Geometry, end: float) -> bool:
    """Print how far engine and PyTorch are from float32, as the call is and with each input changed; say if all is well."""
    with EngineSession.open(plan) as session:
        tell("opened", plan.name, "at", geometry)
        inputs, engine = draw(session.contract, geometry), run_engine(session)
        half = run_torch(module, session.contract)
        cases = {"as it is": inputs}
        for name, value in inputs.items():
            # Slots deep in the model act on little, and it has to be louder than half precision's own error.
            change = value + (100 if name == "timestep" else 10 if "residual" in name else 0.5)
            cases[name] = inputs | {name: change if name != "conditioning_scale" else value / 2}
        found = {}
        for name, case in cases.items():
            found[name] = engine(case), half(case)
        tell(f"{len(cases)} calls of engine and float16")
        exact = run_torch(module.float(), session.contract)
        good, usual = True, exact(inputs)
        tell(f"{'changed':32} {'acts by':>9} {'engine':>9} {'float16':>9} of the largest value; cosine of the two changes")
        for name, case in cases.items():
            expected = exact(case)
            errors = [measure(outputs, expected) for outputs in found[name]]
            acts, cosine = measure(expected, usual), 1.0
            if name != "as it is":
                cosine = compare_changes(found[name][0], found["as it is"][0], expected, usual)
            is_quiet = name != "as it is" and 0 < acts <= 4 * errors[1]
            fine = errors[0] <= max(4 * errors[1], 2e-3) and (cosine > 0.5 or is_quiet)
            good = good and fine
            remark = "  FAR OFF" if not fine else "  too quiet to judge its place" if is_quiet else ""
            tell(f"{name:32} {acts:9.1e} {errors[0]:9.1e} {errors[1]:9.1e} {cosine:7.4f}{remark}")
            if time.perf_counter() > end:
                raise SystemExit("no time is left to compare the rest")
        module.half()
    return good


def serve(plan: Path, module: nn.Module, geometry: Geometry) -> bool:
    """Print milliseconds of a call by the engine, with and without CUDA graphs, and by PyTorch; say if both give the same."""
    images = []
    for graphs in (False, True):
        torch.cuda.reset_peak_memory_stats()
        free = torch.cuda.mem_get_info()[0]
        begin = time.perf_counter()
        with EngineSession.open(plan, graphs=graphs, verify=False) as session:
            opened = time.perf_counter() - begin
            inputs = draw(session.contract, geometry)
            milliseconds = time_calls(partial(session, inputs))
            images.append(run_engine(session)(inputs))
            taken = (free - torch.cuda.mem_get_info()[0]) / 2**30
            tell(f"graphs {graphs!s:5}: {milliseconds:.2f} ms, opened in {opened:.1f} s, {taken:.2f} GiB of the GPU")
            eager = run_torch(module, session.contract)
    tell(f"PyTorch eager float16: {time_calls(partial(eager, inputs)):.2f} ms")
    return all(torch.equal(one, other) for one, other in zip(*images, strict=True))


def time_calls(run: Callable[[], object]) -> float:
    """Return the median over 30 calls, after 5."""
    times = []
    for number in range(35):
        marks = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
        marks[0].record()
        run()
        marks[1].record()
        marks[1].synchronize()
        times += [marks[0].elapsed_time(marks[1])] if number >= 5 else []
    return sorted(times)[len(times) // 2]


def main() -> int:
    """Run the requested steps; status 1 if a number is not as it should be."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--model", choices=("sd15", "sdxl"), default="sd15")
    parser.add_argument("--net", choices=("unet", "controlnet"), default="unet")
    parser.add_argument("--profile", choices=("static", "ranged"), default="static")
    parser.add_argument("--steps", default=",".join(STEPS), help="of make, export, build, compare, serve, parity")
    parser.add_argument("--seconds", type=float, default=540)
    asked = parser.parse_args()
    steps, end = asked.steps.split(","), START + asked.seconds
    if unknown := {*steps} - {*STEPS, "parity"}:
        parser.error(f"no step {', '.join(unknown)}")
    folder = asked.folder / asked.model
    folder.mkdir(parents=True, exist_ok=True)
    onnx, plan = folder / f"{asked.net}.onnx", folder / f"{asked.net}-{asked.profile}.plan"
    sizes, good = PROFILES[asked.model, asked.profile], True
    if "make" in steps:
        make(folder, asked.model)
        tell("models are in", folder)
    if "export" in steps and not onnx.is_file():
        call(end, "export", folder / asked.net, "-o", onnx)
    if "build" in steps:
        call(end, "build", onnx, "-o", plan, *sizes, "--timing-cache", folder / "timings")
    if {"compare", "serve"} & {*steps}:
        torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False  # in the reference
        kind = UNet2DConditionModel if asked.net == "unet" else ControlNetModel
        module = kind.from_pretrained(folder / asked.net, torch_dtype=torch.float16).to(DEVICE).eval()
        tell("loaded the model in PyTorch")
        for geometry in dict.fromkeys(read_engine(plan).interface.ranges[0].geometries):
            good = ("compare" not in steps or compare(plan, module, geometry, end)) and good
            good = ("serve" not in steps or serve(plan, module, geometry)) and good
        del module
        torch.cuda.empty_cache()
    if "parity" in steps:
        call(end, "parity", folder / asked.net, "--engine", plan, *sizes)
    tell("ALL AS IT SHOULD BE" if good else "NOT AS IT SHOULD BE")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
