"""The error that `explained` raises, and its words: what failed, where, over which mistake, and what to change."""

from __future__ import annotations

from shapecheck.contract import Contract, ContractError, Mismatch
from shapecheck.explain.judge_mapping import Judgement

_MOST_FAULTS = 4


class ExplainedError(ContractError):
    """A UNet failed over the residuals it was given. The original exception is its `__cause__`.

    `mismatches` holds every slot that is wrong; `judgement` says which mistake makes such residuals, if it is one of shape.
    If a MultiControlNetModel failed to add the residuals of two ControlNets, `mismatches` holds every slot at which these
    two differ, and the first of them has the expected shape.
    """

    def __init__(self, text: str, mismatches: tuple[Mismatch, ...], contract: Contract, judgement: Judgement | None) -> None:
        super().__init__(mismatches, subject=text, contract=contract)
        self.judgement = judgement


def describe_failure(contract: Contract, error: BaseException, judgement: Judgement | None) -> str:
    """Return the lines that come before the mismatches of a UNet's failure."""
    lines = [f"{contract.class_name} failed: {last_line(error)}"]
    if judgement is not None and (failure := judgement.failure) is not None:
        lines.append(f"  where: {failure.slot} ({failure.module})")
    if judgement is not None and judgement.matches:
        match = judgement.matches[0]
        nearest = "" if match.differs == 0 else f" (the nearest known mistake; slots that differ: {match.differs})"
        shown, more = match.faults[:_MOST_FAULTS], len(match.faults) - _MOST_FAULTS
        for number, fault in enumerate(shown):
            lines.append(f"{'     or' if number else '  fault'}: {fault.kind}: {fault.message}{nearest}")
        if more > 0:
            lines.append(f"     and {more} more with the same shapes")
        lines.append(f"  change: {'; or '.join(dict.fromkeys(fault.change for fault in shown))}")
    return "\n".join([*lines, "  what does not fit"])


def last_line(error: BaseException) -> str:
    """Return class and text, as a traceback ends."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}"[:500]
