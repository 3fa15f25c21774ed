"""What parity sees in float16 of graded faults; healthy ways of computing pass. See reports/half_precision.md."""

from __future__ import annotations

import copy

import pytest
import torch
from half_edits import FAULTS, HEALTHY, make_model

from shapecheck.parity.plan import plan_checks
from shapecheck.parity.request import ParityRequest
from shapecheck.parity.results import Result
from shapecheck.parity.run import ParityRun
from shapecheck.runtime.torch_session import TorchSession

pytestmark = [pytest.mark.nightly, pytest.mark.usefixtures("one_thread")]
SEEN = (
    *("weights as integers of 9 bits", "weights as integers of 10 bits", "weights with 8 significant bits"),
    *("hard SiLU", "SiLU of 32 pieces", "GroupNorm's eps 0.01", "LayerNorm's eps 0.01", "attention's scale times 1.1"),
    *("first convolution in bfloat16", "all convolutions in bfloat16", "the image shifted by 1 %", "timestep 0.3 too large"),
)
"""In every model."""
BELOW = ("tanh-GELU", "SiLU of 128 pieces", "attention's scale times 1.003")
"""Less than PyTorch's own rounding in every model: no picture shows it."""


def judge(model: torch.nn.Module, edit, seed: int) -> list[Result]:
    """Return the results of all values together and of the usual calls, for the model with an edit."""

    def open_edited(backend, file):
        module = copy.deepcopy(model)
        with torch.no_grad():
            edit(module)
        return TorchSession(module, file.contract)

    def plan_rounding(*given):
        (rounding,) = (plan for plan in plan_checks(*given) if plan.check.kind == "rounding")
        return rounding, *(
            plan for plan in plan_checks(*given) if plan.check.kind == "case" and plan.cases[0] in rounding.cases
        )

    request = ParityRequest(model, backends=("torch",), seed=seed)
    return list(ParityRun(request, opener=open_edited, plan=plan_rounding, explain=False).side("torch").results)


@pytest.mark.parametrize("name", ["default", "lively", "xl"])
def test_no_false_alarm_of_rounding_over_twenty_seeds(name):
    ratios = []
    for seed in range(20):
        model = make_model(name, seed)
        for about, edit in HEALTHY.items():
            rounding, *cases = judge(model, edit, seed)
            assert {result.status for result in (rounding, *cases)} == {"passed"}, (seed, about, rounding, cases)
            ratios.append(rounding.rounding.times_own)
    print(f"errors of all values together: {min(ratios):.2f} to {max(ratios):.2f} times PyTorch's own")


@pytest.mark.parametrize("name", ["default", "lively", "xl"])
def test_graded_faults_over_three_seeds(name):
    for seed in range(3):
        model = make_model(name, seed)
        for about in (*SEEN, *BELOW):
            statuses = {result.status for result in judge(model, FAULTS[about], seed)}
            assert ("failed" in statuses) is (about in SEEN), (seed, about)
