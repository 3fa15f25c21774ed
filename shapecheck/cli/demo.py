"""The subcommand that shows the whole road on generated input: demo."""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_args

import click

from shapecheck import ContractError, Geometry, ShapecheckError
from shapecheck.cli.options import Form, format_option, offline_option, read_size
from shapecheck.files import make_folder
from shapecheck.pipelines.demo_record import DemoBackend
from shapecheck.terminal import progress, write


@click.command()
@click.option(
    "--out",
    "folder",
    type=click.Path(file_okay=False, path_type=Path),
    metavar="FOLDER",
    required=True,
    help="Where pictures, page and exported file go.",
)
@click.option("--model", metavar="MODEL", help="A diffusers folder or hub id.  [default: a small model, random weights]")
@click.option("--controlnet", metavar="NAME", help="The same of a ControlNet; with --model.")
@click.option(
    "--image",
    type=click.Path(dir_okay=False, path_type=Path),
    metavar="FILE",
    help="A control image.  [default: a depth map that is made]",
)
@click.option("--prompt", metavar="TEXT", default="a red chair by the window", show_default=True, help="What to draw.")
@click.option(
    "--backend",
    type=click.Choice(get_args(DemoBackend)),
    default="ort",
    show_default=True,
    help="What runs the UNet; all but ort on a GPU, in float16.",
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
def demo(
    folder: Path,
    model: str | None,
    controlnet: str | None,
    prompt: str,
    size_px: tuple[int, int] | None,
    variant: str | None,
    form: Form,
    **options: Any,
) -> int:
    """Draw one picture in PyTorch, and again with the UNet exported and exchanged; compare, and show both on a page.

    Nothing is downloaded: a small model with random weights and a depth map are made here, and the pictures are textures.
    --model and --controlnet take real checkpoints. FOLDER then holds index.html, demo.json, demo.md, every picture, and the
    ONNX file or engine, which the next demo finds again. Exporting takes most of the time, about a minute or two.

    Exit status 0 where the pictures are the same and the ControlNet acts, 1 where not. In float16 the difference is told and
    not judged.

    \b
    Examples:
      shapecheck demo --out demo
      shapecheck demo --out demo --backend trt
      shapecheck demo --out demo --model ./sd15 --controlnet ./my-controlnet --image depth.png --prompt "a red chair"
    """
    if (model is None) != (controlnet is None):
        given, absent = ("--model", "--controlnet") if controlnet is None else ("--controlnet", "--model")
        raise ShapecheckError(f"{given} without {absent}: give both, or neither for a small model with random weights")
    if variant is not None and model is None:
        raise ShapecheckError("--variant says which files of --model are read: give --model and --controlnet too")
    if size_px is not None:
        Geometry.from_px(*size_px)  # raises if pixels do not fill whole latent cells
    try:
        prompt.encode()  # a command line may hold bytes that are not text, and no tokenizer takes them
    except UnicodeEncodeError:
        raise ShapecheckError(f"the prompt is no text in UTF-8: {prompt!a:.80}") from None
    make_folder(folder)
    with progress() as tell:
        tell("importing torch and diffusers")
        from shapecheck.pipelines import demo_report as report
        from shapecheck.pipelines.demo import draw_demo
        from shapecheck.pipelines.demo_report import write_all

        found = draw_demo(
            folder,
            model=model,
            controlnet=controlnet,
            prompt=prompt,
            size_px=size_px,
            variant=variant,
            progress=tell,
            **options,
        )
    write_all(found, folder)
    write(report.render_json(found) if form == "json" else report.render_text(found, form), None)
    return 0 if found.passes else ContractError.exit_status
