"""Group failed checks into faults: one fault makes many checks fail."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from shapecheck.parity.results import CheckKind, Parity, Result, Side

_SHOWN_NAMES = 2
_AT_THE_FILE: tuple[CheckKind, ...] = ("weights", "precision")
_VAGUE = "acts otherwise than in PyTorch"
"""An effect that nothing explains: with other weights every input has one."""


@dataclass(frozen=True, slots=True)
class Finding:
    """One fault, in a sentence, and the failed checks that say it."""

    message: str
    results: tuple[Result, ...]


def list_findings(side: Side) -> tuple[Finding, ...]:
    """Return the faults behind the failed checks of a backend, what explains the others first."""
    failed = side.failed
    if provider := [result for result in failed if result.check.kind == "provider"]:
        return (Finding(provider[0].reason, tuple(provider)),)
    found = [_name_check(result) for result in failed if result.check.kind in _AT_THE_FILE]
    parts = [result for result in failed if result.check.kind in ("slot", "input")]
    found += _group_parts([result for result in parts if not found or _VAGUE not in result.reason])
    # The contract says in its own words what a slot's values have proven.
    names = {result.check.where for result in parts}
    contracts = [result for result in failed if result.check.kind == "contract"]
    found += [_name_check(result) for result in contracts if not any(name in result.reason for name in names)]
    found += [_name_check(result) for result in failed if result.check.kind == "switch"]
    found += [_name_check(result) for result in failed if result.check.kind == "cfg" and not parts]
    cases = [result for result in failed if result.check.kind == "case"]
    unlike = [result for result in cases if not found or (result.verdict and (result.verdict.nan or result.verdict.inf))]
    found += _group_cases(side, unlike, len(cases))
    found = found or [_name_check(result) for result in failed]
    return tuple(replace(finding, message=finding.message.rstrip(".")) for finding in found)


def list_consequences(side: Side) -> tuple[Result, ...]:
    """Return the failed checks that no finding is made of: they follow from the findings."""
    explained = [result for finding in list_findings(side) for result in finding.results]
    return tuple(result for result in side.failed if result not in explained)


def suggest_command(parity: Parity) -> str:
    """Return the command that shows more of the first fault or mends it; empty if there is none."""
    side = next((side for side in parity.sides if side.failed), None)
    if side is None or side.ran is None or not parity.requested:
        return ""
    kind = list_findings(side)[0].results[0].check.kind
    model, file = shlex.quote(parity.requested), shlex.quote(side.artefact)
    dtype = f" --dtype {side.ran.precision}" if side.ran.precision != "float32" else ""
    if not side.artefact.endswith(".onnx"):
        return ""
    if kind in ("weights", "precision", "rounding"):
        return f"shapecheck export {model} -o again.onnx{dtype} --verify"
    if kind in ("contract", "slot", "input"):
        return f"shapecheck check {file} --model {model}"
    if side.divergence and side.divergence.command:
        return side.divergence.command
    return f"shapecheck parity {model} --onnx {file} --report report"


def _name_check(result: Result) -> Finding:
    reason = result.reason or "no reason was given"
    return Finding(f"{result.check.kind}: {reason}", (result,))


def _group_parts(parts: Sequence[Result]) -> Iterator[Finding]:
    """Yield a finding for slots that are in each other's place, then for each kind of what is wrong with the others."""
    by_name = {result.check.where: result for result in parts}
    others = dict(by_name)
    for name in by_name:
        if name not in others:
            continue
        ring = [name]
        while (beside := _find_other(others.get(ring[-1]), by_name)) and beside not in ring:
            ring.append(beside)
        if beside == name and len(ring) > 1:
            results = tuple(others.pop(member) for member in ring if member in others)
            how = "exchanged" if len(ring) == 2 else "in each other's place"  # two
            yield Finding(f"{_list_names(ring)} are {how}: {results[0].reason}", results)
    alike: dict[str, list[Result]] = {}
    for name, result in others.items():
        alike.setdefault(re.sub(r"\d[\d.e+-]*", "", result.reason.replace(name, "")), []).append(result)
    for group in alike.values():
        names, reason = [result.check.where for result in group], group[0].reason or "no reason was given"
        wrong = reason.removeprefix(names[0]).lstrip(" :")
        message = f"each of {_list_names(names)} {wrong}" if len(group) > 1 else f"{names[0]} {wrong}"
        yield Finding(message, tuple(group))


def _find_other(result: Result | None, names: dict[str, Result]) -> str:
    """Return the other name of a failed part that the reason of one mentions; empty if it mentions none."""
    if result is None:
        return ""
    words = re.findall(r"[\w.]+", result.reason)
    return next((word for word in words if word in names and word != result.check.where), "")


def _group_cases(side: Side, cases: Sequence[Result], total: int) -> Iterator[Finding]:
    """Yield one finding for all outputs that are wrong: the one that is explained, and where it begins."""
    if not cases:
        return
    first = min(cases, key=lambda result: result.reason.startswith("largest difference"))
    reason = first.reason.removeprefix(first.check.where).lstrip(" :")
    begins = f"; it begins in {side.divergence.module}" if side.divergence else ""
    more = f"; {total} outputs are wrong" if total > 1 else ""
    yield Finding(f"{first.check.where}: {reason}{begins}{more}", tuple(cases))


def _list_names(names: Sequence[str]) -> str:
    if len(names) > _SHOWN_NAMES + 1:
        return f"{', '.join(names[:_SHOWN_NAMES])} and {len(names) - _SHOWN_NAMES} more"
    return " and ".join(filter(None, (", ".join(names[:-1]), names[-1])))
