"""Subcommands about models: probe, diff, presets."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

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
def probe(offline: bool, form: Form, output: Path | None, **options: Any) -> int:
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
    from shapecheck.observe.request import run_probe

    request = request_for(**options)
    if request.mapping is not None:
        from shapecheck.cli.explain import render_explanation
        from shapecheck.explain.diagnosis import Diagnosis
        from shapecheck.explain.judge_mapping import judge_mapping

        with progress() as steps:
            judgement = judge_mapping(request, offline=offline, progress=steps)
        write(render_explanation(Diagnosis((), judgement.models), [judgement], form), output)
        return ContractError.exit_status if judgement.mismatches else 0
    with progress() as steps:
        result = run_probe(request, offline=offline, progress=steps)
    if form == "json":
        text = report.render_json(result.contract, result.mismatches, result.geometry)
    else:
        text = report.render_text(result.contract, result.mismatches, result.geometry, form=form)
    write(text, output)
    return ContractError.exit_status if result.mismatches else 0


@click.command()
@click.argument("a", metavar="A")
@click.argument("b", metavar="B")
@result_options
def diff(a: str, b: str, offline: bool, form: Form, output: Path | None) -> int:
    """List everything in which the contracts of A and B differ, and what that means for a ControlNet made for one of them.

    Each is a UNet as `shapecheck probe` takes it (preset, config.json, diffusers folder, .safetensors checkpoint, hub id),
    or a file that holds a contract: one that `probe --format json -o` wrote, an ONNX file that shapecheck exported, an engine
    with its record.

    Exit status 0 if the contracts are the same, 1 if they differ, 2 if one of them cannot be had.

    \b
    Examples:
      shapecheck diff sd15 sd21
      shapecheck diff ./my-model contract.json
      shapecheck diff sdxl unet.onnx --format json
    """
    from shapecheck import diff as report
    from shapecheck.artefact import resolve_contract

    with progress() as steps:
        sides = [report.NamedContract(model, resolve_contract(model, offline=offline, progress=steps)) for model in (a, b)]
    write(report.render_json(*sides) if form == "json" else report.render_text(*sides, form=form), output)
    return 0 if sides[0].contract == sides[1].contract else ContractError.exit_status


@click.command()
@format_option
def presets(form: Form) -> int:
    """List the well-known models that can be named as MODEL or --controlnet."""
    from shapecheck import presets as known_presets
    from shapecheck.report.document import Document, Heading, Points, Table
    from shapecheck.report.numbers import dump_json

    models = [known_presets.load(name) for name in known_presets.names()]
    if form == "json":
        write(dump_json([asdict(model) for model in models], ascii_only=True), None)
        return 0
    statuses = {True: "checked", False: "unverified"}
    rows = [(model.name, model.kind, model.family, model.title, statuses[model.verified]) for model in models]
    table = Table(("preset", "kind", "family", "model", "config"), rows)
    checked = Points([f"{model.name}: {model.checked}" for model in models])
    write(Document("", [table, Heading("Where each config was checked"), checked]).render(form), None)
    return 0
