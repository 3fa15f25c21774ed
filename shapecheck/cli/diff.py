"""Subcommand about two models: diff."""

from __future__ import annotations

from pathlib import Path

import click

from shapecheck import ContractError
from shapecheck.cli.options import Form, format_option, offline_option, output_option
from shapecheck.files import refuse_unwritable
from shapecheck.terminal import progress, write


@click.command()
@click.argument("a", metavar="A")
@click.argument("b", metavar="B")
@offline_option
@format_option
@output_option
def diff(a: str, b: str, offline: bool, form: Form, output: Path | None) -> int:
    """Say everything in which the contracts of A and B differ, and what that means for a ControlNet made for one of them.

    Each is a UNet as `shapecheck probe` takes it (preset, config.json, diffusers folder, .safetensors checkpoint, hub id),
    or a file that holds a contract: one that `probe --format json -o` wrote, an ONNX file that shapecheck exported, an engine
    with its record.

    Exit status 0 says that the contracts are the same, 1 that they differ, 2 that one of them cannot be had.

    \b
    Examples:
      shapecheck diff sd15 sd21
      shapecheck diff ./my-model contract.json
      shapecheck diff sdxl unet.onnx --format json
    """
    from shapecheck import diff as report
    from shapecheck.artefact import contract_of

    if output is not None:
        refuse_unwritable(output)
    with progress() as tell:
        sides = [report.Side(each, contract_of(each, offline=offline, progress=tell)) for each in (a, b)]
    text = report.render_json(*sides) if form == "json" else report.render_text(*sides, form=form)
    write(text, output)
    return 0 if sides[0].contract == sides[1].contract else ContractError.exit_status
