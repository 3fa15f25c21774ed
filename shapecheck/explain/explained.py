"""A `with` block in which a UNet's failure over residuals names its slot, its cause and what to change."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import cache
from typing import Any

from torch import nn

from shapecheck.contract import Contract, ContractError, Mismatch, ShapecheckError
from shapecheck.explain.attribution import find_reasons, is_of_memory
from shapecheck.explain.call_log import CallLog, EmissionRecord
from shapecheck.explain.explain_text import explain_text
from shapecheck.explain.explained_error import ExplainedError, describe_failure, last_line
from shapecheck.explain.multi_controlnet import explain_sum
from shapecheck.explain.residual_table import RequestedSize
from shapecheck.explain.tensor_identity import judge_call
from shapecheck.explain.traceback_calls import FailedCall, find_calls, follow_causes
from shapecheck.models.forward_call import unwrap_compiled
from shapecheck.runtime.residual_checks import find_feature_faults, find_residual_faults, read_geometry
from shapecheck.runtime.unet_call import DOWNS, MID, Call, locate_arguments, read_call

__all__ = ["ExplainedError", "explained", "explained_traceback"]


@contextmanager
def explained(
    unet: nn.Module, controlnet: nn.Module | Sequence[nn.Module] | None = None, *, contract: Contract | None = None
) -> Iterator[None]:
    """Turn a failure of `unet` over its residuals, inside the block, into an ExplainedError that names slot and cause.

    `unet` is a live UNet2DConditionModel on any device, also one wrapped by `torch.compile`, or a drop-in that
    `shapecheck.load` made. `controlnet` is one ControlNet, a MultiControlNetModel, or several whose residuals reach it. If the
    residuals are the very tensors that it returned, they are known by their number there, which shows an order that shapes
    cannot; a ControlNet that is made for another UNet or ran at another size is named, and so are two whose residuals a
    MultiControlNetModel cannot add. `contract` is the result of `shapecheck.probe(unet)`; without it the UNet is probed, on the
    meta device, when something fails.

    An exception is turned only if it, or one that it was explicitly raised from, came out of a call of this very UNet, and the
    residuals of that call explain its text: a text of shapes only if these shapes fail so, one of dtypes or devices only if
    these differ. Every other exception passes as it is: memory that ran out, a LoRA that does not fit, an error after the call.
    Each thread's calls are kept apart: a failure is explained by the arguments of its own call, even if it reaches the block
    from another thread; a sum of ControlNets only if it was computed in the thread of the block. What PyTorch accepts in
    silence raises nothing here: `shapecheck.guard` refuses that before the call.

    Raises ShapecheckError, before any hook is set, if `unet` takes no residuals, or `controlnet` or `contract` is not one.
    """
    if contract is not None and not isinstance(contract, Contract):
        raise ShapecheckError(f"contract= takes what shapecheck.probe(unet) returns, not a {type(contract).__name__}")
    log = CallLog(unet, controlnet)
    with ExitStack() as hooks:
        log.install(hooks)
        try:
            yield
        except Exception as error:
            hooks.close()  # the UNet may be observed now
            explained_error = _explain_error(error, log, contract, unet)
            if explained_error is None:
                raise
            raise explained_error from error


def _explain_error(error: Exception, log: CallLog, contract: Contract | None, unet: nn.Module) -> ExplainedError | None:
    if any(isinstance(cause, ContractError) or is_of_memory(cause) for cause in follow_causes(error)):
        return None
    known = cache(lambda: contract or contract_of_live(unwrap_compiled(unet)))
    try:
        for cause in follow_causes(error):
            for traced in find_calls(cause, log.is_unet):
                if call := log.call_of(traced):
                    return _explain_call(traced, call, known(), log.emissions()) or _explain_by_text(cause, known())
            if explained_error := explain_sum(cause, log, known):
                return explained_error
    except Exception as failure:  # the user's own error must not be lost over ours
        error.add_note(f"shapecheck.explained has no explanation: {type(failure).__name__}: {failure}")
    return None


def _explain_call(
    traced: FailedCall, call: Call, contract: Contract, emitted: Sequence[EmissionRecord] = (), *, popped: bool = False
) -> ExplainedError | None:
    """Return what is wrong with the residuals of a failed call, or None if that does not explain how it failed.

    `popped`: diffusers may have taken residuals out of the caller's list.
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
    reasons = find_reasons(traced, call, contract, geometry, mismatches) if mismatches else set()
    if not reasons:
        return None
    # for these reasons the shapes of all residuals show the mistake
    is_of_shapes = bool(reasons & {"shape", "mid", "name"}) and not popped
    judgement = judge_call(call, contract, geometry, emitted) if is_of_shapes else None
    mismatches.sort(key=lambda mismatch: order.index(mismatch.where) if mismatch.where in order else len(order))
    return ExplainedError(describe_failure(contract, traced.error, judgement), tuple(mismatches), contract, judgement)


def explained_traceback(error: BaseException) -> ExplainedError | None:
    """Return what is wrong with the residuals of a UNet's call, as the frames of an exception's traceback hold them.

    None if no UNet is on the way, or its residuals do not explain the exception. Of a list that diffusers has popped from,
    only the mid residual can be judged.
    """

    def takes_residuals(module: Any) -> bool:
        return hasattr(module, "config") and {DOWNS, MID} <= inspect.signature(module.forward).parameters.keys()

    if is_of_memory(error) or not (calls := find_calls(error, takes_residuals)):
        return None
    traced = calls[-1]
    call = read_call(locate_arguments(traced.module), traced.args, traced.kwargs)
    if isinstance(call.features, list):  # popped from, so that its items are not known any more
        call = call._replace(features=None)
    popped = call.mid is None and isinstance(call.downs, list)
    return _explain_call(traced, call, contract_of_live(traced.module), popped=popped)


def contract_of_live(unet: nn.Module) -> Contract:
    """Return the contract of a live UNet: a drop-in's own, else that of its twin on the meta device."""
    if isinstance(contract := getattr(unet, "contract", None), Contract):
        return contract
    from shapecheck.models import diffusers_models
    from shapecheck.models.config_file import ModelSource
    from shapecheck.observe.probe import probe

    config = dict(getattr(unet, "config", {}))
    if type(unet).__name__ != "UNet2DConditionModel":  # a subclass may have another forward
        return probe(unet)
    return probe(diffusers_models.build(ModelSource("the UNet", "the live UNet's config", "UNet2DConditionModel", config)))


def _explain_by_text(error: BaseException, contract: Contract) -> ExplainedError | None:
    """Return what the text of an exception says by itself if it names an input, as those of ONNX Runtime and TensorRT do."""
    diagnosis = explain_text(str(error)[:100_000], {"this UNet": contract}, RequestedSize())
    causes = [cause for reading in diagnosis.explanations if reading.symptom.names for cause in reading.causes]
    if not causes:
        return None
    mismatches = tuple(
        Mismatch("input", name, cause.message, "what the file takes", cause=cause.change)
        for cause in causes
        for name in cause.slots or (cause.where,)
    )
    return ExplainedError(f"{contract.class_name} failed: {last_line(error)}", mismatches, contract, None)
