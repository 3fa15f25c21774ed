"""Subcommand explain: from an error text or a claimed table to the slot and the cause."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import IO, TYPE_CHECKING

import click

from shapecheck import ContractError, ShapecheckError
from shapecheck.cli.options import Form, format_option, offline_option, output_option
from shapecheck.contract.geometry import parse_pair
from shapecheck.files import report_unreadable
from shapecheck.terminal import progress, write

if TYPE_CHECKING:
    from shapecheck.contract import Contract
    from shapecheck.explain.diagnosis import Diagnosis
    from shapecheck.explain.judge_mapping import Judgement
    from shapecheck.explain.residual_table import RequestedSize

_FILE_NAME = re.compile(r"""[^\s"'()]{0,1000}(?:[\\/][^\s"'()]{0,1000}|\.(?:txt|log|out|err|md|json))""")
"""A text that can only be meant as the name of a file."""
_KEPT_BYTES = 2**20
"""Bytes of a log that are kept from its start, and as many from its end."""


@click.command()
@click.argument("text", required=False)
@click.option(
    "--model",
    metavar="MODEL",
    help="The UNet it is about: what `probe` takes, or a file that holds a contract.  [default: every preset is tried]",
)
@click.option(
    "--controlnet", "controlnets", multiple=True, metavar="NAME", help="Hold what this ControlNet emits against it. Repeatable."
)
@click.option("--size", metavar="WxH", help="The image size in pixels.  [default: whatever can give the text]")
@click.option("--latent", metavar="HxW", help="The same in latent cells.")
@click.option("--batch", type=click.IntRange(min=1), help="The batch; 2 for one image with classifier-free guidance.")
@click.option(
    "--mapping",
    metavar="TABLE|FILE",
    help="The shapes that were given: channels@HxW in latent cells (320,640,1280,1280@64; mid:1280@8 for mid), whole shapes "
    "(input_control_00:2x320x64x96,…), a list of shapes, a .json or .txt file of these, or a saved contract.",
)
@offline_option
@format_option
@output_option
def explain(
    text: str | None,
    model: str | None,
    controlnets: tuple[str, ...],
    size: str | None,
    latent: str | None,
    batch: int | None,
    mapping: str | None,
    offline: bool,
    form: Form,
    output: Path | None,
) -> int:
    """Say which slot an error is about, why, and what to change.

    TEXT is an error message, a file with a traceback or a log, or - for standard input: of PyTorch, torch.export, ONNX
    Runtime, TensorRT, Polygraphy or diffusers. Every fault there is a name for is played through on the UNet, and those
    that give exactly this text are told, with the slot where each shows. --mapping holds a table of shapes against the UNet
    instead, or beside it: every slot at once, and the mistake that makes such a table.

    Exit status: 0 a diagnosis, of the text or of a table alone, right or wrong; 1 none; 2 it could not run.

    \b
    Examples:
      shapecheck explain "The size of tensor a (320) must match the size of tensor b (640) at non-singleton dimension 1"
      shapecheck explain log.txt --model sdxl --size 1024x1024
      shapecheck explain --model sd15 --mapping 320,640,1280,1280@64
      shapecheck explain --model sd15 --controlnet ./my-controlnet
    """
    from shapecheck.explain.diagnosis import Diagnosis
    from shapecheck.explain.explain_text import explain_text
    from shapecheck.explain.json_record import judge_diagnosis

    message = _read_message(text, others=bool(mapping or controlnets))
    if mapping and controlnets:
        raise ShapecheckError("--mapping and --controlnet both say what was given; give one of them")
    models = _find_models(model, offline)
    requested = _parse_size(size, latent, batch, models)
    if model is not None:
        models[model].require(requested.complete(models[model]))
    judgements = _judge_table(mapping, controlnets, model, models, requested, offline)
    diagnosis = explain_text(message, models, requested) if message is not None else Diagnosis((), tuple(models))
    write(render_explanation(diagnosis, judgements, form), output)
    is_diagnosed = judge_diagnosis(diagnosis, judgements[0] if judgements else None) == "diagnosis"
    return 0 if is_diagnosed else ContractError.exit_status


def render_explanation(diagnosis: Diagnosis, judgements: list[Judgement], form: Form) -> str:
    """Return the report of a text, of a table, or of both."""
    from shapecheck.explain import json_record, report

    first, others = (judgements[0], judgements[1:]) if judgements else (None, [])
    if form == "json":
        return json_record.render_json(diagnosis, first, others)
    return report.render_text(diagnosis, first, others, form=form)


def _read_message(text: str | None, *, others: bool) -> str | None:
    """Return the text to explain, or None if a table is to be explained alone."""
    if text is None:
        if others:
            return None
        raise click.UsageError("give an error TEXT, a FILE or - for standard input; or --mapping, or --controlnet")
    if text == "-":
        return _read_ends(sys.stdin.buffer)
    if not (os.path.exists(text) or _FILE_NAME.fullmatch(text)):  # noqa: PTH110  # Path.exists raises on names too long
        return text
    with report_unreadable(text, "; give an error text in quotation marks, a file, or -"), Path(text).open("rb") as file:
        return _read_ends(file)


def _read_ends(stream: IO[bytes]) -> str:
    """Return the start and the end of a log of any length."""
    start, end = stream.read(_KEPT_BYTES), b""
    while more := stream.read(_KEPT_BYTES):
        end = (end + more)[-_KEPT_BYTES:]
    return (start + (b"\n" if end else b"") + end).decode("utf-8", "replace")


def _find_models(model: str | None, offline: bool) -> Mapping[str, Contract]:
    """Return the UNets to try, by name."""
    from shapecheck import presets

    if model is None:
        return presets.contracts()
    if model in presets.contracts():
        return {model: presets.contract(model)}
    from shapecheck.explain.judge_mapping import resolve_unet

    with progress() as steps:
        return {model: resolve_unet(model, offline=offline, progress=steps)}


def _parse_size(size: str | None, latent: str | None, batch: int | None, models: Mapping[str, Contract]) -> RequestedSize:
    from shapecheck.contract import Geometry
    from shapecheck.explain.residual_table import RequestedSize

    if size and latent:
        raise ShapecheckError("a size in pixels and one in latent cells were given; give one of them")
    if size:
        factor = next(iter(models.values())).header.vae_factor if len(models) == 1 else 8
        at = Geometry.from_px(*parse_pair(size, "WxH in pixels"), vae_factor=factor)
        return RequestedSize((at.height, at.width), batch)
    return RequestedSize(parse_pair(latent, "HxW in latent cells") if latent else None, batch)


def _judge_table(
    mapping: str | None,
    controlnets: tuple[str, ...],
    model: str | None,
    models: Mapping[str, Contract],
    size: RequestedSize,
    offline: bool,
) -> list[Judgement]:
    """Compare the table with every UNet; the one it fits best comes first."""
    from shapecheck.explain.explain_text import group_models
    from shapecheck.explain.judge_mapping import judge_controlnets, judge_on_all
    from shapecheck.explain.mapping_parser import parse_mapping

    if mapping:
        claim = parse_mapping(mapping, size.complete(next(iter(models.values()))))
        return judge_on_all(claim, group_models(models), models, size)
    if not controlnets:
        return []
    if model is None:
        raise ShapecheckError("--controlnet: name the UNet it is used with, with --model")
    contract = models[model]
    with progress() as steps:
        return judge_controlnets(controlnets, model, contract, size.complete(contract), offline=offline, progress=steps)
