"""The subcommand that measures time: bench."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from shapecheck import ShapecheckError
from shapecheck.cli.options import Form, read_names, read_size, result_options
from shapecheck.pipelines.bench_record import BENCH_BACKENDS
from shapecheck.terminal import progress, write


@click.command()
@click.argument("artefact")
@click.option("--model", metavar="MODEL", help="Which UNet an ONNX file is that holds no contract.")
@click.option(
    "--backends",
    metavar="NAMES",
    default="",
    callback=read_names,
    help=f"What to time, with commas: {', '.join(BENCH_BACKENDS)}.  [default: torch, torch-compile, and what ARTEFACT is for]",
)
@click.option("--size", "size_px", metavar="WxH", callback=read_size, help="Image size in pixels.  [default: the model's own]")
@click.option("--batch", type=click.IntRange(1, 1024), default=1, show_default=True, help="2 for guidance with one image.")
@click.option(
    "--controlnets",
    type=click.IntRange(0, 64),
    help="How many run in every frame, in PyTorch.  [default: 1 if the UNet takes residuals]",
)
@click.option(
    "--controlnet",
    "controlnet_files",
    multiple=True,
    metavar="FILE",
    help="In their place an exported one, an ONNX file or an engine. Repeat for several.",
)
@click.option("--frames", type=click.IntRange(1, 100_000), default=20, show_default=True, help="How many are timed.")
@click.option("--warm-up", type=click.IntRange(1, 1000), default=3, show_default=True, help="How many are played before.")
@click.option("--steps", type=click.IntRange(1, 1000), default=20, show_default=True, help="Frames a picture; 1 for a stream.")
@result_options
def bench(artefact: str, form: Form, output: Path | None, **options: Any) -> int:
    """Time frames of ARTEFACT beside PyTorch: median, 95th percentile, memory, and which part takes what share.

    ARTEFACT is an ONNX file or an engine of a UNet; or a model, which is timed in PyTorch alone, without its weights. A frame
    is the ControlNets, the hand-over of their residuals and one call of the UNet. The backends take turns, so that the ratios
    hold on a machine that does other things too. On a GPU times are those of CUDA events. torch-reduce-overhead is the line
    that users type themselves. The VAE and the text encoders of a picture are timed in PyTorch, by the configs in the model's
    folder, or the usual ones.

    Exit status 0, or 2 if a backend that was named, or that ARTEFACT is for, did not run.

    \b
    Examples:
      shapecheck bench ./sd15/unet.onnx
      shapecheck bench unet.plan --size 904x512 --batch 2 --controlnets 2 --format markdown -o bench.md
      shapecheck bench unet.onnx --controlnet canny.onnx --controlnet depth.plan --steps 1
      shapecheck bench unet.onnx --backends torch,ort-cuda,ort-trt --frames 100
    """
    from shapecheck.pipelines import bench_report as report
    from shapecheck.pipelines.bench import time_frames

    with progress() as steps:
        result = time_frames(artefact, **options, progress=steps)
    write(report.render_json(result) if form == "json" else report.render_text(result, form), output)
    return 0 if result.ran else ShapecheckError.exit_status
