"""The subcommand that compares numbers: parity."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from shapecheck import ContractError
from shapecheck.cli.options import offline_option, output_option, size_options
from shapecheck.doctor.environment import BACKENDS
from shapecheck.files import make_folder, refuse_unwritable
from shapecheck.terminal import progress, write

if TYPE_CHECKING:
    from shapecheck.observe.subject import Precision
    from shapecheck.parity.results import Parity


@click.command()
@click.argument("model")
@click.option("--onnx", metavar="FILE", help="An ONNX file made of MODEL.")
@click.option("--engine", metavar="PLAN", help="An engine made of it, with its record; --onnx then is what it was built from.")
@click.option(
    "--backends",
    metavar="NAMES",
    default="",
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
    help="How many times as far from the reference as PyTorch itself, in the file's precision, a backend may be.",
)
@click.option(
    "--reference",
    type=click.Choice(["auto", "float64", "float32"]),
    default="auto",
    show_default=True,
    help="PyTorch's precision; auto is float64 where memory allows it.",
)
@click.option("--variant", metavar="NAME", help="Which of a checkpoint's files, such as fp16.")
@offline_option
@click.option(
    "--report",
    type=click.Path(file_okay=False, path_type=Path),
    metavar="FOLDER",
    help="Write parity.html, parity.md and parity.json there, and what reproduces a difference with Polygraphy alone.",
)
@click.option(
    "--format",
    "form",
    type=click.Choice(["human", "json", "markdown", "html"]),
    default="human",
    show_default=True,
    help="How to print.",
)
@output_option
def parity(
    model: str,
    onnx: str | None,
    engine: str | None,
    backends: str,
    controlnet: str | None,
    sizes: tuple[str, ...],
    batch: tuple[str, ...],
    tokens: str | None,
    seed: int,
    times_own: float,
    reference: Precision,
    variant: str | None,
    offline: bool,
    report: Path | None,
    form: str,
    output: Path | None,
) -> int:
    """Compare the files made of MODEL with MODEL in PyTorch, number by number and slot by slot.

    MODEL is a diffusers folder or hub id with weights. Each slot and each base input is perturbed alone, and has to change
    the image as it does in PyTorch: what is swapped, dropped, scaled or baked is named. Control on, off and switched, halves
    of a batch, several sizes. Without --sizes an engine's own profiles, else three small sizes. Where an image differs, the
    first value inside that does is looked for.

    Exit status 0 for PARITY, 1 for BROKEN, a backend that cannot run included, 2 where nothing could be compared.

    \b
    Examples:
      shapecheck parity ./sd15 --onnx ./sd15/unet.onnx
      shapecheck parity ./sd15 --onnx ./sd15/unet.onnx --sizes 320x192:512x512:768x768 --batch 1:2:4 --report parity
      shapecheck parity ./sd15 --onnx unet.onnx --engine unet.plan --backends ort,trt --controlnet ./my-controlnet
    """
    from shapecheck.parity.report import write_all
    from shapecheck.parity.request import ParityRequest, study_of

    if output is not None:
        refuse_unwritable(output)
    if report is not None:
        make_folder(report)
    names = tuple(each.strip() for each in backends.split(",") if each.strip())
    request = ParityRequest(
        model, onnx, engine, names, controlnet, sizes, batch, tokens, seed, times_own, reference, variant, offline, report
    )
    with progress() as tell:
        found = study_of(request, tell).report()
    if report is not None:
        write_all(found, report)
    write(_told(found, form), output)
    return 0 if found.passes else ContractError.exit_status


def _told(found: Parity, form: str) -> str:
    from shapecheck.parity import report as text

    if form == "json":
        return text.render_json(found)
    if form == "html":
        from shapecheck.parity.page import render_page

        return render_page(found)
    return text.render_text(found, "markdown" if form == "markdown" else "human")
