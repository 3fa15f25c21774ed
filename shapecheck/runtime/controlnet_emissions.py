"""What the watched ControlNets emitted, against what the UNet is given: faults that only values can show."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from shapecheck.contract import Mismatch
from shapecheck.contract.naming import name_residuals

Emission = Mapping[str, Tensor]
"""What one call of a ControlNet emitted, by slot name."""


_RECOGNISED = 0.9999
"""Cosine above which one residual is another one scaled: rounding in bfloat16 leaves 1 - 1e-6, a blend falls below."""


_DIFFERENCE = 1e-5
"""Two residuals whose cosine is nearer to 1 than this are not told apart."""


_MARGIN = 10.0
"""How many times nearer than its own residual another one has to be."""


_TELL = "the shapes are equal, so PyTorch adds it in silence"


_ZEROS = "its control is lost; to switch control off give the ControlNet conditioning_scale=0.0, or the UNet None for both"


def watch_controlnet(controlnet: nn.Module, receive: Callable[[Emission], None]) -> Callable[[], None]:
    """Hand `receive` what a ControlNet returns at each call, nothing if these are no residuals; return what ends it."""

    def hand_over(module: nn.Module, args: object, output: Any) -> None:
        receive({name: value for name, value in name_residuals(output).items() if isinstance(value, Tensor)})

    # kept out of graphs that torch.compile makes, which would freeze what the hook saw when it was traced
    hook: Callable[..., None] = torch.compiler.disable(hand_over)  # type: ignore[no-untyped-call]
    return controlnet.register_forward_hook(hook).remove


class Watch:
    """Remembers the last two emissions of each ControlNet, and recognises in a call what is not where it belongs."""

    def __init__(self, controlnets: Sequence[nn.Module]) -> None:
        self._sources = [(each, _Source()) for each in controlnets]

    def install(self) -> list[Callable[[], None]]:
        """Set a hook on each ControlNet; returns what removes them."""
        return [watch_controlnet(controlnet, source.receive) for controlnet, source in self._sources]

    def forget(self) -> None:
        """Let go of every tensor."""
        self._sources = []

    def faults(self, given: Mapping[str, Tensor]) -> list[Mismatch]:
        """What is positively recognised as another residual than the slot's own, or its own exchanged, stale or zero.

        `given` maps slot names to residuals of the right shape. The very tensor that was emitted costs nothing; any other
        is read, which waits for a GPU. What is not recognised (a mask, a blend, another producer) is no fault.
        """
        sources = [source for _, source in self._sources]
        for source in sources:
            source.used = True
        unknown = dict(given)
        for source in sources:
            unknown = {name: value for name, value in unknown.items() if not source.gave(name, value)}
        if not unknown:
            return []
        emitted = _Emitted(sources)
        with torch.no_grad():
            found = [_fault(emitted, name, value) for name, value in unknown.items() if _readable(value)]
        return [each for each in found if each]


class _Seen(NamedTuple):
    """A residual to compare with others, and the square of its length as a vector, which is worked out once."""

    values: Tensor
    square: Tensor


class _Source:
    """The last emission of one ControlNet and the one before it."""

    def __init__(self) -> None:
        self.last: Emission = {}
        self.before: Emission = {}
        self.spent = False
        """Whether the UNet was called while `before` was the last. If not, it may still be waiting for its call."""
        self.used = False

    def receive(self, emission: Emission) -> None:
        """Keep an emission without its graph, which would keep the activations of the whole ControlNet."""
        self.before, self.spent = self.last, self.used
        self.last = {name: value.detach() if value.requires_grad else value for name, value in emission.items()}
        self.used = False

    def gave(self, name: str, value: Tensor) -> bool:
        """Whether this is the very tensor emitted for the slot."""
        if self.last.get(name) is value:
            return True
        current = (self.last,) if self.spent else (self.last, self.before)
        return any((kept := each.get(name)) is not None and _same_memory(kept, value) for each in current)


class _Emitted:
    """How what was emitted for a slot may look where it arrives."""

    def __init__(self, sources: Sequence[_Source]) -> None:
        self._last = [each.last for each in sources]
        self._waiting = [each.before for each in sources if not each.spent]
        self._spent = [each.before for each in sources if each.spent]
        self._own: dict[tuple[Any, ...], list[_Seen]] = {}
        self.names = tuple(dict.fromkeys(name for each in self._last for name in each))

    def own(self, name: str, like: Tensor) -> list[_Seen]:
        """What the slot may rightly be given, in the shape and on the device of `like`."""
        key = (name, like.shape, like.device)
        if key not in self._own:
            self._own[key] = _arrivals(self._last, name, like) + _arrivals(self._waiting, name, like)
        return self._own[key]

    def stale(self, name: str, like: Tensor) -> list[_Seen]:
        """What the slot was given before each ControlNet ran again."""
        return _arrivals(self._spent, name, like)


def _fault(emitted: _Emitted, name: str, value: Tensor) -> Mismatch | None:
    """What a residual that is not its slot's own is instead; None where it is its own, or nothing that is known."""
    own = emitted.own(name, value)
    if not own:
        return None
    seen = _seen(value.float())
    likeness = max(_cosines(seen, own))
    if 1 - likeness <= _DIFFERENCE:
        return None
    if not value.any():
        lost = all(form.values.to(value.dtype).any() for form in own)
        return Mismatch("unused", name, "zeros", "the ControlNet's residual, which is not zero", cause=_ZEROS) if lost else None
    suspects = list(_suspects(emitted, name, value, own))
    if not suspects:
        return None
    scores = _cosines(seen, [form for _, form in suspects])
    best = max(range(len(scores)), key=scores.__getitem__)
    clear = scores[best] > _RECOGNISED and 1 - likeness > _MARGIN * (1 - scores[best]) + _DIFFERENCE
    return suspects[best][0] if clear else None


def _suspects(emitted: _Emitted, name: str, value: Tensor, own: list[_Seen]) -> Iterator[tuple[Mismatch, _Seen]]:
    """What a residual may be in place of its slot's own, each with what that would look like."""
    for other in emitted.names:
        if other != name:
            cause = f"this is what the ControlNet gave for {other}; {_TELL}"
            yield from ((Mismatch("order", name, other, name, cause=cause), form) for form in emitted.own(other, value))
    batch, _, height, width = value.shape
    for form in own:
        if batch % 2 == 0:
            cause = f"the control of one half of the prompts acts on the other; {_TELL}"
            mismatch = Mismatch("order", name, "the halves of the batch exchanged", name, cause=cause)
            yield mismatch, form._replace(values=form.values.roll(batch // 2, 0))
        if height == width > 1:
            mismatch = Mismatch("order", name, "height and width exchanged", name, cause=_TELL)
            yield mismatch, form._replace(values=form.values.transpose(2, 3))
    for form in emitted.stale(name, value):
        cause = "the ControlNet has run again since; give what it returned last"
        yield Mismatch("order", name, "what the ControlNet gave for an earlier call", name, cause=cause), form


def _arrivals(emissions: Sequence[Emission], name: str, like: Tensor) -> list[_Seen]:
    """What one of these emissions gives for a slot, and what their sum gives where there are several."""
    emitted = [each[name].to(like.device) for each in emissions if name in each and _readable(each[name])]
    if len(emitted) > 1 and len({each.shape for each in emitted}) == 1:
        emitted.append(torch.stack([each.float() for each in emitted]).sum(0))
    return [_seen(form) for each in emitted for form in _forms(each, like)]


def _forms(emitted: Tensor, like: Tensor) -> list[Tensor]:
    """As it is; for twice the batch behind zeros, as guess mode is padded, or repeated; nothing for any other shape."""
    if emitted.shape == like.shape:
        return [emitted]
    if (2 * emitted.shape[:1].numel(), *emitted.shape[1:]) == like.shape:
        return [torch.cat([torch.zeros_like(emitted), emitted]), torch.cat([emitted, emitted])]
    return []


def _same_memory(kept: Tensor, value: Tensor) -> bool:
    """Whether two tensors are one, perhaps with and without its graph."""
    return (
        kept.shape == value.shape
        and kept.device == value.device
        and _readable(kept)
        and _readable(value)
        and (kept.data_ptr(), kept.stride(), kept.dtype) == (value.data_ptr(), value.stride(), value.dtype)
    )


def _readable(value: Tensor) -> bool:
    """Whether its values can be looked at: not so on the meta device, or where a CUDA graph has written over them."""
    if type(value) is not Tensor or value.is_meta or value.layout is not torch.strided:
        return False
    try:
        value.data_ptr()
    except RuntimeError:
        return False
    return True


def _seen(values: Tensor) -> _Seen:
    # a plain sum, which torch adds up pairwise: vector_norm and cosine_similarity are off by 1e-4 in 2×320×64×64 values
    return _Seen(values, (values.float() * values).sum())


def _cosines(one: _Seen, others: Sequence[_Seen]) -> list[float]:
    """The cosine between a float32 residual and each of others of its shape; 0 where one is all zeros or not finite.

    All numbers come from the device in one go.
    """
    products = [(one.values * other.values).sum() for other in others]
    square, *numbers = torch.stack([one.square, *(other.square for other in others), *products]).tolist()
    pairs = zip(numbers[: len(others)], numbers[len(others) :], strict=True)
    cosines = [product / length if (length := math.sqrt(square * other)) else 0.0 for other, product in pairs]
    return [0.0 if math.isnan(cosine) else cosine for cosine in cosines]
