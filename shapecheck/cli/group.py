"""End a command line: errors of the user become one message and a status, bugs tracebacks."""

from __future__ import annotations

import io
import signal
import sys
import threading
import traceback
from typing import Any

import click

from shapecheck import ShapecheckError, extras
from shapecheck.terminal import drop_stdout


class Commands(click.Group):
    """A group that turns our errors into one message on stderr and their exit status. Bugs stay tracebacks, and end in 2."""

    def main(self, *args: Any, **options: Any) -> Any:
        """Run a command line. Status 1 says that shapes disagree, so nothing that goes wrong here may end in it."""
        # At SIGTERM as at Ctrl-C: files that are half written are removed.
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, signal.default_int_handler)
        if not options.get("standalone_mode", True):
            return super().main(*args, **options)
        try:
            status = super().main(*args, **options | {"standalone_mode": False})
        except click.Abort:
            status = 130
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
        # File names need not be text.
        for stream in (sys.stdout, sys.stderr):
            if isinstance(stream, io.TextIOWrapper):
                stream.reconfigure(errors="backslashreplace")
        try:
            return super().invoke(ctx)
        except ShapecheckError as error:
            click.echo(f"error: {error}", err=True)
            ctx.exit(error.exit_status)
        except ModuleNotFoundError as error:
            problem = extras.explain_missing(error, "this command")
            if problem is error:
                raise
            click.echo(f"error: {problem}", err=True)
            ctx.exit(ShapecheckError.exit_status)
