"""The command line: one small function a subcommand, thin over the library."""

from __future__ import annotations

import io
import os
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import click

from shapecheck import ContractError, ShapecheckError, __version__, extras
from shapecheck.contract.naming import SCHEMES, SHAPECHECK
from shapecheck.files import refuse_unwritable
from shapecheck.terminal import drop_stdout, progress, write

if TYPE_CHECKING:
    from shapecheck.contract.exported import Agreement, Exported, Weights
    from shapecheck.observe.request import Request

Form = Literal["human", "json", "markdown"]
_format = click.option(
    "--format", "form", type=click.Choice(get_args(Form)), default="human", show_default=True, help="How to print."
)
_INTERRUPTED = 130


class _Commands(click.Group):
    """Turns our errors into one message on stderr and their exit status; bugs stay tracebacks, and end in 2."""

    def main(
        self,
        args: Sequence[str] | None = None,
        prog_name: str | None = None,
        complete_var: str | None = None,
        standalone_mode: bool = True,
        **extra: Any,
    ) -> Any:
        """Run a command line. Status 1 says that shapes disagree, so nothing that goes wrong here may end in it."""
        if not standalone_mode:
            return super().main(args, prog_name, complete_var, standalone_mode=False, **extra)
        try:
            status = super().main(args, prog_name, complete_var, standalone_mode=False, **extra)
        except click.Abort:
            status = _INTERRUPTED
        except click.ClickException as error:
            error.show()
            status = ShapecheckError.exit_status
        except SystemExit:  # click's own answer to a closed pipe
            drop_stdout()
            status = ShapecheckError.exit_status
        except Exception:  # a bug of ours, or no place to print the help
            traceback.print_exc()
            drop_stdout()
            status = ShapecheckError.exit_status
        sys.exit(status)

    def invoke(self, ctx: click.Context) -> object:
        for stream in (sys.stdout, sys.stderr):
            if isinstance(stream, io.TextIOWrapper):
                stream.reconfigure(errors="backslashreplace")  # file names need not be text
        try:
            return super().invoke(ctx)
        except ShapecheckError as error:
            click.echo(f"error: {error}", err=True)
            ctx.exit(error.exit_status)
        except ModuleNotFoundError as error:
            problem = extras.missing(error, "this command")
            if problem is error:
                raise
            click.echo(f"error: {problem}", err=True)
            ctx.exit(ShapecheckError.exit_status)


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__, prog_name="shapecheck")
def main() -> None:
    """Verify the shapes that ControlNets and diffusion UNets agree on, from PyTorch to ONNX Runtime to TensorRT.

    Exit status: 0 fine, 1 the contract is broken, 2 it could not run.
    """


@main.command()
@click.argument("model")
@click.option(
    "--controlnet",
    "controlnets",
    multiple=True,
    metavar="NAME",
    help="A ControlNet: preset, diffusers folder, config.json or hub id; or a UNet preset, for the ControlNet made for it. "
    "Repeat for several at once. A folder that MultiControlNetModel saved gives all of its ControlNets. "
    "Default: the ControlNet that MODEL implies.",
)
@click.option("--size", metavar="WxH", help="Show shapes at this image size in pixels, and observe it too.")
@click.option("--latent", metavar="HxW", help="The same in latent cells.")
@click.option("--batch", type=click.IntRange(min=1), help="Batch to show shapes at.  [default: 1]")
@click.option("--offline", is_flag=True, help="Never ask the hub; use its local cache only.")
@_format
@click.option("-o", "--output", type=click.Path(dir_okay=False, path_type=Path), help="Write to this file instead of stdout.")
def probe(
    model: str,
    controlnets: tuple[str, ...],
    size: str | None,
    latent: str | None,
    batch: int | None,
    offline: bool,
    form: Form,
    output: Path | None,
) -> int:
    """Observe MODEL and its ControlNet, and print the exact slot table.

    MODEL is a preset (see `shapecheck presets`), a UNet's config.json, a diffusers folder, a hub id, or a probes/*.toml
    file. Nothing but configurations is read: no weights, no GPU, no code from the model. A .toml file holds `model` and
    any of `controlnet`, `size`, `latent`, `batch`, `mapping` (claimed shapes, instead of a ControlNet) and `story`; its
    `expect` is for tests and is not compared here.

    \b
    Examples:
      shapecheck probe sd15
      shapecheck probe sdxl --controlnet controlnet-sdxl-small --size 904x512
      shapecheck probe ./my-model --controlnet ./my-controlnet --format json -o contract.json
    """
    from shapecheck.observe import request as requests
    from shapecheck.report import contract as report

    request = _request(model, controlnets, size, latent, batch)
    if output is not None:
        refuse_unwritable(output)
    with progress() as steps:
        finding = requests.carry_out(request, offline=offline, progress=steps)
    claim = request.claim is not None
    if form == "json":
        text = report.as_json(finding.contract, finding.mismatches, finding.geometry, claim=claim)
    else:
        text = report.told(finding.contract, finding.mismatches, finding.geometry, form=form, claim=claim)
    write(text, output)
    return ContractError.exit_status if finding.mismatches else 0


@main.command()
@click.argument("model")
@click.option(
    "-o",
    "--output",
    required=True,
    type=click.Path(dir_okay=False, path_type=Path),
    metavar="FILE.onnx",
    help="The file to write.",
)
@click.option(
    "--weights",
    type=click.Choice(["link", "copy", "none"]),
    help="Point into the checkpoint's own safetensors, which FILE.onnx must lie beside or above; copy them to FILE.onnx.data; "
    "or write the structure alone.  [default: link where that is possible, else copy]",
)
@click.option(
    "--dtype",
    type=click.Choice(["float32", "float16", "bfloat16"]),
    help="Precision of the graph and its weights.  [default: the checkpoint's]",
)
@click.option("--opset", type=int, metavar="N", help="ONNX opset, 18 to 23.  [default: 20; 22 for bfloat16]")
@click.option("--control/--no-control", default=True, show_default=True, help="With one input a slot, or with none.")
@click.option(
    "--naming",
    type=click.Choice([naming.key for naming in SCHEMES]),
    default=SHAPECHECK.key,
    show_default=True,
    help="Whose names for the slots.",
)
@click.option("--variant", metavar="NAME", help="Which of a checkpoint's files, such as fp16.")
@click.option(
    "--verify/--no-verify",
    default=False,
    show_default=True,
    help="Compare with PyTorch afterwards, in ONNX Runtime on the CPU, at two sizes. This loads the weights.",
)
@click.option("--offline", is_flag=True, help="Never ask the hub; use its local cache only.")
@click.option(
    "--format", "form", type=click.Choice(["human", "json"]), default="human", show_default=True, help="How to print."
)
def export(
    model: str,
    output: Path,
    weights: Weights | None,
    dtype: str | None,
    opset: int | None,
    control: bool,
    naming: str,
    variant: str | None,
    verify: bool,
    offline: bool,
    form: str,
) -> int:
    """Write MODEL to an ONNX file that is right at every size, without loading its weights.

    MODEL is a diffusers folder, a config.json, a hub id or a preset: of a UNet, which gets one input a slot, or of a
    ControlNet, which gets one output a slot and conditioning_scale as an input. The file carries its contract; `shapecheck
    check FILE.onnx` reads it. Half a minute for SD1.5, two for SDXL; less than 1 GB of memory.

    \b
    Examples:
      shapecheck export ./sd15 -o ./sd15/unet.onnx
      shapecheck export ./sd15 -o unet_fp16.onnx --dtype float16 --verify
      shapecheck export ./my-controlnet -o controlnet.onnx --weights copy
      shapecheck export sdxl -o sdxl.onnx --weights none
    """
    from shapecheck.build import export as exporter
    from shapecheck.report import exported as report

    if verify:
        _refuse_unverifiable(dtype, weights)
    with progress() as steps:
        done = exporter.export(
            model,
            output,
            weights=weights,
            dtype=dtype,
            opset=opset,
            control=control,
            naming=naming,
            variant=variant,
            offline=offline,
            progress=steps,
        )
    try:
        agreements = _verified(done, model, variant, offline) if verify else ()
    except ShapecheckError:  # the file is written all the same
        write(report.as_json(done) if form == "json" else report.told(done), None)
        raise
    write(report.as_json(done, agreements) if form == "json" else report.told(done, agreements), None)
    return 0 if all(each.agrees for each in agreements) else ContractError.exit_status


@main.command()
@click.argument("file", type=click.Path(path_type=Path))
@click.option("--model", metavar="MODEL", help="The UNet it should be: what `probe` takes, or a file that holds a contract.")
@click.option(
    "--controlnet", "controlnets", multiple=True, metavar="NAME", help="Say too whether this ControlNet fits. Repeatable."
)
@click.option("--size", metavar="WxH", help="Only this image size in pixels has to work.")
@click.option("--latent", metavar="HxW", help="The same in latent cells.")
@click.option("--batch", type=click.IntRange(min=1), default=1, show_default=True, help="Batch, with --size or --latent.")
@click.option("--offline", is_flag=True, help="Never ask the hub; use its local cache only.")
@_format
@click.option("-o", "--output", type=click.Path(dir_okay=False, path_type=Path), help="Write to this file instead of stdout.")
def check(
    file: Path,
    model: str | None,
    controlnets: tuple[str, ...],
    size: str | None,
    latent: str | None,
    batch: int,
    offline: bool,
    form: Form,
    output: Path | None,
) -> int:
    """Say what is wrong with FILE.onnx, a UNet with ControlNet inputs that anybody exported.

    Reads the graph and no weights. Without --model the file is held to the contract inside it, else to the preset it fits
    best, else to itself. Without --size every size that the contract allows has to work. A ControlNet's file is held to
    the contract inside it, or its outputs to the UNet of --model.

    Exit status 0 says that the file is fine, 1 that something is wrong. It is 2, and the verdict NOT CHECKED, where nothing
    was found wrong but sizes could not be followed through the graph.

    \b
    Examples:
      shapecheck check unet.onnx
      shapecheck check unet.onnx --model sdxl --controlnet controlnet-sdxl-small
      shapecheck check unet.onnx --model ./my-model --size 904x512 --format json
    """
    from shapecheck.build.artefact import contract_inside
    from shapecheck.observe.request import geometry_of
    from shapecheck.report import check as report
    from shapecheck.verify.check import check as verify
    from shapecheck.verify.models import contract_of, misfits

    request = _request("", (), size, latent, batch)
    if output is not None:
        refuse_unwritable(output)
    with progress() as tell:
        contract = contract_of(model, offline=offline, progress=tell) if model else None
        known = contract or (contract_inside(file) if size else None)
        asked = geometry_of(request, known.header.vae_factor if known else 8)
        checked = verify(file, contract, asked, progress=tell)
        found = misfits(checked.contract, controlnets, asked, offline=offline, progress=tell) if controlnets else ()
    if form == "json":
        text = report.as_json(checked, controlnets=controlnets, misfits=found)
    else:
        text = report.told(checked, form=form, controlnets=controlnets, misfits=found)
    write(text, output)
    if checked.mismatches or found:
        return ContractError.exit_status
    return ShapecheckError.exit_status if checked.unchecked else 0


@main.command()
@_format
def presets(form: str) -> int:
    """List the well-known models that can be named as MODEL or --controlnet."""
    from shapecheck.report import presets as report

    write(report.told(form), None)
    return 0


@main.result_callback()
@click.pass_context
def _exit(ctx: click.Context, /, status: int, **_: object) -> None:
    ctx.exit(status)


def _refuse_unverifiable(dtype: str | None, weights: Weights | None) -> None:
    from shapecheck.verify import agreement

    agreement.refuse_unverifiable(dtype, weights)


def _verified(exported: Exported, model: str, variant: str | None, offline: bool) -> tuple[Agreement, ...]:
    from shapecheck.verify import agreement

    needed = agreement.memory_needed(exported) / 1e9
    click.echo(f"verifying: up to {needed:.1f} GB of memory, PyTorch and ONNX Runtime one after the other", err=True)
    with progress() as steps:
        return agreement.verify(exported, model, variant=variant, offline=offline, progress=steps)


def _request(model: str, controlnets: tuple[str, ...], size: str | None, latent: str | None, batch: int | None) -> Request:
    from shapecheck.observe import request as requests

    path = Path(model)
    if path.suffix == ".toml" and os.path.isfile(path):  # noqa: PTH113  # Path.is_file raises on names too long
        if controlnets or size is not None or latent is not None or batch is not None:
            raise ShapecheckError(
                f"{path} says itself what to probe and at which size; drop --controlnet, --size, --latent and --batch"
            )
        return requests.read(path)
    size_px = requests.parse_pair(size, "WxH in pixels") if size is not None else None
    cells = requests.parse_pair(latent, "HxW in latent cells") if latent is not None else None
    number = requests.checked_batch(1 if batch is None else batch, "--batch")
    return requests.Request(model, controlnets, size_px, cells, number)
