"""The command line: one small function a subcommand, thin over the library."""

from __future__ import annotations

import click

from shapecheck.cli.bench import bench
from shapecheck.cli.demo import demo
from shapecheck.cli.doctor import doctor
from shapecheck.cli.engines import build, profile, refit
from shapecheck.cli.explain import explain
from shapecheck.cli.files import check, export, rebind
from shapecheck.cli.group import Commands
from shapecheck.cli.models import diff, presets, probe
from shapecheck.cli.parity import parity
from shapecheck.version import __version__


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__, prog_name="shapecheck")
def main() -> None:
    """Verify the shapes that ControlNets and diffusion UNets agree on, from PyTorch to ONNX Runtime to TensorRT.

    Exit status: 0 fine, 1 the contract is broken, 2 it could not run.
    """


for _command in (probe, explain, diff, export, rebind, check, profile, build, refit, parity, bench, demo, doctor, presets):
    main.add_command(_command)


@main.result_callback()
@click.pass_context
def _exit(ctx: click.Context, /, status: int, **_: object) -> None:
    ctx.exit(status)
