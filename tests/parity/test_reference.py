"""PyTorch's side of a run: how loud a perturbation is, and what its own rounding lets be seen of it."""

from __future__ import annotations

import pytest
import small
import torch

from shapecheck import Geometry, ShapecheckError
from shapecheck.observe.subject import TorchModel
from shapecheck.parity import reference
from shapecheck.parity.cases import ForwardCase, InputGenerator
from shapecheck.parity.reference import choose_call, compute_reference

SIZE = Geometry(2, 9, 14, 7)


def computed(model, name: str, dtype: str = "float16"):
    """Return PyTorch's side of the call in which an input is perturbed, the call that was chosen, and the steps."""
    subject, steps = TorchModel(model), []
    contract = subject.contract(dtype, control=False)
    usual = ForwardCase(SIZE, perturbed=name)
    generate, calls = InputGenerator(contract, 0), [ForwardCase(SIZE), usual]
    found = compute_reference(
        subject, contract, calls, generate, "auto", lambda module: None, lambda step, *_: steps.append(step)
    )
    return found["out_sample"], choose_call(usual, found), steps


def multiplied(factor: float, *parts: str):
    """Return a UNet in half precision some weights of which are larger."""
    model = small.unet(**small.TINY)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if any(part in name for part in parts):
                weight.mul_(factor)
    return model.half()


@pytest.mark.parametrize("name", ["sample", "timestep", "encoder_hidden_states"])
def test_the_usual_perturbation_is_clear_in_half_precision_and_no_other_is_computed(name):
    side, chosen, steps = computed(multiplied(1), name)
    assert chosen == ForwardCase(SIZE, perturbed=name)
    assert side.blur(chosen) <= 0.025
    assert side.precision == "float32"
    assert len(side.reference) == len(side.rounded) == 2
    assert [step for step in steps if step.startswith("loading")] == ["loading the model in float32"]
    assert f"computing with PyTorch in float16, call 2 of 2: {chosen}" in steps


def test_text_so_loud_that_attention_is_at_random_is_given_more_quietly():
    side, chosen, steps = computed(multiplied(30, "attn2.to_q", "attn2.to_k"), "encoder_hidden_states")
    usual = ForwardCase(SIZE, perturbed="encoder_hidden_states")
    assert chosen.times < 1
    assert side.blur(chosen) <= 0.025 < side.blur(usual)
    assert len([step for step in steps if step.startswith("loading")]) == 2


def test_a_perturbation_that_overflows_is_given_more_quietly():
    side, chosen, _ = computed(multiplied(2500, "conv_in"), "sample")
    assert chosen.times < 1
    assert ForwardCase(SIZE, perturbed="sample") not in side.reference
    assert side.blur(chosen) <= 0.025


def test_a_perturbation_that_overflows_at_every_size_is_refused(monkeypatch):
    monkeypatch.setattr(reference, "OTHER_TIMES", (2.0,))
    with pytest.raises(ShapecheckError, match=r"PyTorch's own image is not finite at .*, sample perturbed, in float16"):
        computed(multiplied(2500, "conv_in"), "sample")


def test_an_image_that_overflows_by_itself_is_refused():
    with pytest.raises(ShapecheckError, match=r"PyTorch's own image is not finite at batch 2, .* control off, in float16"):
        computed(multiplied(1e5, "conv_in"), "sample")


def test_a_row_of_zeros_allows_no_other_row_more():
    """What a half precision makes of it is no share of anything: an infinite one would let every row pass."""
    expected = torch.tensor([[[[2.0, -4.0]]], [[[0.0, 0.0]]]])
    assert reference.measure_row_share(expected + 0.1, expected) == pytest.approx(0.025)
    assert reference.measure_row_share(torch.ones(1, 1, 1, 2), torch.zeros(1, 1, 1, 2)) == 0.0
