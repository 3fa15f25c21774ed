"""A parity run in one sentence, and what each of its backends came to."""

from __future__ import annotations

from collections.abc import Sequence

from shapecheck.doctor.environment import BACKENDS
from shapecheck.parity.results import CheckKind, Parity, Result, Side, Status

_NAMED = 4
"""How many failed checks the verdict line names."""


_FIRST: tuple[CheckKind, ...] = ("slot", "input")
"""Named before the others: they say where to look."""


def sentence(parity: Parity) -> str:
    """What stands after `PARITY:` or `BROKEN:`."""
    if parity.passes:
        left = sum(len(unrun(side)) for side in parity.sides)
        told = f"{_counted(parity.sides)} on {', '.join(side.backend for side in parity.sides)}"
        return f"{told}, {left} of them not judged" if left else told
    return "; ".join(_wrong(side) for side in parity.sides if side_status(side) != "passed") or "no backend was tried"


def tolerance(parity: Parity) -> str:
    """The one rule that every number was held to."""
    times = f"{parity.times_own:g} times as far from {parity.reference}"
    return f"a backend may be at most {times} as PyTorch itself is in that precision"


def side_status(side: Side) -> Status:
    """Failed where any check did; passed where at least one was made."""
    if side.failed:
        return "failed"
    return "passed" if any(each.status == "passed" for each in side.results) else "not run"


def backend_title(side: Side) -> str:
    """`ort: ONNX Runtime on the CPU`."""
    known = BACKENDS.get(side.backend)
    return f"{side.backend}: {known}" if known else side.backend


def counts(side: Side) -> str:
    """`22 passed, 4 failed`; what did not run only where something did not."""
    numbers = {status: sum(each.status == status for each in side.results) for status in ("passed", "failed", "not run")}
    return ", ".join(f"{count} {status}" for status, count in numbers.items() if count) or "none"


def subject(result: Result) -> str:
    """`slot down_block_residual_07`, `case batch 2 …`, `weights`."""
    return f"{result.check.kind} {result.check.where}".rstrip()


def unrun(side: Side) -> tuple[Result, ...]:
    """The checks that were not made."""
    return tuple(each for each in side.results if each.status == "not run")


def explained(result: Result) -> str:
    """What the check is about, then why it failed or was not made; no name is told twice."""
    about, why = subject(result), result.reason or "no reason was given"
    if why.startswith(about):
        return why
    where = result.check.where
    return f"{result.check.kind} {why}" if where and why.startswith(where) else f"{about}: {why}"


def _wrong(side: Side) -> str:
    if not side.failed or side.ran is None:
        why = next((each.reason for each in (*side.failed, *side.results) if each.reason), "") or " ".join(side.notes[:1])
        return f"{side.backend}: {'nothing was checked' if side.ran else 'could not run'}{f' ({why})' if why else ''}"
    failed = sorted(side.failed, key=lambda each: _FIRST.index(each.check.kind) if each.check.kind in _FIRST else len(_FIRST))
    names = [_brief(each) for each in failed]
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return f"{side.backend}: {len(names)} of {_counted([side])} failed: {', '.join(names[:_NAMED])}{more}"


def _brief(result: Result) -> str:
    """`slot down_block_residual_07`; words go in brackets."""
    where = result.check.where
    return f"{result.check.kind}[{where}]" if " " in where else subject(result)


def _counted(sides: Sequence[Side]) -> str:
    count = sum(len(side.results) for side in sides)
    return f"{count} check{'' if count == 1 else 's'}"
