"""Options that several subcommands have."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import reduce
from pathlib import Path
from typing import TYPE_CHECKING, Literal, get_args

import click

from shapecheck import ShapecheckError
from shapecheck.contract.geometry import USUAL_TOKENS, parse_pair
from shapecheck.files import ensure_writable
from shapecheck.terminal import ProgressLine

if TYPE_CHECKING:
    from shapecheck.contract import Contract
    from shapecheck.observe.request import ProbeRequest

Form = Literal["human", "json", "markdown"]
Command = Callable[..., int]
FILE = click.Path(dir_okay=False, path_type=Path)
FOLDER = click.Path(file_okay=False, path_type=Path)


def read_size(_context: click.Context, _option: click.Parameter, text: str | None) -> tuple[int, int] | None:
    """Read an image size, as the callback of an option."""
    return parse_pair(text, "WxH in pixels") if text is not None else None


def read_names(_context: click.Context, _option: click.Parameter, text: str) -> tuple[str, ...]:
    """Read names with commas between them, as the callback of an option."""
    return tuple(name.strip() for name in text.split(",") if name.strip())


def _check_output(_context: click.Context, _option: click.Parameter, output: Path | None) -> Path | None:
    """Refuse a file that cannot be written before any work is done for it."""
    if output is not None:
        ensure_writable(output)
    return output


def choose_format(*forms: str) -> Callable[[Command], Command]:
    """Return the option for the format of the result."""
    return click.option("--format", "form", type=click.Choice(forms), default="human", show_default=True, help="How to print.")


format_option, human_or_json = choose_format(*get_args(Form)), choose_format("human", "json")
offline_option = click.option("--offline", is_flag=True, help="Never ask the hub; use its local cache only.")
output_option = click.option("-o", "--output", type=FILE, callback=_check_output, help="Write to this file instead of stdout.")
variant_option = click.option("--variant", metavar="NAME", help="Which of a checkpoint's files, such as fp16.")


def use_options(*options: Callable[[Command], Command]) -> Callable[[Command], Command]:
    """Return the decorator that adds several options to a command, in that order."""
    return lambda command: reduce(lambda decorated, option: option(decorated), reversed(options), command)


result_options = use_options(offline_option, format_option, output_option)
engine_options = use_options(
    click.option(
        "--sizes",
        multiple=True,
        metavar="MIN:OPT:MAX",
        help="Image sizes, WxH in pixels each, or one size that never changes. Repeat for further profiles.",
    ),
    click.option(
        "--batch",
        multiple=True,
        metavar="MIN:OPT:MAX",
        help="Batch, or one number; 2 for one image with classifier-free guidance. Once for all --sizes, or once "
        "for each.  [default: 1]",
    ),
    click.option("--tokens", metavar="MIN:OPT:MAX", help=f"Text tokens, or one number.  [default: {USUAL_TOKENS}]"),
)
size_options = use_options(
    click.option(
        "--sizes",
        multiple=True,
        metavar="MIN:OPT:MAX",
        help="Image sizes that have to work, WxH in pixels each, or one size. Repeatable.  [default: what the file takes]",
    ),
    click.option(
        "--batch",
        multiple=True,
        metavar="MIN:OPT:MAX",
        help="Batches that have to work, or one number. Once for all --sizes, or for each.  [default: what the file takes]",
    ),
    click.option(
        "--tokens",
        metavar="MIN:OPT:MAX",
        help="Text tokens that have to work, or one number.  [default: what the file takes]",
    ),
    click.option(
        "--multiple-of",
        type=click.IntRange(min=1),
        metavar="PIXELS",
        help="Image sides that are multiples of this have to work, and no others: 64 is 8 latent cells, 8 every latent size.",
    ),
)
source_options = use_options(
    click.option("--model", "contract", metavar="MODEL", help="The UNet of an ONNX file that holds no contract."),
    click.option(
        "--control/--no-control",
        default=True,
        help="--no-control: the UNet is taken without its slots, as `export --no-control` does.",
    ),
)


def request_for(
    model: str,
    controlnets: tuple[str, ...],
    size: str | None,
    latent: str | None,
    batch: int | None,
    adapter: str | None = None,
) -> ProbeRequest:
    """Return the request on the command line or in a .toml file. Raises ShapecheckError if there is none in it."""
    from shapecheck.observe import request as requests

    path = Path(model)
    if path.suffix == ".toml" and os.path.isfile(path):  # noqa: PTH113  # Path.is_file raises on names too long
        if controlnets or any(value is not None for value in (size, latent, batch, adapter)):
            raise ShapecheckError(
                f"{path} says itself what to probe and at which size; drop --controlnet, --adapter, --size, --latent, --batch"
            )
        return requests.read_request(path)
    size_px = parse_pair(size, "WxH in pixels") if size is not None else None
    cells = parse_pair(latent, "HxW in latent cells") if latent is not None else None
    number = requests.check_batch(1 if batch is None else batch, "--batch")
    return requests.ProbeRequest(model, controlnets, adapter, size_px, cells, number)


def find_contract(model: str | None, offline: bool, steps: ProgressLine) -> Contract | None:
    """Return the contract of the model that an option names, or None."""
    from shapecheck.artefact import resolve_contract

    return resolve_contract(model, offline=offline, progress=steps) if model else None
