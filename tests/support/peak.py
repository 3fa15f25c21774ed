"""The peak memory of a command.

Linux counts the memory of the process that starts another as the other's own, until it is another program. So the command is
started by a process that holds next to nothing, and not by the tests, which hold more than what is measured.
"""

from __future__ import annotations

import subprocess
import sys

_LAUNCHER = """
import os, subprocess, sys
process = subprocess.Popen(sys.argv[1:])
_, status, usage = os.wait4(process.pid, 0)
print(usage.ru_maxrss, file=sys.stderr)
sys.exit(os.waitstatus_to_exitcode(status))
"""


def peak_of(*command: str) -> tuple[str, int]:
    """What a Python command prints, and the most resident bytes it held; AssertionError where it fails."""
    python = [sys.executable, "-c", _LAUNCHER, sys.executable, *command]
    done = subprocess.run(python, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout, int(done.stderr.split()[-1]) * 1024
