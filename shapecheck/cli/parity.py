"""The subcommand that compares numbers: parity."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import click

from shapecheck import ContractError
from shapecheck.cli.options import (
    Form,
    choose_format,
    offline_option,
    output_option,
    read_names,
    size_options,
    variant_option,
)
from shapecheck.doctor.environment import BACKENDS
from shapecheck.files import make_folder
from shapecheck.terminal import progress, write


@click.command()
@click.argument("model")
@click.option("--onnx", metavar="FILE", help="An ONNX file made of MODEL.")
@click.option("--engine", metavar="PLAN", help="An engine made of it, with its record; --onnx then is what it was built from.")
@click.option(
    "--backends",
    metavar="NAMES",
    default="",
    callback=read_names,
    help=f"What to run, with commas: {', '.join(BACKENDS)}.  [default: ort for --onnx, trt or rtx for --engine]",
)
@click.option(
    "--controlnet", metavar="NAME", help="A ControlNet with weights whose residuals are used.  [default: random residuals]"
)
@size_options
@click.option("--seed", type=int, default=0, show_default=True, help="Of the random inputs.")
@click.option(
    "--times-own",
    type=float,
    default=4.0,
    show_default=True,
    help="How many times as far from the reference as PyTorch itself, in that precision, a backend may be; half with --fp8.",
)
@click.option(
    "--reference",
    type=click.Choice(["auto", "float64", "float32"]),
    default="auto",
    show_default=True,
    help="PyTorch's precision; auto is float64 if memory allows it, float32 for half precision.",
)
@click.option(
    "--fp8",
    type=click.Path(dir_okay=False, path_type=Path),
    metavar="CALIBRATION.json",
    help="The calibration that the file was exported with: PyTorch's own error is then that of the same layers in fp8.",
)
@variant_option
@offline_option
@click.option(
    "--report",
    type=click.Path(file_okay=False, path_type=Path),
    metavar="FOLDER",
    help="Write parity.html, parity.md and parity.json there, and what reproduces a difference with Polygraphy alone.",
)
@choose_format("human", "json", "markdown", "html")
@output_option
def parity(report: Path | None, form: Form | Literal["html"], output: Path | None, **options: Any) -> int:
    """Compare the files made of MODEL with MODEL in PyTorch, number by number and slot by slot.

    MODEL is a diffusers folder or hub id with weights. Each slot and each base input is perturbed alone, and has to change
    the image as it does in PyTorch: what is swapped, dropped, scaled or baked is named. Control on, off and switched, halves
    of a batch, several sizes: those that --sizes, --batch, --tokens and --multiple-of request, each alone or together, and for
    the rest an engine's own profiles, else small sizes that the file takes. If an image differs, the first value inside that
    does is looked for. Of a ControlNet every residual is compared and every input perturbed.

    Exit status 0 for PARITY, 1 for BROKEN, a backend that cannot run included, 2 if nothing could be compared.

    \b
    Examples:
      shapecheck parity ./sd15 --onnx ./sd15/unet.onnx
      shapecheck parity ./sd15 --onnx ./sd15/unet.onnx --sizes 320x192:512x512:768x768 --batch 1:2:4 --report parity
      shapecheck parity ./sd15 --onnx theirs.onnx --batch 4 --multiple-of 64
      shapecheck parity ./sd15 --onnx unet.onnx --engine unet.plan --backends ort,trt --controlnet ./my-controlnet
    """
    from shapecheck.parity import report as parity_report
    from shapecheck.parity.page import render_page
    from shapecheck.parity.report import write_all
    from shapecheck.parity.request import ParityRequest, create_run

    if report is not None:
        make_folder(report)
    with progress(log_every=10.0) as tell:
        result = create_run(ParityRequest(**options, folder=report), tell).report()
    if report is not None:
        write_all(result, report)
    if form == "html":
        text = render_page(result)
    else:
        text = parity_report.render_json(result) if form == "json" else parity_report.render_text(result, form)
    write(text, output)
    return 0 if result.passes else ContractError.exit_status
