"""Subcommands about files: export, rebind, check."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from shapecheck import ContractError, ShapecheckError
from shapecheck.cli.options import (
    FILE,
    Form,
    human_or_json,
    offline_option,
    result_options,
    size_options,
    variant_option,
)
from shapecheck.contract.geometry import parse_pair
from shapecheck.contract.naming import SCHEMES, SHAPECHECK
from shapecheck.tensorrt.record import find_record, is_engine
from shapecheck.terminal import progress, write

if TYPE_CHECKING:
    from shapecheck.contract import Contract
    from shapecheck.contract.size_request import SizeRequest
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
@click.option("--model", required=True, metavar="MODEL", help="The model whose weights it gets: what `export` takes.")
@click.option("-o", "--output", type=FILE, metavar="FILE.onnx", help="The file to write.  [default: FILE itself]")
@variant_option
@click.option(
    "--verify/--no-verify",
    default=False,
    show_default=True,
    help="Compare with PyTorch afterwards, in ONNX Runtime on the CPU, at two sizes. This loads the weights.",
)
@offline_option
@human_or_json
def rebind(file: Path, model: str, output: Path | None, verify: bool, form: str, **options: Any) -> int:
    """Exchange the weights of FILE.onnx, which `export` wrote, for those of another model with the same graph, in seconds.

    The other model has another LoRA fused into it, or was trained further. Nothing is traced. Weights are linked where that is
    possible, else copied. A model that would be another graph is refused, and so is a file that another tool rewrote, whose
    weights may be folded or transposed; those that are gone are named.

    \b
    Examples:
      shapecheck rebind unet.onnx --model ./sd15-with-lora
      shapecheck rebind unet.onnx --model ./sd15-with-lora -o other.onnx --verify
    """
    from shapecheck.onnx import export_report as report
    from shapecheck.onnx import rebind as rebinding
    from shapecheck.parity import export_check

    with progress() as tell:
        done = rebinding.rebind(file, model, output, **options, progress=tell)
        agreements = export_check.verify_export(done, model, **options, progress=tell) if verify else ()
    human = report.render_text(done, agreements, "REBOUND")
    write(report.render_json(done, agreements) if form == "json" else human, None)
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
@click.option("--size", metavar="WxH", help="This image size in pixels has to work.")
@click.option("--latent", metavar="HxW", help="The same in latent cells.")
@size_options
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
    sizes: tuple[str, ...],
    batch: tuple[str, ...],
    tokens: str | None,
    multiple_of: int | None,
    weights: str | None,
    offline: bool,
    form: Form,
    output: Path | None,
) -> int:
    """Say what is wrong with FILE: an ONNX file that anybody exported, or an engine that anybody built.

    Of an ONNX file the graph is read and no weights. Without --model it is compared with the contract inside it, else with
    the preset it fits best, else with itself. A file that takes fewer sizes than its model is fine, with its limits told, and
    broken only against --sizes, --size, --latent, --batch, --tokens and --multiple-of, each alone or together. A ControlNet's
    file is compared with the contract inside it, or its outputs with the UNet of --model.

    An engine (.plan, .engine, .trt) is read if TensorRT can load it, else the record beside it: does it belong to the
    record, which profile does the size fit, does the ControlNet fit, was it built from these weights; and what to do if not.
    An engine without a record is compared with --model, under whatever names it has: that needs TensorRT and a GPU.

    Exit status 0 if the file is fine, limits or not, 1 if something is wrong or does not fit. It is 2, and the verdict
    NOT CHECKED, if nothing was found wrong but sizes could not be followed through the graph.

    \b
    Examples:
      shapecheck check unet.onnx
      shapecheck check unet.onnx --model sdxl --controlnet controlnet-sdxl-small
      shapecheck check unet.onnx --model ./my-model --size 904x512 --format json
      shapecheck check theirs.onnx --model sd15 --sizes 512x512:512x512:1024x1024 --multiple-of 64 --batch 1:2:4
      shapecheck check unet.plan --controlnet controlnet-sd15 --size 904x512 --weights unet.onnx
      shapecheck check their.engine --model sd15
    """
    from shapecheck.artefact import resolve_contract
    from shapecheck.observe.controlnet_fit import find_misfits
    from shapecheck.onnx import check_report as report
    from shapecheck.onnx.check import check as verify
    from shapecheck.onnx.contract_metadata import contract_inside
    from shapecheck.onnx.file import OnnxFile
    from shapecheck.tensorrt.size_ranges import parse_size_request

    if size is not None and latent is not None:
        raise ShapecheckError("got a size in pixels and one in latent cells; give one of them")
    if sizes and (size or latent):
        raise ShapecheckError("--sizes says all sizes; drop --size and --latent")

    def request_sizes(known: Contract | None) -> SizeRequest:
        vae_factor = known.header.vae_factor if known else 8
        request = parse_size_request(sizes or (size,) if size else sizes, batch, tokens, multiple_of, vae_factor=vae_factor)
        return request.with_latent(*parse_pair(latent, "HxW in latent cells")) if latent else request

    if is_engine(file):
        return _check_engine(file, model, controlnets, request_sizes, weights, offline, form, output)
    if weights is not None:
        raise ShapecheckError("--weights is for engines; `shapecheck export --verify` compares an ONNX file's numbers")
    onnx_file = OnnxFile(file)
    with progress() as tell:
        contract = resolve_contract(model, offline=offline, progress=tell) if model else None
        known = contract or (contract_inside(onnx_file) if size or sizes or multiple_of else None)
        checked = verify(onnx_file, contract, request_sizes(known), progress=tell)
        at = checked.requested[0] if size or latent else None
        misfits = find_misfits(checked.contract, controlnets, at, offline=offline, progress=tell) if controlnets else ()
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
    request_sizes: Callable[[Contract | None], SizeRequest],
    weights: str | None,
    offline: bool,
    form: Form,
    output: Path | None,
) -> int:
    from shapecheck.artefact import resolve_contract
    from shapecheck.tensorrt import check_report as report
    from shapecheck.tensorrt.check import check_engine

    engine = find_record(file)
    with progress() as tell:
        contract = resolve_contract(model, offline=offline, controlnet=True, progress=tell) if model else None
        known = engine.request.contract if engine is not None else contract
        requested = request_sizes(known)
        if requested.multiple and not requested.ranges:
            raise ShapecheckError("--multiple-of goes with --sizes for an engine, which takes what its profiles allow")
        checked = check_engine(
            file,
            engine,
            contract,
            controlnets=controlnets,
            requested=requested,
            weights=weights,
            offline=offline,
            progress=tell,
        )
    write(report.render_json(checked) if form == "json" else report.render_text(checked, form), output)
    return 0 if checked.is_fine else ContractError.exit_status
