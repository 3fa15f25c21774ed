"""Subcommand about two models: diff."""

from __future__ import annotations

from pathlib import Path

import click

from shapecheck import ContractError
from shapecheck.cli.options import Form, result_options
from shapecheck.terminal import progress, write


@click.command()
@click.argument("a", metavar="A")
@click.argument("b", metavar="B")
@result_options
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

    with progress() as tell:
        sides = [report.Side(model, contract_of(model, offline=offline, progress=tell)) for model in (a, b)]
    text = report.render_json(*sides) if form == "json" else report.render_text(*sides, form=form)
    write(text, output)
    return 0 if sides[0].contract == sides[1].contract else ContractError.exit_status
