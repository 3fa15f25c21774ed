"""Subcommands about models: probe, presets."""

from __future__ import annotations

from pathlib import Path

import click

from shapecheck import ContractError
from shapecheck.cli.options import Form, format_option, request_for, result_options
from shapecheck.terminal import progress, write


@click.command()
@click.argument("model")
@click.option(
    "--controlnet",
    "controlnets",
    multiple=True,
    metavar="NAME",
    help="A ControlNet: preset, diffusers folder, config.json, .safetensors file or hub id; or a UNet preset, for the "
    "ControlNet made for it. Repeat for several at once. A folder that MultiControlNetModel saved gives all of its "
    "ControlNets. Default: the ControlNet that MODEL implies.",
)
@click.option(
    "--adapter", metavar="NAME", help="A T2I-Adapter to observe too: preset, diffusers folder, config.json or hub id."
)
@click.option("--size", metavar="WxH", help="Show shapes at this image size in pixels, and observe it too.")
@click.option("--latent", metavar="HxW", help="The same in latent cells.")
@click.option("--batch", type=click.IntRange(min=1), help="Batch to show shapes at.  [default: 1]")
@result_options
def probe(
    model: str,
    controlnets: tuple[str, ...],
    adapter: str | None,
    size: str | None,
    latent: str | None,
    batch: int | None,
    offline: bool,
    form: Form,
    output: Path | None,
) -> int:
    """Observe MODEL and its ControlNet, and a T2I-Adapter if one is named, and print the exact slot table.

    MODEL is a preset (see `shapecheck presets`), a UNet's config.json, a diffusers folder, a .safetensors checkpoint, a hub id,
    or a probes/*.toml file. Nothing but configurations and the header of a checkpoint is read: no weights, no GPU, no code
    from the model. A .toml file holds `model` and any of `controlnet`, `adapter`, `size`, `latent`, `batch`, `mapping`
    (claimed shapes, instead of a ControlNet) and `story`; its `expect` is for tests and is not compared here.

    \b
    Examples:
      shapecheck probe sd15
      shapecheck probe sdxl --controlnet controlnet-sdxl-small --size 904x512
      shapecheck probe sdxl --adapter t2iadapter-sdxl
      shapecheck probe ./my-model --controlnet ./my-controlnet --format json -o contract.json
    """
    from shapecheck.observe import report
    from shapecheck.observe import request as requests

    request = request_for(model, controlnets, size, latent, batch, adapter)
    if request.mapping is not None:
        from shapecheck.cli.explain import render_mapping
        from shapecheck.explain.judge_mapping import judge_mapping

        with progress() as steps:
            judgement = judge_mapping(request, offline=offline, progress=steps)
        write(render_mapping(judgement, form), output)
        return ContractError.exit_status if judgement.mismatches else 0
    with progress() as steps:
        finding = requests.carry_out(request, offline=offline, progress=steps)
    if form == "json":
        text = report.render_json(finding.contract, finding.mismatches, finding.geometry)
    else:
        text = report.render_text(finding.contract, finding.mismatches, finding.geometry, form=form)
    write(text, output)
    return ContractError.exit_status if finding.mismatches else 0


@click.command()
@format_option
def presets(form: str) -> int:
    """List the well-known models that can be named as MODEL or --controlnet."""
    from shapecheck.report import presets as report

    write(report.render(form), None)
    return 0
