"""What several subcommands take."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Literal, get_args

import click

from shapecheck import ShapecheckError
from shapecheck.contract.geometry import parse_pair
from shapecheck.tensorrt.size_ranges import USUAL_TOKENS
from shapecheck.terminal import Steps

if TYPE_CHECKING:
    from shapecheck.contract import Contract
    from shapecheck.observe.request import Request

Form = Literal["human", "json", "markdown"]
format_option = click.option(
    "--format", "form", type=click.Choice(get_args(Form)), default="human", show_default=True, help="How to print."
)
human_or_json = click.option(
    "--format", "form", type=click.Choice(["human", "json"]), default="human", show_default=True, help="How to print."
)
offline_option = click.option("--offline", is_flag=True, help="Never ask the hub; use its local cache only.")
control_option = click.option(
    "--control/--no-control",
    default=True,
    help="--no-control: the UNet is taken without its slots, as `export --no-control` does.",
)
output_option = click.option(
    "-o", "--output", type=click.Path(dir_okay=False, path_type=Path), help="Write to this file instead of stdout."
)


def size_options(command: Callable[..., int]) -> Callable[..., int]:
    """The options that give the sizes of an engine."""
    for option in (
        click.option("--tokens", metavar="MIN:OPT:MAX", help=f"Text tokens, or one number.  [default: {USUAL_TOKENS}]"),
        click.option(
            "--batch",
            multiple=True,
            metavar="MIN:OPT:MAX",
            help="Batch, or one number; 2 for one image with classifier-free guidance. Once for all --sizes, or once "
            "for each.  [default: 1]",
        ),
        click.option(
            "--sizes",
            multiple=True,
            metavar="MIN:OPT:MAX",
            help="Image sizes, WxH in pixels each, or one size that never changes. Repeat for further profiles.",
        ),
    ):
        command = option(command)
    return command


def request_for(
    model: str,
    controlnets: tuple[str, ...],
    size: str | None,
    latent: str | None,
    batch: int | None,
    adapter: str | None = None,
) -> Request:
    """What to probe, as the command line or a .toml file says it. Raises ShapecheckError where that is no request."""
    from shapecheck.observe import request as requests

    path = Path(model)
    if path.suffix == ".toml" and os.path.isfile(path):  # noqa: PTH113  # Path.is_file raises on names too long
        if controlnets or any(each is not None for each in (size, latent, batch, adapter)):
            raise ShapecheckError(
                f"{path} says itself what to probe and at which size; drop --controlnet, --adapter, --size, --latent, --batch"
            )
        return requests.read(path)
    size_px = parse_pair(size, "WxH in pixels") if size is not None else None
    cells = parse_pair(latent, "HxW in latent cells") if latent is not None else None
    number = requests.checked_batch(1 if batch is None else batch, "--batch")
    return requests.Request(model, controlnets, adapter, size_px, cells, number)


def held_to(model: str | None, offline: bool, tell: Steps) -> Contract | None:
    """The contract of the model that an ONNX file is said to be of, if it is said."""
    from shapecheck.artefact import contract_of

    return contract_of(model, offline=offline, progress=tell) if model else None
