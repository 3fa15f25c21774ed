"""The command line: one small function a subcommand, thin over the library."""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Literal, get_args

import click

from shapecheck import ContractError, ShapecheckError, __version__

if TYPE_CHECKING:
    from shapecheck.observe.request import Request

Form = Literal["human", "json", "markdown"]
_format = click.option(
    "--format", "form", type=click.Choice(get_args(Form)), default="human", show_default=True, help="How to print."
)


class _Commands(click.Group):
    """Turns our errors into one message on stderr and their exit status; bugs stay tracebacks."""

    def invoke(self, ctx: click.Context) -> object:
        for stream in (sys.stdout, sys.stderr):
            if isinstance(stream, io.TextIOWrapper):
                stream.reconfigure(errors="backslashreplace")  # file names need not be text
        try:
            return super().invoke(ctx)
        except ShapecheckError as error:
            click.echo(f"error: {error}", err=True)
            ctx.exit(error.exit_status)


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
    "Repeat for several at once. Default: the ControlNet that MODEL implies.",
)
@click.option("--size", metavar="WxH", help="Show shapes at this image size in pixels, and observe it too.")
@click.option("--latent", metavar="HxW", help="The same in latent cells.")
@click.option("--batch", type=click.IntRange(min=1), default=1, show_default=True, help="Batch to show shapes at.")
@click.option("--offline", is_flag=True, help="Never ask the hub; use its local cache only.")
@_format
@click.option("-o", "--output", type=click.Path(dir_okay=False, path_type=Path), help="Write to this file instead of stdout.")
def probe(
    model: str,
    controlnets: tuple[str, ...],
    size: str | None,
    latent: str | None,
    batch: int,
    offline: bool,
    form: Form,
    output: Path | None,
) -> int:
    """Observe MODEL and its ControlNet, and print the exact slot table.

    MODEL is a preset (see `shapecheck presets`), a UNet's config.json, a diffusers folder, a hub id, or a probes/*.toml
    file. Nothing but configurations is read: no weights, no GPU, no code from the model.

    \b
    Examples:
      shapecheck probe sd15
      shapecheck probe sdxl --controlnet controlnet-sdxl-small --size 904x512
      shapecheck probe ./my-model --controlnet ./my-controlnet --format json -o contract.json
    """
    from shapecheck.observe import request as requests
    from shapecheck.report import contract as report

    request = _request(model, controlnets, size, latent, batch)
    with _progress() as progress:
        finding = requests.carry_out(request, offline=offline, progress=progress)
    if form == "json":
        text = report.as_json(finding.contract, finding.mismatches, finding.geometry)
    else:
        text = report.told(finding.contract, finding.mismatches, finding.geometry, form=form, claim=request.claim is not None)
    _write(text, output)
    return ContractError.exit_status if finding.mismatches else 0


@main.command()
@_format
def presets(form: str) -> int:
    """List the well-known models that can be named as MODEL or --controlnet."""
    from shapecheck.report import presets as report

    click.echo(report.told(form), nl=False)
    return 0


@main.result_callback()
@click.pass_context
def _exit(ctx: click.Context, /, status: int, **_: object) -> None:
    ctx.exit(status)


def _request(model: str, controlnets: tuple[str, ...], size: str | None, latent: str | None, batch: int) -> Request:
    from shapecheck.observe import request as requests

    path = Path(model)
    if path.suffix == ".toml" and os.path.isfile(path):  # noqa: PTH113  # Path.is_file raises on names too long
        if controlnets or size or latent:
            raise ShapecheckError(
                f"{path} says itself which ControlNet and size to probe; drop --controlnet, --size and --latent"
            )
        return requests.read(path)
    size_px = requests.parse_pair(size, "WxH in pixels") if size else None
    cells = requests.parse_pair(latent, "HxW in latent cells") if latent else None
    return requests.Request(model, controlnets, size_px, cells, batch)


def _say_nothing(_: str) -> None:
    """Progress where nobody watches."""


@contextmanager
def _progress() -> Iterator[Callable[[str], None]]:
    """Tell on stderr what is being done, one line overwritten, where a person is watching."""
    if not sys.stderr.isatty():
        yield _say_nothing
        return
    try:
        yield lambda step: click.echo(f"\r\x1b[2K{step} …", err=True, nl=False)
    finally:
        click.echo("\r\x1b[2K", err=True, nl=False)


def _write(text: str, output: Path | None) -> None:
    """To stdout, or to a file that appears under its name only when it is whole."""
    if output is None:
        click.echo(text, nl=False)
        return
    target = output.resolve()
    in_place = target.exists() and not target.is_file()  # a pipe or a device is written to, never replaced
    partial = target if in_place else target.with_name(f".{target.name[:100]}.{os.getpid()}.partial")
    try:
        partial.write_text(text, encoding="utf-8", errors="backslashreplace")
        if not in_place:
            partial.replace(target)
    except OSError as error:
        raise ShapecheckError(f"cannot write {output}: {error.strerror or error}") from None
    finally:
        if not in_place:
            partial.unlink(missing_ok=True)
