"""Subcommands about engines: profile, build."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, get_args

import click

from shapecheck import ContractError
from shapecheck.artefact import contract_of
from shapecheck.cli.options import engine_options, find_contract, human_or_json, offline_option, output_option, source_options
from shapecheck.contract import Contract, ShapecheckError
from shapecheck.models.lookup import OtherModelError
from shapecheck.onnx.records import Check
from shapecheck.progress import Progress
from shapecheck.tensorrt.profile_formats import Tool
from shapecheck.tensorrt.profiles import Profile
from shapecheck.tensorrt.record import Target
from shapecheck.tensorrt.source import Sizes, examine, profiles_for
from shapecheck.terminal import progress, write


@dataclass(frozen=True, slots=True)
class Made:
    """Profiles, in the names of the file they are for."""

    contract: Contract
    profiles: tuple[Profile, ...]
    names: dict[str, str]
    """From the contract's name of an input to the file's."""
    broken: Check | None = None
    """What is wrong with an ONNX file, which then has no profiles."""
    fixed: frozenset[str] = frozenset()
    """Inputs that the file fixes on every axis: they are in no profile of the tools that build engines."""

    @property
    def dynamic(self) -> tuple[Profile, ...]:
        """The profiles without the inputs that never vary."""
        kept = [Profile(tuple(each for each in one.inputs if each.name not in self.fixed)) for one in self.profiles]
        return tuple(one for one in kept if one.inputs)


def profiles_of(
    model: str, wanted: Sizes, contract: Contract | None, *, control: bool = True, offline: bool, progress: Progress
) -> Made:
    """The profiles of a model, a saved contract or an ONNX file.

    `contract` is for an ONNX file that holds none. Raises ContractError where its graph cannot serve the sizes.
    """
    path = Path(model)
    if path.suffix.lower() != ".onnx":
        if contract is not None:
            raise ShapecheckError(f"--model says which UNet an ONNX file is; {path} is named by itself: drop --model")
        try:
            known = contract_of(model, offline=offline, progress=progress)
        except OtherModelError:
            raise ShapecheckError(f"{model} is a ControlNet: export it, and give the ONNX file; or name the UNet") from None
        known = known if control else replace(known, slots=())
        return Made(known, profiles_for(known, wanted), {})
    from shapecheck.tensorrt import build

    source, found = examine(path, contract, progress, control=control)
    if source is None:
        return Made(found.contract, (), {}, found)
    names = dict(source.names)
    profiles = profiles_for(source.contract, wanted, names)
    build.check(source, profiles, progress)
    fixed = (each.name for each in source.file.reading.inputs if each.dims and all(isinstance(dim, int) for dim in each.dims))
    return Made(source.contract, tuple(each.renamed(names) for each in profiles), names, None, frozenset(fixed))


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
    sizes: tuple[str, ...],
    batch: tuple[str, ...],
    tokens: str | None,
    contract: str | None,
    control: bool,
    tool: Tool | None,
    offline: bool,
    form: str,
    output: Path | None,
) -> int:
    """Print the optimization profiles of MODEL: min, opt and max of every dynamic input, all images of one range of sizes.

    MODEL is what `probe` takes, a saved contract, or FILE.onnx, whose own input names are then used and whose graph is
    tried at sizes of the range. Exit status 1 where the graph cannot serve them.

    \b
    Examples:
      shapecheck profile sd15 --sizes 384x384:512x512:768x768 --batch 1:2:4
      shapecheck profile unet.onnx --sizes 512x512:512x512:904x512 --for trtexec
      shapecheck profile contract.json --sizes 512x512 --sizes 768x768 --for ort --format json
    """
    from shapecheck.onnx import check_report
    from shapecheck.tensorrt import build_report as engine_report
    from shapecheck.tensorrt import profile_report as report
    from shapecheck.tensorrt import source as tensorrt_source

    wanted = tensorrt_source.Sizes(sizes, batch, tokens)
    try:
        with progress() as tell:
            expected = find_contract(contract, offline, tell)
            made = profiles_of(model, wanted, expected, control=control, offline=offline, progress=tell)
    except ContractError as error:
        write(engine_report.render_refusal(error, form), None)
        return error.exit_status
    if made.broken is not None:
        write(check_report.render_json(made.broken) if form == "json" else check_report.render_text(made.broken), None)
        return ContractError.exit_status
    if tool is not None and not made.dynamic:
        click.echo("every input of this file has one size: it needs no profile", err=True)
    if tool is not None:
        text = report.render_options(made.dynamic, tool, form)
    elif form == "json":
        text = report.render_json(made.contract, made.profiles)
    else:
        text = report.render_text(made.contract, made.profiles, made.names)
    write(text, output)
    return 0


@click.command()
@click.argument("file", type=click.Path(path_type=Path))
@click.option(
    "-o",
    "--output",
    type=click.Path(dir_okay=False, path_type=Path),
    metavar="ENGINE.plan",
    help="The engine to write. Its record goes to ENGINE.plan.shapecheck.json.",
)
@click.option(
    "--cache",
    type=click.Path(file_okay=False, path_type=Path),
    metavar="FOLDER",
    help="Instead of -o: keep the engine in this folder, under a name made of all that it depends on, or find it there.",
)
@engine_options
@click.option(
    "--profile",
    "profiles",
    type=click.Path(dir_okay=False, path_type=Path),
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
@click.option("--refittable", is_flag=True, help="Weights can be exchanged in the engine.")
@click.option("--version-compatible", is_flag=True, help="The engine runs with later versions of TensorRT too.")
@click.option("--tf32/--no-tf32", default=True, show_default=True, help="Let float32 products be computed in TF32.")
@click.option(
    "--timing-cache",
    type=click.Path(dir_okay=False, path_type=Path),
    metavar="FILE",
    help="Read TensorRT's timings from this file and add to it.  [default: none; with --cache one in that folder]",
)
@click.option("--force", is_flag=True, help="Build even where the same engine is there, unchanged.")
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

    Before TensorRT is loaded the graph is checked, and profiles and graph are held to the contract: exit status 1 and every
    fault where they disagree. Precision is that of the graph. An engine that is there already is found, not built again,
    unless weights, graph, sizes, options, TensorRT or GPU are others. `shapecheck doctor` says whether TensorRT runs here.

    \b
    Examples:
      shapecheck build unet.onnx -o unet.plan --sizes 512x512:768x768:1024x1024 --batch 1:2:4
      shapecheck build unet.onnx --cache engines --sizes 512x512 --sizes 904x512
      shapecheck build unet.onnx -o unet.plan --sizes 512x512 --target rtx --compute-capability 8.9
    """
    from shapecheck.onnx import check_report
    from shapecheck.tensorrt import build as tensorrt_build
    from shapecheck.tensorrt import build_report as report
    from shapecheck.tensorrt import source as tensorrt_source
    from shapecheck.tensorrt.record import BuildOptions

    wanted = tensorrt_source.Sizes(sizes, batch, tokens, profiles)
    try:
        with progress() as tell:
            source, found = tensorrt_source.examine(file, find_contract(contract, offline, tell), tell, control=control)
            if source is None:
                write(check_report.render_json(found) if form == "json" else check_report.render_text(found), None)
                return ContractError.exit_status
            built = tensorrt_build.build_engine(
                source,
                output,
                cache=cache,
                profiles=tensorrt_source.profiles_for(source.contract, wanted, dict(source.names)),
                options=BuildOptions(workspace=workspace << 20 if workspace else None, **options),
                timing_cache=timing_cache,
                force=force,
                progress=tell,
            )
    except ContractError as error:
        write(report.render_refusal(error, form), None)
        return error.exit_status
    if found.basis == "none":
        note = "no model was named and no preset fits: the contract is the file's own table; --model holds it to its UNet"
        built = replace(built, notes=(*built.notes, note))
    write(report.render_json(built) if form == "json" else report.render_text(built), None)
    return 0
