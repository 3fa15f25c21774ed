"""What being strict costs a call of a drop-in: `python tests/bench/call.py`. SD1.5's 13 slots; nothing is computed.

All in one run, so that ratios hold on a noisy machine; the first row is a wrapper that checks nothing.
"""

from __future__ import annotations

import timeit

import torch
from tabulate import tabulate

from shapecheck import Geometry, presets
from shapecheck.runtime.binding import Binding
from shapecheck.runtime.call_gate import Gate
from shapecheck.runtime.dropin_unet import DropInUNet

CONTRACT = presets.contract("sd15")
ROUNDS, CALLS = 9, 400


class Nothing:
    """A session that checks and answers at once, with the same image."""

    contract, device, reuses_outputs = CONTRACT, torch.device("cpu"), False

    def __init__(self, gate: Gate, image: torch.Tensor) -> None:
        self.gate, self.image = gate, image

    def __call__(self, inputs: dict) -> dict:
        with self.gate.acquire():
            self.gate.serve(inputs)
        return {"out_sample": self.image}


def main() -> None:
    names = tuple((each, each) for each in CONTRACT.input_rules)
    gate = Gate("bench", Binding(CONTRACT, names, ("out_sample",), "cpu"))
    given = {name: torch.zeros(shape) for name, shape in CONTRACT.input_shapes(Geometry(2, 64, 64)).items()}
    *downs, mid = (given[slot.name] for slot in CONTRACT.slots)
    session = Nothing(gate, torch.zeros(2, 4, 64, 64))
    call = (given["sample"], given["timestep"], given["encoder_hidden_states"])
    residuals = {"down_block_additional_residuals": downs, "mid_block_additional_residual": mid}

    def unchecked() -> dict:
        named = {"sample": call[0], "timestep": call[1], "encoder_hidden_states": call[2]}
        named |= {f"down_block_residual_{index:02d}": each for index, each in enumerate(downs)}
        return named | {"mid_block_residual": mid}

    def anew() -> None:
        gate._last = None
        gate.serve(given)

    strict, blind = DropInUNet(session), DropInUNet(session, finite=False)
    cases = {
        "a wrapper that checks nothing": unchecked,
        "drop-in, no look at the image": lambda: blind(*call, **residuals),
        "drop-in": lambda: strict(*call, **residuals),
        "drop-in, control off": lambda: strict(*call),
        "of it: signature, nothing changed": lambda: gate.serve(given),
        "of it: every input against the contract": anew,
    }
    best = {name: min(timeit.repeat(case, number=CALLS, repeat=ROUNDS)) / CALLS * 1e6 for name, case in cases.items()}
    first = best["a wrapper that checks nothing"]
    print(
        tabulate(
            [(name, f"{cost:.1f}", f"{cost / first:.1f}") for name, cost in best.items()], ["call", "µs", "ratio"], "github"
        )
    )


if __name__ == "__main__":
    main()
