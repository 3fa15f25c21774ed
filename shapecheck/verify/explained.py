"""A `with` block in which a UNet's failure over residuals tells its slot, its cause and what to change."""

from __future__ import annotations

import inspect
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from shapecheck.contract import Contract, ContractError, Geometry, Mismatch, ShapecheckError
from shapecheck.contract.naming import SHAPECHECK
from shapecheck.faults.from_mapping import Judgement, judge_given
from shapecheck.faults.from_text import explain_text
from shapecheck.faults.given import Given
from shapecheck.faults.size import Size
from shapecheck.run.called import DOWNS, MID, Call, call_of, inner, places_of
from shapecheck.run.guard_checks import feature_faults, geometry_of, residual_faults


class ExplainedError(ContractError):
    """A UNet failed over the residuals it was given. The original exception is its `__cause__`.

    `mismatches` holds every slot that is wrong; `judgement` says which mistake makes such residuals, where it is one of shape.
    """

    def __init__(self, text: str, mismatches: tuple[Mismatch, ...], contract: Contract, judgement: Judgement | None) -> None:
        super().__init__(mismatches, subject=text, contract=contract)
        self.judgement = judgement


@dataclass(slots=True)
class _Seen:
    """What was seen of the last call: its arguments while it runs, and the last residuals of each ControlNet."""

    call: Call | None = None
    emitted: list[list[Tensor]] = field(default_factory=list)


@contextmanager
def explained(
    unet: nn.Module, controlnet: nn.Module | Sequence[nn.Module] | None = None, *, contract: Contract | None = None
) -> Iterator[None]:
    """Turn a failure of `unet` over its residuals, inside the block, into an ExplainedError that names slot and cause.

    `unet` is a live UNet2DConditionModel on any device, also one wrapped by `torch.compile`, or a drop-in that
    `shapecheck.load` made. `controlnet` is one ControlNet or several whose residuals reach it: residuals that are the very
    tensors it returned are then told by their number there, which shows an order that shapes cannot. `contract` is what
    `shapecheck.probe(unet)` returns; without it the UNet is probed, on the meta device, when something fails.

    Every other exception passes as it is, and so does one that residuals do not explain. What PyTorch accepts in silence
    raises nothing here: `shapecheck.guard` refuses that before the call.

    Raises ShapecheckError where `unet` takes no residuals.
    """
    seen = _Seen()
    removals = _watch(unet, _several(controlnet), seen)
    try:
        yield
    except Exception as error:
        _run(removals)  # the UNet may be observed now
        told = _explanation(unet, error, seen, contract)
        if told is None:
            raise
        raise told from error
    finally:
        _run(removals)


def _run(removals: list[Callable[[], None]]) -> None:
    while removals:
        removals.pop()()


def _several(controlnet: nn.Module | Sequence[nn.Module] | None) -> tuple[nn.Module, ...]:
    if controlnet is None:
        return ()
    return (controlnet,) if isinstance(controlnet, nn.Module) else tuple(controlnet)


def _watch(unet: nn.Module, controlnets: Sequence[nn.Module], seen: _Seen) -> list[Callable[[], None]]:
    """Hooks that write down what comes by; their removals."""
    if not isinstance(unet, nn.Module):
        raise ShapecheckError(f"explained takes a UNet, not a {type(unet).__name__}; of a pipeline give pipeline.unet")
    places = places_of(inner(unet))

    def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        call = call_of(places, args, kwargs)
        seen.call = call._replace(downs=_copied(call.downs), features=_copied(call.features))  # diffusers pops from lists

    def after(*_: object) -> None:
        seen.call = None

    def returned(module: nn.Module, args: object, output: Any) -> None:
        downs, mid = output[:2] if isinstance(output, tuple) else (output.down_block_res_samples, output.mid_block_res_sample)
        seen.emitted.append([*downs, mid])
        del seen.emitted[: -len(controlnets)]

    # kept out of graphs that torch.compile makes, which would freeze what they saw when it was traced
    first, last = torch.compiler.disable(before), torch.compiler.disable(after)  # type: ignore[no-untyped-call]
    removals = [unet.register_forward_pre_hook(first, with_kwargs=True).remove, unet.register_forward_hook(last).remove]
    return removals + [net.register_forward_hook(returned).remove for net in controlnets]


def _copied(value: Any) -> Any:
    return type(value)(value) if type(value) in (list, tuple) else value


def _explanation(unet: nn.Module, error: Exception, seen: _Seen, contract: Contract | None) -> ExplainedError | None:
    """The error that says more, where residuals explain this one."""
    if isinstance(error, ContractError) or seen.call is None:
        return None
    known = contract or contract_of_live(inner(unet))
    told = explained_call(seen.call, known, _last_line(error), seen.emitted)
    return told or _by_its_text(error, known)


def explained_call(
    call: Call, contract: Contract, text: str, emitted: Sequence[Sequence[Tensor]] = (), *, popped: bool = False
) -> ExplainedError | None:
    """What is wrong with the residuals of a call that failed with `text`; None where nothing is.

    `popped`: the list of down residuals is shorter than it was given.
    """
    geometry = geometry_of(contract, call.sample)
    if isinstance(geometry, Mismatch) or (call.downs is None and call.mid is None and call.features is None):
        return None
    order = [slot.name for slot in contract.slots]
    found = [*feature_faults(call.features, (None, 0))]
    if call.downs is not None or call.mid is not None:
        found += residual_faults(contract, call, geometry, moved=False)
    if popped:
        found = [each for each in found if each.where == order[-1]]
    if not found:
        return None
    judgement = None if popped else _judged(call, contract, geometry, emitted)
    found.sort(key=lambda each: order.index(each.where) if each.where in order else len(order))
    return ExplainedError(_subject(contract, text, judgement), tuple(found), contract, judgement)


def explained_traceback(error: BaseException) -> ExplainedError | None:
    """What is wrong with the residuals that a UNet was called with, as the frames of an exception's traceback hold them.

    None where no UNet is on the way, or nothing is wrong with them. A list that diffusers has popped from tells of the mid
    residual alone.
    """
    found = None
    for frame, _ in traceback.walk_tb(error.__traceback__):
        values = frame.f_locals
        if frame.f_code.co_name == "_call_impl" and _takes_residuals(values.get("self")):
            found = values["self"], values.get("args", ()), values.get("kwargs", {})
    if found is None:
        return None
    unet, args, kwargs = found
    call = call_of(places_of(unet), args, kwargs)
    popped = call.mid is None and isinstance(call.downs, list)
    return explained_call(call, contract_of_live(unet), _last_line(error), popped=popped)


def _takes_residuals(module: Any) -> bool:
    """Whether this is a UNet whose forward takes a ControlNet's residuals by name."""
    if not isinstance(module, nn.Module) or not hasattr(module, "config"):
        return False
    return {DOWNS, MID} <= inspect.signature(module.forward).parameters.keys()


def contract_of_live(unet: nn.Module) -> Contract:
    """The contract of a live UNet: a drop-in's own, else that of its twin on the meta device."""
    if isinstance(own := getattr(unet, "contract", None), Contract):
        return own
    from shapecheck.observe import sources
    from shapecheck.observe.configs import ModelSource
    from shapecheck.observe.probe import probe

    config = dict(getattr(unet, "config", {}))
    if type(unet).__name__ != "UNet2DConditionModel":  # a subclass may have another forward
        return probe(unet)
    return probe(sources.build(ModelSource("the UNet", "the live UNet's config", "UNet2DConditionModel", config)))


def _judged(call: Call, contract: Contract, geometry: Geometry, emitted: Sequence[Sequence[Tensor]]) -> Judgement | None:
    """Which mistake makes these residuals, where all are tensors; the very tensors of a ControlNet tell it best."""
    downs = call.downs if isinstance(call.downs, (list, tuple)) else None
    if downs is None or not all(isinstance(each, Tensor) for each in (*downs, *(() if call.mid is None else (call.mid,)))):
        return None
    given = Given(tuple(tuple(each.shape) for each in downs), None if call.mid is None else tuple(call.mid.shape))
    judgement = judge_given(given, (contract.header.source or "this UNet",), contract, geometry)
    touched = _touched([*downs, call.mid], emitted)
    if not touched or not judgement.matches:
        return judgement
    names = {SHAPECHECK.down(index) for index in touched}
    faults = sorted(judgement.matches[0].faults, key=lambda fault: set(fault.slots) != names)
    return replace(judgement, matches=(replace(judgement.matches[0], faults=tuple(faults)), *judgement.matches[1:]))


def _touched(given: Sequence[Tensor | None], emitted: Sequence[Sequence[Tensor]]) -> set[int]:
    """Numbers of the down residuals that are left out, else given twice, else moved; none where these are other tensors."""
    for residuals in emitted:
        numbers = {id(residual): number for number, residual in enumerate(residuals[:-1])}
        order = [numbers.get(id(each)) for each in given[:-1]]
        if not order or None in order:
            continue
        left_out = set(numbers.values()) - set(order)
        twice = {number for number in order if number is not None and order.count(number) > 1}
        moved = {number for place, number in enumerate(order) if number is not None and number != place}
        return left_out or twice or moved
    return set()


def _subject(contract: Contract, text: str, judgement: Judgement | None) -> str:
    lines = [f"{contract.class_name} failed: {text}"]
    if judgement is not None and judgement.failure is not None:
        failure = judgement.failure
        lines.append(f"  where: {failure.slot} ({failure.module})")
    if judgement is not None and judgement.matches:
        match = judgement.matches[0]
        nearest = "" if match.differs == 0 else f" (the nearest known mistake; slots that differ: {match.differs})"
        lines += [f"  fault: {match.fault.kind}: {match.fault.told}{nearest}", f"  change: {match.fault.change}"]
    return "\n".join([*lines, "  what does not fit"])


def _by_its_text(error: Exception, contract: Contract) -> ExplainedError | None:
    """What the text of an exception says by itself, where it names an input: those of ONNX Runtime and TensorRT do."""
    diagnosis = explain_text(str(error)[:100_000], {"this UNet": contract}, Size())
    causes = [cause for reading in diagnosis.found if reading.symptom.names for cause in reading.causes]
    if not causes:
        return None
    found = tuple(
        Mismatch("input", name, cause.told, "what the file takes", cause=cause.change)
        for cause in causes
        for name in cause.slots or (cause.where,)
    )
    return ExplainedError(f"{contract.class_name} failed: {_last_line(error)}", found, contract, None)


def _last_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}"[:500]
