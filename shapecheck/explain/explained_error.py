"""The error that `explained` raises, and its words: what failed, where, over which mistake, and what to change."""

from __future__ import annotations

from collections.abc import Iterator

from shapecheck.contract import Contract, ContractError, Mismatch
from shapecheck.explain.judge_mapping import Judgement, Match

_MOST = 4
"""Mistakes with one and the same table that are listed."""


class ExplainedError(ContractError):
    """A UNet failed over the residuals it was given. The original exception is its `__cause__`.

    `mismatches` holds every slot that is wrong; `judgement` says which mistake makes such residuals, where it is one of shape.
    Where a MultiControlNetModel failed to add the residuals of two ControlNets, `mismatches` holds every slot at which these
    two differ, what the first of them gives being the expected shape.
    """

    def __init__(self, text: str, mismatches: tuple[Mismatch, ...], contract: Contract, judgement: Judgement | None) -> None:
        super().__init__(mismatches, subject=text, contract=contract)
        self.judgement = judgement


def subject(contract: Contract, error: BaseException, judgement: Judgement | None) -> str:
    """The lines before the mismatches, of a UNet's failure."""
    lines = [f"{contract.class_name} failed: {last_line(error)}"]
    if judgement is not None and (failure := judgement.failure) is not None:
        lines.append(f"  where: {failure.slot} ({failure.module})")
    if judgement is not None and judgement.matches:
        lines += _of_match(judgement.matches[0])
    return "\n".join([*lines, "  what does not fit"])


def _of_match(match: Match) -> Iterator[str]:
    """A mistake, those that no shape can tell from it, and what to do."""
    nearest = "" if match.differs == 0 else f" (the nearest known mistake; slots that differ: {match.differs})"
    shown, more = match.faults[:_MOST], len(match.faults) - _MOST
    for number, fault in enumerate(shown):
        yield f"{'     or' if number else '  fault'}: {fault.kind}: {fault.told}{nearest}"
    if more > 0:
        yield f"     and {more} more with the same shapes"
    yield f"  change: {'; or '.join(dict.fromkeys(fault.change for fault in shown))}"


def last_line(error: BaseException) -> str:
    """Class and text, as a traceback ends."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}"[:500]
