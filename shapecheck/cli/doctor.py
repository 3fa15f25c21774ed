"""The subcommand about this machine: doctor."""

from __future__ import annotations

from pathlib import Path

import click

from shapecheck import ContractError
from shapecheck.cli.options import human_or_json, output_option
from shapecheck.doctor.environment import BACKENDS, check_known
from shapecheck.terminal import progress, write


@click.command()
@click.option(
    "--require",
    "required",
    multiple=True,
    metavar="BACKEND",
    help=f"Exit with 1 if this cannot run: {', '.join(BACKENDS)}. Repeatable.",
)
@human_or_json
@output_option
def doctor(required: tuple[str, ...], form: str, output: Path | None) -> int:
    """List what is installed, what can really run here, and which command fixes what cannot.

    Every backend is tried in a process of its own: a provider counts as running only if it computed something. Exit
    status 0 whatever is missing; 1 if something required cannot run.

    \b
    Examples:
      shapecheck doctor
      shapecheck doctor --require trt --require ort-cuda
      shapecheck doctor --format json -o environment.json
    """
    from shapecheck import doctor as examiner
    from shapecheck.doctor import report

    check_known(required)
    with progress() as steps:
        environment = examiner.examine(progress=steps)
    write((report.render_json if form == "json" else report.render_text)(environment, required), output)
    return ContractError.exit_status if environment.failing(required) else 0
