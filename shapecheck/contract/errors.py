"""How a user's request can end badly. Anything else that is raised is a bug of ours."""

from __future__ import annotations


class ShapecheckError(Exception):
    """The request could not be carried out: bad input, a missing file, a model that does not run.

    The message says what was looked for, where, what was found and what to do.
    """

    exit_status = 2
