"""Compare what a UNet is called with to what the watched ControlNets emitted: faults that only values can show."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from shapecheck.contract import Mismatch
from shapecheck.contract.naming import name_residuals

Emission = Mapping[str, Tensor]
"""The residuals that one call of a ControlNet returned, by slot name."""
_RECOGNISED = 0.9999
"""Cosine above which one residual is another one scaled: rounding in bfloat16 leaves 1 - 1e-6, a blend falls below."""
_DIFFERENCE = 1e-5
"""Two residuals whose cosine is nearer to 1 than this are taken for one."""
_SILENT = "the shapes are equal, so PyTorch adds it in silence"
_ZEROS = "its control is lost; to switch control off give the ControlNet conditioning_scale=0.0, or the UNet None for both"


def watch_controlnet(controlnet: nn.Module, receive: Callable[[Emission], None]) -> Callable[[], None]:
    """Hand `receive` what a ControlNet returns at each call; return a function that ends it.

    A call that returned anything but a tensor for every slot hands over an empty mapping: the emission before it is no longer
    the last one.
    """

    def hand_over(module: nn.Module, args: object, output: Any) -> None:
        residuals = name_residuals(output)
        receive(residuals if all(isinstance(value, Tensor) for value in residuals.values()) else {})

    # kept out of graphs that torch.compile makes, which would freeze what the hook saw when it was traced
    hook: Callable[..., None] = torch.compiler.disable(hand_over)  # type: ignore[no-untyped-call]
    return controlnet.register_forward_hook(hook).remove


class EmissionWatch:
    """Remembers the last two emissions of each ControlNet, and recognises in a call what is not where it belongs.

    Sets a hook on each; `removals` remove them.
    """

    def __init__(self, controlnets: Sequence[nn.Module]) -> None:
        self._sources = [_Source() for _ in controlnets]
        pairs = zip(controlnets, self._sources, strict=True)
        self.removals = [watch_controlnet(controlnet, source.receive) for controlnet, source in pairs]

    def forget(self) -> None:
        """Let go of every tensor."""
        self._sources = []

    def find_faults(self, residuals: Mapping[str, Tensor]) -> list[Mismatch]:
        """Return what is positively recognised as another residual than the slot's own, or its own exchanged, stale or zero.

        `residuals` are by slot name and of the right shape. The very tensor that was emitted costs nothing; any other is
        read, which waits for a GPU. A residual that is not recognised (a mask, a blend, another producer) passes.
        """
        unknown = dict(residuals)
        for source in self._sources:
            source.used = True
            unknown = {name: value for name, value in unknown.items() if not source.emitted(name, value)}
        if not unknown:
            return []
        candidates = _Candidates(self._sources)
        with torch.no_grad():
            faults = [_find_fault(candidates, name, value) for name, value in unknown.items() if _is_readable(value)]
        return [fault for fault in faults if fault]


class _Source:
    """The last emission of one ControlNet and the one before it."""

    def __init__(self) -> None:
        self.last: Emission = {}
        self.before: Emission = {}
        self.spent = False
        """The UNet was called while `before` was the last. If not, `before` may still be waiting for its call."""
        self.used = False

    def receive(self, emission: Emission) -> None:
        self.before, self.spent = self.last, self.used
        # without its graph, which would keep the activations of the whole ControlNet
        self.last = {name: value.detach() if value.requires_grad else value for name, value in emission.items()}
        self.used = False

    def emitted(self, name: str, value: Tensor) -> bool:
        """Say whether this is the very tensor emitted for the slot, perhaps with its graph."""
        if self.last.get(name) is value:
            return True
        current = (self.last,) if self.spent else (self.last, self.before)
        return any(
            (kept := emission.get(name)) is not None
            and kept.shape == value.shape
            and kept.device == value.device
            and _is_readable(kept)
            and _is_readable(value)
            and (kept.data_ptr(), kept.stride(), kept.dtype) == (value.data_ptr(), value.stride(), value.dtype)
            for emission in current
        )


class _Candidate(NamedTuple):
    """A residual to compare with others, and the square of its length as a vector, which is worked out once."""

    values: Tensor
    square: Tensor


class _Candidates:
    """The forms in which an emission for a slot may arrive there."""

    def __init__(self, sources: Sequence[_Source]) -> None:
        self._last = [source.last for source in sources]
        self._waiting = [source.before for source in sources if not source.spent]
        self._spent = [source.before for source in sources if source.spent]
        self._own: dict[tuple[Any, ...], list[_Candidate]] = {}
        self.names = tuple(dict.fromkeys(name for emission in self._last for name in emission))

    def own(self, name: str, like: Tensor) -> list[_Candidate]:
        """Return what the slot may rightly be given, in the shape and on the device of `like`."""
        key = (name, like.shape, like.device)
        if key not in self._own:
            self._own[key] = _find_arrivals(self._last, name, like) + _find_arrivals(self._waiting, name, like)
        return self._own[key]

    def suspects(self, name: str, value: Tensor, own: list[_Candidate]) -> Iterator[tuple[Mismatch, _Candidate]]:
        """Yield what a residual may be in place of its slot's own, each with what that would look like."""
        for other in self.names:
            if other != name:
                cause = f"this is what the ControlNet gave for {other}; {_SILENT}"
                yield from ((Mismatch("order", name, other, name, cause=cause), form) for form in self.own(other, value))
        batch, _, height, width = value.shape
        for form in own:
            if batch % 2 == 0:
                cause = f"the control of one half of the prompts acts on the other; {_SILENT}"
                mismatch = Mismatch("order", name, "the halves of the batch exchanged", name, cause=cause)
                yield mismatch, form._replace(values=form.values.roll(batch // 2, 0))
            if height == width > 1:
                mismatch = Mismatch("order", name, "height and width exchanged", name, cause=_SILENT)
                yield mismatch, form._replace(values=form.values.transpose(2, 3))
        cause = "the ControlNet has run again since; give what it returned last"
        for form in _find_arrivals(self._spent, name, value):
            yield Mismatch("order", name, "what the ControlNet gave for an earlier call", name, cause=cause), form


def _find_fault(candidates: _Candidates, name: str, value: Tensor) -> Mismatch | None:
    """Return what a residual is in place of its slot's own; None if it is its own, or not recognised."""
    own = candidates.own(name, value)
    if not own:
        return None
    actual = _measure(value.float())
    likeness = max(_compute_cosines(actual, own))
    if 1 - likeness <= _DIFFERENCE:
        return None
    if not value.any():
        lost = all(form.values.to(value.dtype).any() for form in own)
        return Mismatch("unused", name, "zeros", "the ControlNet's residual, which is not zero", cause=_ZEROS) if lost else None
    suspects = list(candidates.suspects(name, value, own))
    if not suspects:
        return None
    cosines = _compute_cosines(actual, [form for _, form in suspects])
    best = max(range(len(cosines)), key=cosines.__getitem__)
    # It has to be ten times nearer than the slot's own.
    clear = cosines[best] > _RECOGNISED and 1 - likeness > 10 * (1 - cosines[best]) + _DIFFERENCE
    return suspects[best][0] if clear else None


def _find_arrivals(emissions: Sequence[Emission], name: str, like: Tensor) -> list[_Candidate]:
    """Return what each of these emissions, and their sum, may look like where it arrives for a slot."""
    emitted = [emission[name].to(like.device) for emission in emissions if name in emission and _is_readable(emission[name])]
    if len(emitted) > 1 and len({residual.shape for residual in emitted}) == 1:
        emitted.append(torch.stack([residual.float() for residual in emitted]).sum(0))
    arrivals = []
    for residual in emitted:
        if residual.shape == like.shape:
            arrivals.append(_measure(residual))
        elif (2 * residual.shape[:1].numel(), *residual.shape[1:]) == like.shape:
            # twice the batch: behind zeros, as guess mode is padded, or repeated
            arrivals.append(_measure(torch.cat([torch.zeros_like(residual), residual])))
            arrivals.append(_measure(torch.cat([residual, residual])))
    return arrivals


def _is_readable(value: Tensor) -> bool:
    """Say whether its values can be read: not on the meta device, nor once a CUDA graph has written over them."""
    if type(value) is not Tensor or value.is_meta or value.layout is not torch.strided:
        return False
    try:
        value.data_ptr()
    except RuntimeError:
        return False
    return True


def _measure(values: Tensor) -> _Candidate:
    # a plain sum, which torch adds up pairwise: vector_norm and cosine_similarity are off by 1e-4 in 2×320×64×64 values
    return _Candidate(values, (values.float() * values).sum())


def _compute_cosines(one: _Candidate, others: Sequence[_Candidate]) -> list[float]:
    """Return the cosine between a float32 residual and each of others of its shape; 0 if one is all zeros or not finite."""
    products = [(one.values * other.values).sum() for other in others]
    # all numbers come from the device in one go
    square, *numbers = torch.stack([one.square, *(other.square for other in others), *products]).tolist()
    pairs = zip(numbers[: len(others)], numbers[len(others) :], strict=True)
    cosines = [product / length if (length := math.sqrt(square * other)) else 0.0 for other, product in pairs]
    return [0.0 if math.isnan(cosine) else cosine for cosine in cosines]
