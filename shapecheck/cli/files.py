"""Subcommands about files: export, check."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from shapecheck import ContractError, ShapecheckError
from shapecheck.cli.options import (
    Form,
    human_or_json,
    offline_option,
    request_for,
    result_options,
    variant_option,
)
from shapecheck.contract.naming import SCHEMES, SHAPECHECK
from shapecheck.tensorrt.record import find_record, is_engine
from shapecheck.terminal import progress, write

if TYPE_CHECKING:
    from shapecheck.observe.request import ProbeRequest
    from shapecheck.onnx.records import Agreement


@click.command()
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
@click.option("--adapter", is_flag=True, help="With one input for each feature of the T2I-Adapter that a UNet implies.")
@click.option(
    "--naming",
    type=click.Choice([naming.key for naming in SCHEMES]),
    default=SHAPECHECK.key,
    show_default=True,
    help="Whose names for the slots.",
)
@click.option(
    "--fp8",
    type=click.Path(dir_okay=False, path_type=Path),
    metavar="CALIBRATION.json",
    help="Let TensorRT compute the layers of this calibration in fp8, which is less exact: `shapecheck.calibrate` makes one.",
)
@variant_option
@click.option(
    "--verify/--no-verify",
    default=False,
    show_default=True,
    help="Compare with PyTorch afterwards, in ONNX Runtime on the CPU, at two sizes. This loads the weights.",
)
@offline_option
@human_or_json
def export(model: str, output: Path, verify: bool, form: str, **options: Any) -> int:
    """Write MODEL to an ONNX file that is right at every size, without loading its weights.

    MODEL is a diffusers folder, a config.json, a hub id or a preset: of a UNet, which gets one input a slot, or of a
    ControlNet, which gets one output a slot and conditioning_scale as an input. The file carries its contract; `shapecheck
    check FILE.onnx` reads it. Half a minute for SD1.5, two for SDXL; less than 1 GB of memory.

    \b
    Examples:
      shapecheck export ./sd15 -o ./sd15/unet.onnx
      shapecheck export ./sd15 -o unet_fp16.onnx --dtype float16 --verify
      shapecheck export ./sd15 -o unet.onnx --adapter
      shapecheck export ./my-controlnet -o controlnet.onnx --weights copy
      shapecheck export sdxl -o sdxl.onnx --weights none
      shapecheck export ./sd15 -o ./sd15/unet_fp8.onnx --dtype float16 --fp8 calibration.json
    """
    from shapecheck.onnx import export as exporter
    from shapecheck.onnx import export_report as report
    from shapecheck.parity import export_check

    if verify:
        export_check.refuse_unverifiable(options["dtype"], options["weights"])
    with progress() as tell:
        done = exporter.export(model, output, **options, progress=tell)
    try:
        agreements: tuple[Agreement, ...] = ()
        if verify:
            needed = export_check.estimate_memory(done) / 1e9
            click.echo(f"verifying: up to {needed:.1f} GB of memory, PyTorch and ONNX Runtime one after the other", err=True)
            choices = {key: options[key] for key in ("fp8", "variant", "offline")}
            with progress() as tell:
                agreements = export_check.verify_export(done, model, **choices, progress=tell)
    except ShapecheckError:  # the file is written all the same
        write(report.render_json(done) if form == "json" else report.render_text(done), None)
        raise
    write(report.render_json(done, agreements) if form == "json" else report.render_text(done, agreements), None)
    return 0 if all(compared.agrees for compared in agreements) else ContractError.exit_status


@click.command()
@click.argument("file", type=click.Path(path_type=Path))
@click.option(
    "--model",
    metavar="MODEL",
    help="The UNet it should be, of an engine also the ControlNet: what `probe` takes, or a file that holds a contract.",
)
@click.option(
    "--controlnet", "controlnets", multiple=True, metavar="NAME", help="Say too whether this ControlNet fits. Repeatable."
)
@click.option("--size", metavar="WxH", help="Only this image size in pixels has to work.")
@click.option("--latent", metavar="HxW", help="The same in latent cells.")
@click.option(
    "--batch",
    type=click.IntRange(min=1),
    help="Batch, with --size or --latent.  [default: 1; for an engine, one that it takes]",
)
@click.option("--tokens", type=click.IntRange(min=1), help="Text tokens, of an engine.  [default: as many as it takes]")
@click.option(
    "--weights", metavar="MODEL", help="Say too whether an engine was built from these: an ONNX file, or a model's folder."
)
@result_options
def check(
    file: Path,
    model: str | None,
    controlnets: tuple[str, ...],
    size: str | None,
    latent: str | None,
    batch: int | None,
    tokens: int | None,
    weights: str | None,
    offline: bool,
    form: Form,
    output: Path | None,
) -> int:
    """Say what is wrong with FILE: an ONNX file that anybody exported, or an engine that anybody built.

    Of an ONNX file the graph is read and no weights. Without --model it is compared with the contract inside it, else with
    the preset it fits best, else with itself. Without --size every size that the contract allows has to work. A ControlNet's
    file is compared with the contract inside it, or its outputs with the UNet of --model.

    An engine (.plan, .engine, .trt) is read if TensorRT can load it, else the record beside it: does it belong to the
    record, which profile does the size fit, does the ControlNet fit, was it built from these weights; and what to do if not.
    An engine without a record is compared with --model, under whatever names it has: that needs TensorRT and a GPU.

    Exit status 0 if the file is fine, 1 if something is wrong or does not fit. It is 2, and the verdict NOT CHECKED, if
    nothing was found wrong but sizes could not be followed through the graph.

    \b
    Examples:
      shapecheck check unet.onnx
      shapecheck check unet.onnx --model sdxl --controlnet controlnet-sdxl-small
      shapecheck check unet.onnx --model ./my-model --size 904x512 --format json
      shapecheck check unet.plan --controlnet controlnet-sd15 --size 904x512 --weights unet.onnx
      shapecheck check their.engine --model sd15
    """
    from shapecheck.artefact import resolve_contract
    from shapecheck.observe.controlnet_fit import find_misfits
    from shapecheck.observe.request import resolve_geometry
    from shapecheck.onnx import check_report as report
    from shapecheck.onnx.check import check as verify
    from shapecheck.onnx.contract_metadata import contract_inside
    from shapecheck.onnx.file import OnnxFile

    request = request_for("", (), size, latent, batch)
    if is_engine(file):
        return _check_engine(file, model, controlnets, request, batch, tokens, weights, offline, form, output)
    if weights is not None or tokens is not None:
        raise ShapecheckError(
            "--weights and --tokens are for engines; `shapecheck export --verify` compares an ONNX file's numbers"
        )
    onnx_file = OnnxFile(file)
    with progress() as tell:
        contract = resolve_contract(model, offline=offline, progress=tell) if model else None
        known = contract or (contract_inside(onnx_file) if size else None)
        requested = resolve_geometry(request, known.header.vae_factor if known else 8)
        checked = verify(onnx_file, contract, requested, progress=tell)
        misfits = find_misfits(checked.contract, controlnets, requested, offline=offline, progress=tell) if controlnets else ()
    if form == "json":
        text = report.render_json(checked, controlnets=controlnets, misfits=misfits)
    else:
        text = report.render_text(checked, form=form, controlnets=controlnets, misfits=misfits)
    write(text, output)
    if checked.mismatches or misfits:
        return ContractError.exit_status
    return ShapecheckError.exit_status if checked.unchecked else 0


def _check_engine(
    file: Path,
    model: str | None,
    controlnets: tuple[str, ...],
    request: ProbeRequest,
    batch: int | None,
    tokens: int | None,
    weights: str | None,
    offline: bool,
    form: Form,
    output: Path | None,
) -> int:
    from shapecheck.artefact import resolve_contract
    from shapecheck.observe.request import resolve_geometry
    from shapecheck.tensorrt import check_report as report
    from shapecheck.tensorrt.check import check_engine

    if (batch or tokens) and request.size_px is None and request.latent is None:
        raise ShapecheckError("--batch and --tokens go with --size or --latent")
    engine = find_record(file)
    with progress() as tell:
        contract = resolve_contract(model, offline=offline, controlnet=True, progress=tell) if model else None
        known = engine.request.contract if engine is not None else contract
        requested = resolve_geometry(request, known.header.vae_factor if known else 8)
        requested = replace(requested, tokens=tokens) if requested and tokens else requested
        checked = check_engine(
            file,
            engine,
            contract,
            controlnets=controlnets,
            requested=requested,
            any_batch=batch is None,
            any_tokens=tokens is None,
            weights=weights,
            offline=offline,
            progress=tell,
        )
    write(report.render_json(checked) if form == "json" else report.render_text(checked, form), output)
    return 0 if checked.is_fine else ContractError.exit_status
