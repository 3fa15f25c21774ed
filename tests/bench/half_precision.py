"""What parity sees in float16, and what a picture shows: `python tests/bench/half_precision.py [MODEL ...] [--seeds N]`.

Faults of graded strength are planted into a small UNet of SD1.5's topology with random weights, and healthy variants stand
beside them. For each: the PSNR of what ten DDIM steps draw beside float32's, the worst value's error and that of all values
together as multiples of PyTorch's own, and the verdict without (before) and with the check `rounding` (after).
With `--seeds` only healthy variants are run, over so many seeds of weights and inputs.
"""

from __future__ import annotations

import argparse
import copy
import math
import sys
from pathlib import Path

import torch
from diffusers import DDIMScheduler
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[1] / "support"))
from half_edits import FAULTS, HEALTHY, Edit, make_model

from shapecheck import Geometry
from shapecheck.observe.subject import TorchModel
from shapecheck.parity.cases import ForwardCase, InputGenerator
from shapecheck.parity.json_record import compare_with_torch
from shapecheck.parity.request import ParityRequest
from shapecheck.parity.run import ParityRun
from shapecheck.runtime.torch_session import TorchSession


def draw(session: TorchSession, inputs: dict[str, Tensor], std: float, guidance: float) -> Tensor:
    """Return the latents after ten DDIM steps; the image is scaled to a width of 1, as noise has it."""
    scheduler = DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False)
    scheduler.set_timesteps(10)
    latents = inputs["sample"][:1].float()
    for step in scheduler.timesteps:
        given = inputs | {"sample": latents.repeat(2, 1, 1, 1), "timestep": torch.full_like(inputs["timestep"], float(step))}
        without, with_text = session(given)["out_sample"].float().chunk(2)
        latents = scheduler.step((without + guidance * (with_text - without)) / std, step, latents).prev_sample
    return latents


def compute_psnr(latents: Tensor, expected: Tensor) -> float:
    """Return the PSNR as a picture's, whose standard deviation is a quarter of its range."""
    pictures = [(0.5 + 0.25 * (value - expected.mean()) / expected.std()).clamp(0, 1) for value in (latents, expected)]
    error = float((pictures[0] - pictures[1]).square().mean())
    return -10 * math.log10(error) if error else math.inf


def judge(model: nn.Module, edit: Edit, seed: int) -> tuple[float, float, str, str, nn.Module]:
    """Return the two ratios, the verdict without and with the check `rounding`, and the edited module."""
    module = copy.deepcopy(model)
    edit(module)

    def open_edited(backend, file):
        return TorchSession(copy.deepcopy(module), file.contract)

    run = ParityRun(ParityRequest(model, backends=("torch",), seed=seed), opener=open_edited, explain=False)
    results = run.side("torch").results
    worst = max(compare_with_torch(result.verdict) for result in results if result.check.kind == "case")
    (rounding,) = (result for result in results if result.check.kind == "rounding")
    failed = {result.check.kind for result in results if result.status == "failed"}
    before, after = ("BROKEN" if kinds else "passes" for kinds in (failed - {"rounding"}, failed))
    return worst, rounding.rounding.times_own if rounding.rounding else math.nan, before, after, module


def print_faults(name: str) -> None:
    model = make_model(name)
    contract = TorchModel(model).contract("float16", control=True)
    exact = TorchSession(copy.deepcopy(model).float(), contract)
    inputs = InputGenerator(contract, 0)(ForwardCase(Geometry(2, 16, 16)))
    std = float(exact(inputs)["out_sample"].std())
    expected = [draw(exact, inputs, std, guidance) for guidance in (7.5, 1.0)]
    print(f"\n| {name} | PSNR, guidance 7.5 | PSNR, none | worst | all | before | after |\n|---|---|---|---|---|---|---|")
    for about, edit in (HEALTHY | FAULTS).items():
        worst, ratio, before, after, module = judge(model, edit, 0)
        session = TorchSession(module, contract)
        pair = zip((7.5, 1.0), expected, strict=True)
        psnrs = [compute_psnr(draw(session, inputs, std, guidance), known) for guidance, known in pair]
        missed = " **visible**" if min(psnrs) < 40 and after == "passes" and about in FAULTS else ""
        numbers = f"{psnrs[0]:.0f} dB | {psnrs[1]:.0f} dB | {worst:.2f} | {ratio:.2f} | {before} | {after}"
        print(f"| {about} | {numbers}{missed} |", flush=True)


def print_seeds(name: str, seeds: int) -> None:
    found: dict[str, list[tuple[float, float, str]]] = {about: [] for about in HEALTHY}
    for seed in range(seeds):
        model = make_model(name, seed)
        for about, edit in HEALTHY.items():
            worst, ratio, _, after, _ = judge(model, edit, seed)
            found[about].append((worst, ratio, after))
    print(f"\n| {name}, {seeds} seeds | worst | all | false alarms |\n|---|---|---|---|")
    for about, numbers in found.items():
        worst, ratio, after = zip(*numbers, strict=True)
        ranges = [f"{min(values):.2f} to {max(values):.2f}" for values in (worst, ratio)]
        print(f"| {about} | {ranges[0]} | {ranges[1]} | {after.count('BROKEN')} |")


def main() -> None:
    parser = argparse.ArgumentParser()
    torch.set_num_threads(1)
    parser.add_argument("models", nargs="*", default=["default", "lively", "xl"])
    parser.add_argument("--seeds", type=int)
    given = parser.parse_args()
    for name in given.models:
        if given.seeds:
            print_seeds(name, given.seeds)
        else:
            print_faults(name)


if __name__ == "__main__":
    main()
