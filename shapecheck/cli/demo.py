"""The subcommand that shows on generated input what all the others are for: demo."""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_args

import click

from shapecheck import ContractError, Geometry, ShapecheckError
from shapecheck.cli.options import FILE, FOLDER, Form, format_option, offline_option, read_size
from shapecheck.files import make_folder
from shapecheck.pipelines.demo_record import DemoBackend
from shapecheck.terminal import progress, write


@click.command()
@click.option(
    "--out", "folder", type=FOLDER, metavar="FOLDER", required=True, help="Where pictures, page and exported file go."
)
@click.option("--model", metavar="MODEL", help="A diffusers folder or hub id.  [default: a small model, random weights]")
@click.option("--controlnet", metavar="NAME", help="The same of a ControlNet; with --model.")
@click.option("--image", type=FILE, metavar="FILE", help="A control image.  [default: a depth map that is made]")
@click.option("--prompt", metavar="TEXT", default="a red chair by the window", show_default=True, help="What to draw.")
@click.option(
    "--backend",
    type=click.Choice(get_args(DemoBackend)),
    default="ort",
    show_default=True,
    help="What runs the UNet; on a GPU in float16, and ort, or torch-compile without one, on the CPU.",
)
@click.option(
    "--size",
    "size_px",
    metavar="WxH",
    callback=read_size,
    help="Pixels, multiples of 8.  [default: 136x104, or the model's own]",
)
@click.option("--steps", type=click.IntRange(2, 1000), default=8, show_default=True, help="Of the scheduler.")
@click.option("--seed", type=click.IntRange(0, 2**32 - 1), default=0, show_default=True, help="Of the noise to begin with.")
@click.option("--variant", metavar="NAME", help="Which of MODEL's files, such as fp16.")
@offline_option
@format_option
def demo(folder: Path, form: Form, **options: Any) -> int:
    """Draw one picture in PyTorch, and again with the UNet exported and exchanged; compare, and show both on a page.

    Nothing is downloaded: a small model with random weights and a depth map are made here, and the pictures are textures.
    --model and --controlnet take real checkpoints. FOLDER then holds index.html, demo.json, demo.md, every picture, and the
    ONNX file, engine or compiled code, which the next demo finds again. Making that takes most of the time, a minute or two.

    Exit status 0 if the pictures are the same and the ControlNet acts, 1 if not. In float16 the difference is reported and
    not judged.

    \b
    Examples:
      shapecheck demo --out demo
      shapecheck demo --out demo --backend trt
      shapecheck demo --out demo --model ./sd15 --controlnet ./my-controlnet --image depth.png --prompt "a red chair"
    """
    model, controlnet, prompt = options["model"], options["controlnet"], options["prompt"]
    if (model is None) != (controlnet is None):
        present, absent = ("--model", "--controlnet") if controlnet is None else ("--controlnet", "--model")
        raise ShapecheckError(f"{present} without {absent}: give both, or neither for a small model with random weights")
    if options["variant"] is not None and model is None:
        raise ShapecheckError("--variant says which files of --model are read: give --model and --controlnet too")
    if options["size_px"] is not None:
        # Raises if pixels do not fill whole latent cells.
        Geometry.from_px(*options["size_px"])
    try:
        # A command line may hold bytes that are not text, and no tokenizer takes them.
        prompt.encode()
    except UnicodeEncodeError:
        raise ShapecheckError(f"the prompt is not text in UTF-8: {prompt!a:.80}") from None
    make_folder(folder)
    with progress() as steps:
        steps("importing torch and diffusers")
        from shapecheck.pipelines import demo_report as report
        from shapecheck.pipelines.demo import draw_demo

        result = draw_demo(folder, **options, progress=steps)
    report.write_all(result, folder)
    write(report.render_json(result) if form == "json" else report.render_text(result, form), None)
    return 0 if result.passes else ContractError.exit_status
