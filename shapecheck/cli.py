"""The command line: one small function a subcommand, thin over the library."""

from __future__ import annotations

import io
import os
import shutil
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import click

from shapecheck import ContractError, ShapecheckError, __version__

if TYPE_CHECKING:
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
            _drop_stdout()
            status = ShapecheckError.exit_status
        except Exception:  # a bug of ours, or no place to print the help
            traceback.print_exc()
            _drop_stdout()
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
        _refuse_unwritable(output)
    with _progress() as progress:
        finding = requests.carry_out(request, offline=offline, progress=progress)
    claim = request.claim is not None
    if form == "json":
        text = report.as_json(finding.contract, finding.mismatches, finding.geometry, claim=claim)
    else:
        text = report.told(finding.contract, finding.mismatches, finding.geometry, form=form, claim=claim)
    _write(text, output)
    return ContractError.exit_status if finding.mismatches else 0


@main.command()
@_format
def presets(form: str) -> int:
    """List the well-known models that can be named as MODEL or --controlnet."""
    from shapecheck.report import presets as report

    _write(report.told(form), None)
    return 0


@main.result_callback()
@click.pass_context
def _exit(ctx: click.Context, /, status: int, **_: object) -> None:
    ctx.exit(status)


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
        _say(text)
        return
    target = output.resolve()
    in_place = _is_no_file(target)
    partial = target if in_place else target.with_name(f".{target.name[:100]}.{os.getpid()}.partial")
    try:
        partial.write_text(text, encoding="utf-8", errors="backslashreplace")
        if not in_place:
            if target.exists():
                shutil.copymode(target, partial)
            partial.replace(target)
    except OSError as error:
        raise ShapecheckError(f"cannot write {output}: {error.strerror or error}") from None
    finally:
        if not in_place:
            partial.unlink(missing_ok=True)


def _refuse_unwritable(output: Path) -> None:
    """Raise ShapecheckError before the work is done for nothing."""
    try:
        target = output.resolve()
        place = target if _is_no_file(target) else target.parent
        place.stat()
    except (OSError, RuntimeError) as error:
        raise ShapecheckError(f"cannot write {output}: {getattr(error, 'strerror', None) or error}") from None
    if place == target.parent and not place.is_dir():
        raise ShapecheckError(f"cannot write {output}: {place} is no folder")
    if not os.access(place, os.W_OK):
        raise ShapecheckError(f"cannot write {output}: no permission to write to {place}")


def _is_no_file(target: Path) -> bool:
    """A pipe or a device is written to, never replaced."""
    return target.exists() and not target.is_file()


def _say(text: str) -> None:
    if sys.stdout is None:
        raise ShapecheckError("cannot write to standard output: it is closed; -o FILE writes to a file")
    try:
        click.echo(text, nl=False)
    except OSError as error:
        _drop_stdout()
        raise ShapecheckError(f"cannot write to standard output: {error.strerror or error}") from None


def _drop_stdout() -> None:
    """What stdout still holds could not be written: the interpreter must not try again when it ends, and fail."""
    try:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (AttributeError, OSError, ValueError):  # no stdout, or one that is no file
        return
