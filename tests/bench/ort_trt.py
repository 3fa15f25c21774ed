"""One UNet call on ONNX Runtime's CUDA and TensorRT providers, with and without each thing that should make it faster.

Run it on a GPU: python tests/bench/ort_trt.py UNET.onnx [--model UNET_FOLDER] [--cache FOLDER] [--variants NAME,…]. A variant
is a process of its own, printed when it ends and ended when the time is over: milliseconds of a call (CUDA events, median),
seconds until the session is open, the difference to PyTorch in float32 as a share of the largest value, and which provider has
how many of the file's nodes. Engines stay in the cache folder: the second run of a variant builds nothing.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

SIZE = 2, 64, 64
CALLS = 30


class Variant(NamedTuple):
    backend: str
    options: Mapping[str, str]
    graphs: bool = False
    fused: bool = True
    cached: bool = True


HALF, SINGLE, QUICK = {"trt_fp16_enable": "True"}, {"trt_fp16_enable": "False"}, {"trt_builder_optimization_level": "2"}
VARIANTS = {
    "torch": Variant("torch", {}),
    "cuda": Variant("ort-cuda", {}, fused=False),
    "cuda-graphs": Variant("ort-cuda", {}, graphs=True, fused=False),
    "cuda-fused": Variant("ort-cuda", {}),
    "cuda-fused-graphs": Variant("ort-cuda", {}, graphs=True),
    "trt-fp16-quick": Variant("ort-trt", HALF | QUICK),
    "trt-fp16-quick-graphs": Variant("ort-trt", HALF | QUICK, graphs=True),  # the engine is found in the cache
}
OTHERS = {  # minutes each
    "trt-fp16": Variant("ort-trt", HALF),
    "trt-fp16-graphs": Variant("ort-trt", HALF, graphs=True),
    "trt-fp16-timings": Variant("ort-trt", HALF, cached=False),  # builds again, with the timings of the build before
    "trt": Variant("ort-trt", SINGLE),
    "trt-quick": Variant("ort-trt", SINGLE | QUICK),
    "cuda-fused-heuristic": Variant("ort-cuda", {"cudnn_conv_algo_search": "HEURISTIC"}, graphs=True),
    "cuda-fused-no-tf32": Variant("ort-cuda", {"use_tf32": "0"}, graphs=True),
}


def measure(name: str, onnx: Path, model: str | None, cache: Path) -> dict[str, object]:
    """Measure one variant, in this process. PyTorch leaves its result in float32 in the cache folder."""
    import torch
    from safetensors.torch import load_file

    import shapecheck
    from shapecheck.tensorrt.profiles import Range, profile_of

    contract, geometry = shapecheck.read_contract(onnx), shapecheck.Geometry(*SIZE)
    generator = torch.Generator().manual_seed(0)
    inputs = {
        key: (torch.randn(shape, generator=generator) * 0.5).to("cuda", getattr(torch, contract.input_dtypes[key]))
        for key, shape in contract.input_shapes(geometry).items()
    }
    inputs["timestep"] = torch.full_like(inputs["timestep"], 500)
    variant = (VARIANTS | OTHERS)[name]
    began, nodes, reference = time.perf_counter(), "", cache / "reference.safetensors"
    if variant.backend == "torch":
        call = make_torch_call(contract, inputs, model, reference)
    else:
        options = dict(variant.options)
        if variant.backend == "ort-trt":
            profile = profile_of(contract, Range(geometry, geometry, geometry))
            options = make_options(profile, contract, onnx) | options | cache_options(cache, variant)
        session = open_session(variant, onnx, options)
        names = contract.match_names(session.inputs)
        given = {names[key]: value for key, value in inputs.items()}
        outputs = {key: torch.empty(2, 4, 64, 64, dtype=torch.float16, device="cuda") for key in session.outputs}
        nodes = count_nodes(session)

        def call():
            return next(iter(session(given, outputs).values()))

    opened = time.perf_counter() - began
    result = call()
    torch.cuda.synchronize()
    first = time.perf_counter() - began - opened
    spent = []
    for _ in range(CALLS):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        result = call()
        end.record()
        end.synchronize()
        spent.append(start.elapsed_time(end))
    error = None
    if reference.exists():
        expected = load_file(reference)["image"].to("cuda")
        error = ((result.float() - expected).abs().max() / expected.abs().max()).item()
    memory = torch.cuda.mem_get_info()
    return {
        "ms": statistics.median(spent), "open": opened, "first": first, "error": error, "nodes": nodes,
        "gib": (memory[1] - memory[0]) / 2**30,
    }  # fmt: skip


def make_torch_call(contract, inputs, model, reference):
    """Return a call of the UNet in PyTorch, in float16; keep its result in float32."""
    import torch
    from diffusers import UNet2DConditionModel
    from safetensors.torch import save_file

    from shapecheck.models.forward_call import build_arguments
    from shapecheck.runtime.torch_session import forbid_tf32

    unet = UNet2DConditionModel.from_pretrained(model, torch_dtype=torch.float16).cuda().eval()
    torch.set_grad_enabled(False)
    single = {key: value.float() for key, value in inputs.items()}
    with forbid_tf32():
        expected = unet.float()(**build_arguments(contract, single), return_dict=False)[0]
    save_file({"image": expected.cpu().contiguous()}, reference)
    half = unet.half()
    return lambda: half(**build_arguments(contract, inputs), return_dict=False)[0]


def make_options(profile, contract, onnx):
    from shapecheck.onnx.file import OnnxFile
    from shapecheck.tensorrt.profile_formats import make_provider_options

    names = contract.match_names([declared.name for declared in OnnxFile(onnx).reading.inputs])
    return dict(make_provider_options([profile.renamed(names)]))


def cache_options(cache, variant):
    """Return where engines and timings are kept: a folder for each of the options, else ONNX Runtime takes one for another."""
    folder = cache / "-".join(f"{key.removeprefix('trt_')}{value}" for key, value in sorted(variant.options.items()))
    folder.mkdir(exist_ok=True)
    paths = {"trt_timing_cache_enable": "True", "trt_timing_cache_path": str(folder)}
    return paths | ({"trt_engine_cache_enable": "True", "trt_engine_cache_path": str(folder)} if variant.cached else {})


def open_session(variant, onnx, options):
    import onnxruntime

    from shapecheck.onnx import attention
    from shapecheck.runtime.onnx_session import OnnxSession

    class Noting(onnxruntime.SessionOptions):
        def __init__(self):
            super().__init__()
            self.add_session_config_entry("session.record_ep_graph_assignment_info", "1")

    onnxruntime.SessionOptions = Noting
    if not variant.fused:
        attention.read_fused = lambda _path: None
    return OnnxSession.open(onnx, backend=variant.backend, options=options, graphs=variant.graphs)


def count_nodes(session):
    """Return the number of nodes that each provider has, where this ONNX Runtime tells them."""
    try:
        counts = Counter()
        for part in session._session.get_provider_graph_assignment_info():
            counts[part.ep_name] += len(part.get_nodes())
        return ", ".join(f"{name.removesuffix('ExecutionProvider')} {count}" for name, count in counts.items())
    except Exception as error:
        return f"? ({type(error).__name__})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("onnx", type=Path, help="SD1.5's UNet in float16, exported by shapecheck")
    parser.add_argument("--model", help="the UNet's folder for diffusers; without it `torch` is left out")
    parser.add_argument("--cache", type=Path, help="a folder for engines; by default one that is removed")
    parser.add_argument("--variants", default=",".join(VARIANTS), help=f"besides those run by default: {', '.join(OTHERS)}")
    parser.add_argument("--seconds", type=float, default=250, help="of all variants together")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.one:
        print(json.dumps(measure(asked.one, asked.onnx, asked.model, asked.cache)))
        return
    with tempfile.TemporaryDirectory() as removed:
        cache, end = asked.cache or Path(removed), time.monotonic() + asked.seconds
        cache.mkdir(parents=True, exist_ok=True)
        print(f"{'variant':22}{'ms':>8}{'open s':>8}{'first s':>8}{'error':>10}{'GiB':>6}  nodes", flush=True)
        for name in asked.variants.split(","):
            if name == "torch" and asked.model is None:
                continue
            command = [sys.executable, __file__, str(asked.onnx), "--one", name, "--cache", str(cache)]
            try:
                done = subprocess.run(
                    command + (["--model", asked.model] if asked.model else []),
                    capture_output=True, text=True, timeout=max(1, end - time.monotonic()), check=True,
                )  # fmt: skip
                row = json.loads(done.stdout.splitlines()[-1])
                error = "-" if row["error"] is None else f"{row['error']:.1e}"
                figures = f"{row['ms']:8.2f}{row['open']:8.1f}{row['first']:8.1f}{error:>10}{row['gib']:6.1f}"
                print(f"{name:22}{figures}  {row['nodes']}", flush=True)
            except subprocess.TimeoutExpired:
                print(f"{name:22}not ended: the {asked.seconds:.0f} seconds are over", flush=True)
            except subprocess.CalledProcessError as failed:
                print(f"{name:22}failed: {' '.join(failed.stderr.strip().splitlines()[-1:])}", flush=True)


if __name__ == "__main__":
    main()
