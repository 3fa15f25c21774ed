"""A `with` block in which a UNet's failure over residuals tells its slot, its cause and what to change."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import cache
from typing import Any

from torch import nn

from shapecheck.contract import Contract, ContractError, Mismatch, ShapecheckError
from shapecheck.explain.attribution import Reason, find_reasons, is_of_memory
from shapecheck.explain.call_log import Returned, Watched
from shapecheck.explain.explain_text import explain_text
from shapecheck.explain.explained_error import ExplainedError, last_line, subject
from shapecheck.explain.multi_controlnet import explain_sum
from shapecheck.explain.residual_table import RequestedSize
from shapecheck.explain.tensor_identity import judge_call
from shapecheck.explain.traceback_calls import Traced, find_calls, follow_causes
from shapecheck.models.forward_call import unwrap_compiled
from shapecheck.runtime.residual_checks import find_feature_faults, find_residual_faults, read_geometry
from shapecheck.runtime.unet_call import DOWNS, MID, Call, locate_arguments, read_call

__all__ = ["ExplainedError", "explained", "explained_traceback"]


_OF_SHAPES: frozenset[Reason] = frozenset(("shape", "mid", "name"))
"""Reasons for which the shapes of all residuals tell the mistake."""


@contextmanager
def explained(
    unet: nn.Module, controlnet: nn.Module | Sequence[nn.Module] | None = None, *, contract: Contract | None = None
) -> Iterator[None]:
    """Turn a failure of `unet` over its residuals, inside the block, into an ExplainedError that names slot and cause.

    `unet` is a live UNet2DConditionModel on any device, also one wrapped by `torch.compile`, or a drop-in that
    `shapecheck.load` made. `controlnet` is one ControlNet, a MultiControlNetModel, or several whose residuals reach it:
    residuals that are the very tensors it returned are then told by their number there, which shows an order that shapes
    cannot, and a ControlNet that is made for another UNet or ran at another size is told by its name. So are two whose
    residuals a MultiControlNetModel cannot add. `contract` is what `shapecheck.probe(unet)` returns; without it the UNet is
    probed, on the meta device, when something fails.

    What holds: an exception is turned only where it, or one that it was explicitly raised from, came out of a call of this
    very UNet, and where what is wrong with the residuals of that call explains its text: a text of shapes only where these
    shapes fail so, one of dtypes or devices only where these differ. Every other exception passes as it is: memory that ran
    out, a LoRA that does not fit, what happens after the call. Each thread's calls are kept apart: a failure is explained by
    the arguments of its own call, also where it reaches the block from another thread; a sum of ControlNets only where it was
    computed in the thread of the block. What PyTorch accepts in silence raises nothing here: `shapecheck.guard` refuses that
    before the call.

    Raises ShapecheckError, before anything is hooked, where `unet` takes no residuals, or what is given beside it is no
    ControlNet or no contract.
    """
    if contract is not None and not isinstance(contract, Contract):
        raise ShapecheckError(f"contract= takes what shapecheck.probe(unet) returns, not a {type(contract).__name__}")
    watched = Watched(unet, controlnet)
    with ExitStack() as hooks:
        watched.install(hooks)
        try:
            yield
        except Exception as error:
            hooks.close()  # the UNet may be observed now
            explained_error = _explain_error(error, watched, contract, unet)
            if explained_error is None:
                raise
            raise explained_error from error


def _explain_error(error: Exception, watched: Watched, contract: Contract | None, unet: nn.Module) -> ExplainedError | None:
    """Return the error that says more, if residuals explain this one."""
    if any(isinstance(cause, ContractError) or is_of_memory(cause) for cause in follow_causes(error)):
        return None
    known = cache(lambda: contract or contract_of_live(unwrap_compiled(unet)))
    try:
        for cause in follow_causes(error):
            for traced in find_calls(cause, watched.is_unet):
                if call := watched.call_of(traced):
                    return explain_call(traced, call, known(), watched.emissions()) or _explain_by_text(cause, known())
            if explained_error := explain_sum(cause, watched, known):
                return explained_error
    except Exception as failure:  # the user's own error must not be lost over ours
        error.add_note(f"shapecheck.explained has no explanation: {type(failure).__name__}: {failure}")
    return None


def explain_call(
    traced: Traced, call: Call, contract: Contract, emitted: Sequence[Returned] = (), *, popped: bool = False
) -> ExplainedError | None:
    """Say what is wrong with the residuals of a call that failed; None if that does not explain how it failed.

    `popped`: the list of down residuals is shorter than it was given.
    """
    geometry = read_geometry(contract, call.sample)
    if isinstance(geometry, Mismatch):
        return None
    order = [slot.name for slot in contract.slots]
    mismatches = [*find_feature_faults(call.features, (None, 0))]
    if call.downs is not None or call.mid is not None:
        mismatches += find_residual_faults(contract, call, geometry, moved=False)
    if popped:
        mismatches = [mismatch for mismatch in mismatches if mismatch.where == order[-1]]
    reasons = find_reasons(traced, call, contract, geometry, mismatches) if mismatches else ()
    if not reasons:
        return None
    judgement = None if popped or _OF_SHAPES.isdisjoint(reasons) else judge_call(call, contract, geometry, emitted)
    mismatches.sort(key=lambda mismatch: order.index(mismatch.where) if mismatch.where in order else len(order))
    return ExplainedError(subject(contract, traced.error, judgement), tuple(mismatches), contract, judgement)


def explained_traceback(error: BaseException) -> ExplainedError | None:
    """What is wrong with the residuals that a UNet was called with, as the frames of an exception's traceback hold them.

    None where no UNet is on the way, or what is wrong with them does not explain the exception. A list that diffusers has
    popped from tells of the mid residual alone.
    """
    found = None if is_of_memory(error) else next(iter(find_calls(error, _takes_residuals)[::-1]), None)
    if found is None:
        return None
    call = read_call(locate_arguments(found.module), found.args, found.kwargs)
    if isinstance(call.features, list):  # popped from: what was in it is not known any more
        call = call._replace(features=None)
    popped = call.mid is None and isinstance(call.downs, list)
    return explain_call(found, call, contract_of_live(found.module), popped=popped)


def _takes_residuals(module: Any) -> bool:
    """Whether this is a UNet whose forward takes a ControlNet's residuals by name."""
    return hasattr(module, "config") and {DOWNS, MID} <= inspect.signature(module.forward).parameters.keys()


def contract_of_live(unet: nn.Module) -> Contract:
    """The contract of a live UNet: a drop-in's own, else that of its twin on the meta device."""
    if isinstance(own := getattr(unet, "contract", None), Contract):
        return own
    from shapecheck.models import diffusers_models
    from shapecheck.models.lookup import ModelSource
    from shapecheck.observe.probe import probe

    config = dict(getattr(unet, "config", {}))
    if type(unet).__name__ != "UNet2DConditionModel":  # a subclass may have another forward
        return probe(unet)
    return probe(diffusers_models.build(ModelSource("the UNet", "the live UNet's config", "UNet2DConditionModel", config)))


def _explain_by_text(error: BaseException, contract: Contract) -> ExplainedError | None:
    """What the text of an exception says by itself, where it names an input: those of ONNX Runtime and TensorRT do."""
    diagnosis = explain_text(str(error)[:100_000], {"this UNet": contract}, RequestedSize())
    causes = [cause for reading in diagnosis.found if reading.symptom.names for cause in reading.causes]
    if not causes:
        return None
    found = tuple(
        Mismatch("input", name, cause.told, "what the file takes", cause=cause.change)
        for cause in causes
        for name in cause.slots or (cause.where,)
    )
    return ExplainedError(f"{contract.class_name} failed: {last_line(error)}", found, contract, None)
