"""The two ways a user's request can end badly. Anything else that is raised is a bug of ours."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from shapecheck.contract.contract import Contract
    from shapecheck.contract.records import Mismatch


class ShapecheckError(Exception):
    """The request could not be carried out: bad input, a missing file, a model that does not run.

    The message says what was looked for, where, what was found and what to do.
    """

    exit_status = 2


class ContractError(ShapecheckError):
    """The shapes disagree. `mismatches` holds every disagreement, never only the first.

    `contract` is what the UNet wants, where that could be learnt.
    """

    exit_status = 1

    def __init__(self, mismatches: tuple[Mismatch, ...], *, subject: str, contract: Contract | None = None) -> None:
        self.mismatches = mismatches
        self.subject = subject
        self.contract = contract
        count = f"{len(mismatches)} mismatch{'es' if len(mismatches) != 1 else ''}"
        super().__init__("\n".join([f"{subject}: {count}", *(f"  {each}" for each in mismatches)]))
