"""Subcommands about engines: profile, build, refit."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import click

from shapecheck import ContractError
from shapecheck.artefact import resolve_contract
from shapecheck.cli.options import (
    FILE,
    FOLDER,
    engine_options,
    find_contract,
    human_or_json,
    offline_option,
    output_option,
    source_options,
    variant_option,
)
from shapecheck.contract import Contract, ShapecheckError
from shapecheck.models.lookup import OtherModelError
from shapecheck.progress import Progress
from shapecheck.tensorrt.profile_formats import Tool
from shapecheck.tensorrt.profiles import Profile
from shapecheck.tensorrt.record import Target
from shapecheck.tensorrt.source import Sizes, examine, profiles_for
from shapecheck.terminal import progress, write


@click.command()
@click.argument("model")
@engine_options
@source_options
@click.option(
    "--for",
    "tool",
    type=click.Choice(get_args(Tool)),
    help="Print the options of Polygraphy's or trtexec's command line, or of ONNX Runtime's TensorRT provider.",
)
@offline_option
@human_or_json
@output_option
def profile(
    model: str,
    contract: str | None,
    control: bool,
    tool: Tool | None,
    offline: bool,
    form: str,
    output: Path | None,
    **sizes: Any,
) -> int:
    """Print the optimization profiles of MODEL: min, opt and max of every dynamic input, all images of one range of sizes.

    MODEL is what `probe` takes, a saved contract, or FILE.onnx, whose own input names are then used and whose graph is
    tried at sizes of the range. Exit status 1 if the graph cannot serve them.

    \b
    Examples:
      shapecheck profile sd15 --sizes 384x384:512x512:768x768 --batch 1:2:4
      shapecheck profile unet.onnx --sizes 512x512:512x512:904x512 --for trtexec
      shapecheck profile contract.json --sizes 512x512 --sizes 768x768 --for ort --format json
    """
    from shapecheck.tensorrt import build_report
    from shapecheck.tensorrt import profile_report as report

    requested, names, fixed = Sizes(**sizes), dict[str, str](), set[str]()
    try:
        with progress() as steps:
            expected = find_contract(contract, offline, steps)
            if Path(model).suffix.lower() != ".onnx":
                known = _find_unet(model, expected, control, offline, steps)
                profiles = profiles_for(known, requested)
            else:
                from shapecheck.onnx import check_report  # these need onnx, and presets do not
                from shapecheck.tensorrt.build import check as check_source

                source, check = examine(Path(model), expected, steps, control=control)
                if source is None:
                    steps.close()
                    write(check_report.render_json(check) if form == "json" else check_report.render_text(check), None)
                    return ContractError.exit_status
                known, names = source.contract, dict(source.names)
                profiles = profiles_for(known, requested, names)
                check_source(source, profiles, steps)
                profiles = tuple(served.renamed(names) for served in profiles)
                declared = source.file.reading.inputs
                fixed = {item.name for item in declared if item.dims and all(isinstance(dim, int) for dim in item.dims)}
    except ContractError as error:
        write(build_report.render_refusal(error, form), None)
        return error.exit_status
    if tool is not None:
        # The tools that build engines take no range for an input that the file fixes on every axis.
        ranged = [Profile(tuple(bounds for bounds in served.inputs if bounds.name not in fixed)) for served in profiles]
        ranged = [served for served in ranged if served.inputs]
        if not ranged:
            click.echo("every input of this file has one size: it needs no profile", err=True)
        text = report.render_options(ranged, tool, form)
    else:
        text = report.render_json(known, profiles) if form == "json" else report.render_text(known, profiles, names)
    write(text, output)
    return 0


def _find_unet(model: str, expected: Contract | None, control: bool, offline: bool, steps: Progress) -> Contract:
    """Return the contract of a model or of a saved contract, without its slots if there is no control."""
    if expected is not None:
        raise ShapecheckError(f"--model says which UNet an ONNX file is; {model} is named by itself: drop --model")
    try:
        contract = resolve_contract(model, offline=offline, progress=steps)
    except OtherModelError:
        raise ShapecheckError(f"{model} is a ControlNet: export it, and give the ONNX file; or name the UNet") from None
    return contract if control else replace(contract, slots=())


@click.command()
@click.argument("file", type=click.Path(path_type=Path))
@click.option(
    "-o",
    "--output",
    type=FILE,
    metavar="ENGINE.plan",
    help="The engine to write. Its record goes to ENGINE.plan.shapecheck.json.",
)
@click.option(
    "--cache",
    type=FOLDER,
    metavar="FOLDER",
    help="Instead of -o: keep the engine in this folder, under a name made of all that it depends on, or find it there.",
)
@engine_options
@click.option(
    "--profile",
    "profiles",
    type=FILE,
    metavar="FILE.json",
    help="Profiles that `shapecheck profile --format json` wrote, instead of --sizes.",
)
@source_options
@click.option(
    "--target",
    type=click.Choice(get_args(Target)),
    default="trt",
    show_default=True,
    help="TensorRT, which builds for the GPU it runs on; or TensorRT for RTX, which builds on any machine.",
)
@click.option(
    "--compute-capability",
    "compute_capabilities",
    multiple=True,
    metavar="N.N",
    help="With --target rtx: a GPU to build for, such as 8.9. Repeatable.  [default: every one it supports but 7.5]",
)
@click.option(
    "--optimization-level",
    type=click.IntRange(0, 5),
    help="How long TensorRT searches for fast kernels.  [default: TensorRT's]",
)
@click.option("--workspace", type=click.IntRange(min=1), metavar="MiB", help="Scratch memory a layer may use.  [default: all]")
@click.option("--refittable", is_flag=True, help="Weights can be exchanged in the engine, with `shapecheck refit`.")
@click.option("--version-compatible", is_flag=True, help="The engine runs with later versions of TensorRT too.")
@click.option("--tf32/--no-tf32", default=True, show_default=True, help="Let float32 products be computed in TF32.")
@click.option(
    "--timing-cache",
    type=FILE,
    metavar="FILE",
    help="Read TensorRT's timings from this file and add to it.  [default: none; with --cache one in that folder]",
)
@click.option("--force", is_flag=True, help="Build even if the same engine is there, unchanged.")
@offline_option
@human_or_json
def build(
    file: Path,
    output: Path | None,
    cache: Path | None,
    sizes: tuple[str, ...],
    batch: tuple[str, ...],
    tokens: str | None,
    profiles: Path | None,
    contract: str | None,
    control: bool,
    workspace: int | None,
    timing_cache: Path | None,
    force: bool,
    offline: bool,
    form: str,
    **options: Any,
) -> int:
    """Build the TensorRT engine of FILE.onnx, for a range of sizes.

    Before TensorRT is loaded the graph is checked, and profiles and graph are compared with the contract: exit status 1 and
    every fault if they disagree. Precision is that of the graph. An engine that is there already is found, not built again,
    unless weights, graph, sizes, options, TensorRT or GPU have changed. `shapecheck doctor` says whether TensorRT runs here.

    \b
    Examples:
      shapecheck build unet.onnx -o unet.plan --sizes 512x512:768x768:1024x1024 --batch 1:2:4
      shapecheck build unet.onnx --cache engines --sizes 512x512 --sizes 904x512
      shapecheck build unet.onnx -o unet.plan --sizes 512x512 --target rtx --compute-capability 8.9
    """
    from shapecheck.onnx import check_report
    from shapecheck.tensorrt import build_report as report
    from shapecheck.tensorrt.build import build_engine
    from shapecheck.tensorrt.record import BuildOptions

    requested = Sizes(sizes, batch, tokens, profiles)
    try:
        with progress() as steps:
            source, check = examine(file, find_contract(contract, offline, steps), steps, control=control)
            if source is None:
                steps.close()
                write(check_report.render_json(check) if form == "json" else check_report.render_text(check), None)
                return ContractError.exit_status
            built = build_engine(
                source,
                output,
                cache=cache,
                profiles=profiles_for(source.contract, requested, dict(source.names)),
                options=BuildOptions(workspace=workspace << 20 if workspace else None, **options),
                timing_cache=timing_cache,
                force=force,
                progress=steps,
            )
    except ContractError as error:
        write(report.render_refusal(error, form), None)
        return error.exit_status
    if check.basis == "none":
        note = "no model was named and no preset fits: the contract is the file's own table; --model holds it to its UNet"
        built = replace(built, notes=(*built.notes, note))
    write(report.render_json(built) if form == "json" else report.render_text(built), None)
    return 0


@click.command()
@click.argument("engine", type=click.Path(path_type=Path))
@click.option(
    "--model",
    required=True,
    metavar="MODEL",
    help="Whose weights it gets: FILE.onnx of the same graph, as `rebind` writes it, or a model, as `export` takes it.",
)
@click.option("-o", "--output", type=FILE, metavar="ENGINE.plan", help="The engine to write.  [default: ENGINE itself]")
@variant_option
@offline_option
@human_or_json
def refit(engine: Path, model: str, output: Path | None, form: str, **options: Any) -> int:
    """Exchange the weights of ENGINE, which was built --refittable, for those of another model with the same graph.

    Takes seconds on the GPU that it was built for, where a build takes minutes: for another LoRA. Its record then names the new
    weights; `shapecheck parity MODEL --engine ENGINE` compares it with PyTorch. A weight that TensorRT folded into something
    else is named, and nothing is changed.

    \b
    Examples:
      shapecheck build unet.onnx -o unet.plan --sizes 512x512 --refittable
      shapecheck refit unet.plan --model ./sd15-with-lora
      shapecheck refit unet.plan --model rebound.onnx -o other.plan
    """
    from shapecheck.tensorrt import build_report as report
    from shapecheck.tensorrt.refit import refit as exchange

    with progress() as steps:
        built = exchange(engine, model, output, **options, progress=steps)
    text = report.render_text(built, f"REFITTED: in {built.seconds:.0f} s")
    write(report.render_json(built) if form == "json" else text, None)
    return 0
