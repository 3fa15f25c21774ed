"""How a command line ends: errors of the user as one message and a status, bugs as tracebacks."""

from __future__ import annotations

import io
import signal
import sys
import threading
import traceback
from collections.abc import Sequence
from typing import Any

import click

from shapecheck import ShapecheckError, extras
from shapecheck.terminal import drop_stdout

_INTERRUPTED = 130


class Commands(click.Group):
    """Turns our errors into one message on stderr and their exit status; bugs stay tracebacks, and end in 2."""

    def main(
        self,
        args: Sequence[str] | None = None,
        prog_name: str | None = None,
        complete_var: str | None = None,
        standalone_mode: bool = True,
        **extra: Any,
    ) -> Any:
        """Run a command line. Status 1 says that shapes disagree, so nothing that goes wrong here may end in it."""
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, signal.default_int_handler)  # what is half written goes, as at Ctrl-C
        if not standalone_mode:
            return super().main(args, prog_name, complete_var, standalone_mode=False, **extra)
        try:
            status = super().main(args, prog_name, complete_var, standalone_mode=False, **extra)
        except click.Abort:
            status = _INTERRUPTED
        except click.ClickException as error:
            error.show()
            status = ShapecheckError.exit_status
        except SystemExit:  # click's own answer to a closed pipe
            drop_stdout()
            status = ShapecheckError.exit_status
        except Exception:  # a bug of ours, or no place to print the help
            traceback.print_exc()
            drop_stdout()
            status = ShapecheckError.exit_status
        sys.exit(status)

    def invoke(self, ctx: click.Context) -> object:
        """Run a subcommand; an error of the user ends it with one message."""
        for stream in (sys.stdout, sys.stderr):
            if isinstance(stream, io.TextIOWrapper):
                stream.reconfigure(errors="backslashreplace")  # file names need not be text
        try:
            return super().invoke(ctx)
        except ShapecheckError as error:
            click.echo(f"error: {error}", err=True)
            ctx.exit(error.exit_status)
        except ModuleNotFoundError as error:
            problem = extras.missing(error, "this command")
            if problem is error:
                raise
            click.echo(f"error: {problem}", err=True)
            ctx.exit(ShapecheckError.exit_status)
