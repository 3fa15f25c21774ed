"""Seconds of a LoRA's exchange beside a new export and build: `python tests/bench/lora_exchange.py FOLDER [--engine]`.

A preset's UNet at its real size in float16, with random weights that are the same in every process, and two LoRAs of rank 16 on
all attention layers, neither fused. Printed: seconds of `export` with the first, of `rebind` to the second, and with `--engine`
on a GPU seconds of `build --refittable`, of `refit` from the rebound file and from the live model, and how far each engine is
from PyTorch, as a share of the largest value. Without `--engine` it needs no GPU.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel

import shapecheck
from shapecheck import BuildOptions, EngineSession

sys.path.insert(0, str(Path(__file__).parents[1] / "support"))


def load_model(preset: str, folder: Path) -> Any:
    """Return the UNet with both LoRAs, the first active."""
    import full_size
    from loras import add_lora

    if not (folder / "unet" / "config.json").is_file():
        full_size.save(preset, folder, dtype=torch.float16)
    unet = UNet2DConditionModel.from_pretrained(folder / "unet", torch_dtype=torch.float16)
    for number, name in enumerate(("first", "second")):
        add_lora(unet, name, seed=number, rank=16)
    for key, value in unet.named_parameters():
        if ".lora_" in key:  # random ones of this size would drown the weights
            value.data *= 0.05
    unet.set_adapters("first")
    return unet.to(torch.float16)


def timed(what: str, call: Callable[[], Any]) -> Any:
    began, used = time.perf_counter(), time.process_time()
    result = call()
    processor = time.process_time() - used
    print(f"{time.perf_counter() - began:8.1f} s  {what} ({processor:.1f} s of processor time here)", flush=True)
    return result


def compare(path: Path, unet: Any) -> None:
    """Print how far an engine is from PyTorch in float32 at its usual size."""
    contract = shapecheck.read_contract(path)
    geometry = shapecheck.Geometry(2, 64, 64)
    generator = torch.Generator().manual_seed(1)
    inputs = {}
    for name, shape in contract.input_shapes(geometry).items():
        dtype = getattr(torch, contract.input_dtypes[name])
        inputs[name] = torch.randn(shape, generator=generator).to("cuda", dtype)
    inputs["timestep"] = torch.full_like(inputs["timestep"], 480)
    residuals = [inputs[slot.name] for slot in contract.slots]
    more = {"down_block_additional_residuals": residuals[:-1], "mid_block_additional_residual": residuals[-1]}
    with torch.no_grad():
        base = inputs["sample"], inputs["timestep"], inputs["encoder_hidden_states"]
        expected = unet.to("cuda")(*base, **more).sample.float()
    with EngineSession.open(path) as session:
        (found,) = session(inputs).values()
        share = float((found.float() - expected).abs().max() / expected.abs().max())
    print(f"           {path.name} differs from PyTorch in float16 by {share:.2g}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--preset", default="sd15")
    parser.add_argument("--engine", action="store_true")
    given = parser.parse_args()
    folder = given.folder
    folder.mkdir(exist_ok=True)
    unet = timed("random weights and LoRAs", lambda: load_model(given.preset, folder))
    first, second = folder / "first.onnx", folder / "second.onnx"
    timed("export with the first LoRA", lambda: shapecheck.export(unet, first, weights="copy"))
    unet.set_adapters("second")
    timed("rebind to the second", lambda: shapecheck.rebind(first, unet, second))
    if not given.engine:
        return
    sizes = shapecheck.parse_ranges(["512x512"], ["1:2:2"])
    options = BuildOptions(refittable=True)
    engine = folder / "unet.plan"
    timed("build of the first, refittable", lambda: shapecheck.build_engine(first, engine, profiles=sizes, options=options))
    unet.set_adapters("first")
    compare(engine, unet)
    unet.set_adapters("second")
    timed("refit to the second, from its file", lambda: shapecheck.refit(engine, second, folder / "from_file.plan"))
    compare(folder / "from_file.plan", unet)
    timed("refit to the second, from the live model", lambda: shapecheck.refit(engine, unet, folder / "from_model.plan"))
    compare(folder / "from_model.plan", unet)
    compare(engine, unet)  # which still holds the first: it differs


if __name__ == "__main__":
    main()
