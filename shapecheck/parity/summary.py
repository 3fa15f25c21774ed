"""A parity run in one sentence, and each of its backends in words."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import get_args

from shapecheck.doctor.environment import BACKENDS
from shapecheck.parity.findings import list_findings
from shapecheck.parity.results import Parity, Result, Side, Status
from shapecheck.report.numbers import format_count, format_number

_NAMED = 2
"""The verdict line tells at most so many faults of a backend."""


def summarize(parity: Parity) -> str:
    """Return the sentence that follows `PARITY:` or `BROKEN:`."""
    if not parity.passes:
        wrong = [_describe_fault(side) for side in parity.sides if judge_backend(side) != "passed"]
        return "; ".join(wrong) or "no backend was tried"
    checks = f"{_count_checks(parity.sides)} on {', '.join(side.backend for side in parity.sides)}"
    return f"{checks}, {parity.unjudged} of them not judged" if parity.unjudged else checks


def describe_rounding(side: Side) -> str:
    """Return how far all outputs together are from the reference in a half precision; empty if that was not measured."""
    found = [result.rounding for result in side.results if result.rounding]
    if not found:
        return ""
    times, allowed = (format_number(value, "times") for value in (found[0].times_own, found[0].allowed / found[0].own))
    return f"{times} PyTorch's own error over all values of {found[0].calls} calls (root mean square), {allowed} allowed"


def describe_tolerance(parity: Parity) -> str:
    """Return the rule that every number has to keep."""
    times = f"{parity.times_own:g} times as far from {parity.reference}"
    return f"a backend may be at most {times} as PyTorch itself is in that precision{describe_fp8(parity)}"


def describe_fp8(parity: Parity) -> str:
    """Return the rule that is added if layers are in fp8, as the end of a sentence."""
    if parity.least_psnr is None:
        return ""
    return f" with the same layers in fp8, and every output has at least {parity.least_psnr:g} dB PSNR"


def judge_backend(side: Side) -> Status:
    """Return "failed" if any check did, and "passed" if at least one was made."""
    if side.failed:
        return "failed"
    return "passed" if any(result.status == "passed" for result in side.results) else "not run"


def name_backend(side: Side) -> str:
    """Return `ort: ONNX Runtime on the CPU`."""
    known = BACKENDS.get(side.backend)
    return f"{side.backend}: {known}" if known else side.backend


def count_statuses(side: Side) -> str:
    """Return `22 passed, 4 failed`; a status that no check has is not named."""
    counts = Counter(result.status for result in side.results)
    return ", ".join(f"{counts[status]} {status}" for status in get_args(Status) if counts[status]) or "none"


def describe_subject(result: Result) -> str:
    """Return `slot down_block_residual_07`, `case batch 2 …`, `weights`."""
    return f"{result.check.kind} {result.check.where}".rstrip()


def list_unrun(side: Side) -> tuple[Result, ...]:
    """Return the checks that were not made."""
    return tuple(result for result in side.results if result.status == "not run")


def describe_reason(result: Result) -> str:
    """Return the subject of a check, then why it failed or was not made, without a name that stands there twice."""
    about, why = describe_subject(result), result.reason or "no reason was given"
    if why.startswith(about):
        return why
    where = result.check.where
    return f"{result.check.kind} {why}" if where and why.startswith(where) else f"{about}: {why}"


def _describe_fault(side: Side) -> str:
    if not side.failed or side.ran is None:
        reasons = [result.reason for result in (*side.failed, *side.results) if result.reason] or [" ".join(side.notes[:1])]
        why = f" ({reasons[0]})" if reasons[0] else ""
        return f"{side.backend}: {'nothing was checked' if side.ran else 'could not run'}{why}"
    messages = [finding.message for finding in list_findings(side)]
    more = f"; and {len(messages) - _NAMED} more faults" if len(messages) > _NAMED else ""
    counted = f"{len(side.failed)} of {_count_checks([side])} failed"
    return f"{side.backend}: {'; '.join(messages[:_NAMED])}{more} ({counted})"


def _count_checks(sides: Sequence[Side]) -> str:
    return format_count(sum(len(side.results) for side in sides), "check")
