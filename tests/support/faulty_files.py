"""Faulty and healthy files, each tried by `parity` as a user does it: is the fault caught, and does the verdict name it?

`python tests/support/faulty_files.py [PART OF A NAME ...] [--seeds N] [--healthy] [--json FILE]` tries them all in float32 and
float16, prints a line for each, and then what was missed. A seed is that of `parity --seed`: all noise of its inputs.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import os
import re
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path

import onnx_files
import onnx_ir as ir
import parity_faults as faults
import parity_runs
import small
import torch
from artefacts import FOLDER
from engines import sealed
from onnx_files import add_again, exchange, planted, unconsume
from parity_runs import NAMES
from torch import nn

from shapecheck import ShapecheckError
from shapecheck.parity.request import ParityRequest
from shapecheck.parity.results import Parity
from shapecheck.parity.runners import open_session
from shapecheck.parity.summary import summarize

Edit = Callable[[ir.Model], None]
Named = Callable[["Told"], bool]
"""Whether a verdict names the place of a fault; of one that has none, whether nothing else is accused."""
PRECISIONS = {"float32": torch.float32, "float16": torch.float16}
LATENT = (17, 25)
FED = onnx_files.DEEP | {
    "block_out_channels": (8, 16, 24),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("UpBlock2D",) * 3,
    "mid_block_type": "UNetMidBlock2D",
}
"""Takes the features of SDXL's T2I-Adapter, the last two of one shape."""
OUTPUTS = [*NAMES[:4], "mid_block_residual"]
"""Those of `controlnet`, as SHALLOW's slots are; the first two have one shape, and the last two."""
LARGE = 1_000
"""Latent cells above which some faults begin."""


@dataclass(frozen=True)
class Told:
    """A verdict, as far as it says what is wrong."""

    caught: bool
    lines: tuple[str, ...] = ()
    """`slot[down_block_residual_00]: changes nothing`, and the module where values begin to differ."""
    accused: tuple[str, ...] = ()
    """The slots and inputs whose own check failed."""
    seconds: float = 0.0
    summary: str = ""
    """What follows BROKEN: in the first line."""


@dataclass(frozen=True)
class Fault:
    of: str
    """The kind of file: a key of KINDS."""
    edit: Edit
    named: Named
    is_searched: bool = False
    """Whether its place is a module, which only the search for the first value that differs tells."""
    is_fine: bool = False
    """Whether it is less than what float16 rounds, and above 90 dB PSNR after ten DDIM steps: there it may be missed."""


@dataclass(frozen=True)
class Kind:
    """A model of which files are made."""

    config: Mapping[str, object]
    is_controlnet: bool = False
    adapter: bool = False
    edit: Edit | None = None
    """What leaves the file as good as it was."""

    def make(self) -> nn.Module:
        unet = small.unet(**self.config)
        if not self.is_controlnet:
            return unet
        net = small.controlnet(unet)
        for layer in net.controlnet_cond_embedding.modules():  # a fresh one does not see its image
            if isinstance(layer, nn.Conv2d):
                nn.init.kaiming_normal_(layer.weight)
                nn.init.zeros_(layer.bias)
        return net


KINDS = {
    "deep": Kind(onnx_files.DEEP),
    "attention": Kind(small.SHALLOW),
    "xl": Kind(onnx_files.XL),
    "labels": Kind(small.SHALLOW | {"num_class_embeds": 10}),
    "adapter": Kind(FED, adapter=True),
    "controlnet": Kind(small.SHALLOW, is_controlnet=True),
}
HEALTHY = {
    **KINDS,
    "tiny": Kind(small.TINY),
    "sd15": Kind({}),
    "inpainting": Kind(small.SHALLOW | {"in_channels": 9, "use_linear_projection": True}),
    "controlnet of xl": Kind(onnx_files.XL, is_controlnet=True),
    "without names of weights": Kind(onnx_files.DEEP, edit=faults.without_weight_names),
}


def says(*patterns: str) -> Named:
    """Require that each pattern is found in one of the lines."""
    return lambda told: all(any(re.search(pattern, line) for line in told.lines) for pattern in patterns)


def accuses(*names: str, lost: bool = False) -> Named:
    """Require that the checks of these slots or inputs fail, of no other, and that only what is `lost` is said to be."""
    words = says("changes nothing") if lost else is_part
    return lambda told: set(told.accused) == set(names) and words(told)


def is_part(told: Told) -> bool:
    """Require that nothing is said to be lost whole."""
    return not says("changes nothing:")(told)


def tells(name: str) -> Named:
    """Require that an input is named, and is not said to be lost whole."""
    return both(says(name), is_part)


def both(one: Named, other: Named) -> Named:
    return lambda told: one(told) and other(told)


def only_large(told: Told) -> bool:
    """Require that whatever failed was of a large size, or that the limit is told."""
    sizes = [match for line in told.lines if (match := re.match(r"case\[[^]]*latent (\d+)×(\d+)", line))]
    is_each = all(int(size[1]) * int(size[2]) > LARGE for size in sizes)
    return says(r"above 1,\d{3} cells")(told) or (bool(sizes) and is_each and not told.accused)


_PAIRS = [NAMES[first : first + 2] for first in (0, 2, 4, 7)]
"""Neighbours of the same shape."""


def _list_slot_faults() -> Iterator[tuple[str, Fault]]:
    for name in NAMES:
        edits: dict[str, Edit] = {
            "lost": unconsume(name),
            "halved": faults.scaled(name, 0.5),
            "doubled": add_again(name),
            "negated": faults.scaled(name, -1),
            "a tenth lost of": faults.scaled(name, 0.9),
            "every second channel lost of": faults.masked(name, 1, 0),
            "turned": faults.reshaped(name),
            "rolled": faults.rolled(name),
        }
        for words, edit in edits.items():
            yield f"{words} {name}", Fault("deep", edit, accuses(name, lost=words == "lost"))
        clipped = says(rf"^slot\[{name}\]|strong residuals|±8|cut off")
        yield f"sums clipped at 8 {name}", Fault("deep", faults.sums_clipped(8, name), clipped)
    for one, other in _PAIRS:
        yield f"exchanged {one} {other}", Fault("deep", exchange(one, other), accuses(one, other))
        yield f"delayed {one} {other}", Fault("deep", faults.delayed(one, other), accuses(one))


def _list_input_faults() -> Iterator[tuple[str, Fault]]:
    for name in ("sample", "timestep", "encoder_hidden_states"):
        yield f"baked {name}", Fault("deep", faults.baked(name, 0.5), accuses(name, lost=True))
        yield f"scaled {name}", Fault("deep", faults.scaled(name, 0.9), tells(name))
    text, late, row = tells("encoder_hidden_states|text"), tells("timestep"), says("in rows 3 and later")
    yield "sample clipped at 3", Fault("deep", faults.clipped("sample", 3), tells("sample|latents"))
    yield "sample clipped at 8", Fault("deep", faults.clipped("sample", 8), tells("sample|latents"))
    for of in ("deep", "attention"):
        yield f"text clipped at 6 in {of}", Fault(of, faults.clipped("encoder_hidden_states", 6), text)
        lost = faults.wrong_above(LARGE, "encoder_hidden_states", 0)
        yield f"text lost above 1,000 cells in {of}", Fault(of, lost, only_large, is_fine=of == "deep")
        yield f"tokens cut at 77 in {of}", Fault(of, faults.tokens_cut(77), tells("tokens|encoder_hidden_states"))
        yield (
            f"text of later rows lost in {of}",
            Fault(of, faults.later_rows_without(3, "encoder_hidden_states"), row),
        )
    for most in (240, 910):
        yield f"timestep clamped at {most}", Fault("deep", faults.timestep_clamped(most), late)
    yield "timestep at least 20", Fault("deep", faults.limited("timestep", 20, 1000), late)
    yield "timestep of whole numbers", Fault("deep", faults.rounded("timestep"), late)
    for name, most in (("text_embeds", 2), ("time_ids", 512)):
        yield f"baked {name}", Fault("xl", faults.baked(name, 1), accuses(name, lost=True))
        yield f"scaled {name}", Fault("xl", faults.scaled(name, 0.9), tells(name))
        yield f"clipped {name}", Fault("xl", faults.clipped(name, most), tells(name))
    for name in OUTPUTS:
        yield f"lost {name} in xl", Fault("xl", unconsume(name), accuses(name, lost=True))
    yield "baked class_labels", Fault("labels", faults.baked("class_labels", 1), accuses("class_labels", lost=True))
    yield "clipped class_labels", Fault("labels", faults.limited("class_labels", 0, 7), tells("class_labels"))


def _list_adapter_faults() -> Iterator[tuple[str, Fault]]:
    names = [f"down_intrablock_residual_{number:02}" for number in range(4)]
    for name in names:
        yield f"lost {name}", Fault("adapter", faults.scaled(name, 0), accuses(name, lost=True))
        yield f"negated {name}", Fault("adapter", faults.scaled(name, -1), accuses(name))
    yield "exchanged features", Fault("adapter", exchange(*names[2:]), accuses(*names[2:]))


def _list_whole_faults() -> Iterator[tuple[str, Fault]]:
    """Faults of many slots, of rows, sizes and numbers."""
    row, strong = says("in rows 3 and later"), says("strong residuals|±8|cut off|clip")
    whole = {
        "all sums clipped at 8": (faults.sums_clipped(8, *NAMES), strong),
        "all residuals clipped at 8": (_each(faults.clipped, 8), strong),
        "control lost": (_each(faults.scaled, 0), says("no effect|changes nothing")),
        "rows after the third without control": (faults.later_rows_without(3, *NAMES), row),
        "rows after the second without control": (faults.later_rows_without(2, *NAMES), says("in rows 2 and later")),
        "rows after the third without one slot": (faults.later_rows_without(3, NAMES[3]), row),
        "halves exchanged": (faults.halves_exchanged(*NAMES), says("halves are exchanged")),
        "halves of text exchanged": (faults.halves_exchanged("encoder_hidden_states"), says("halves of encoder_hidden_states")),
        "sample halved above 1,000 cells": (faults.wrong_above(LARGE, "sample", 0.5), only_large),
        "a slot lost above 1,000 cells": (faults.wrong_above(LARGE, NAMES[2], 0), only_large),
        "mid lost above 1,000 cells": (faults.wrong_above(LARGE, NAMES[-1], 0), only_large),
        "not a number": (faults.not_a_number(2, 4), says("NaN.*in channel 2")),
        "rows after the third not a number": (
            faults.later_rows_not_a_number(3, "out_sample"),
            says("NaN", "in rows 3 and later"),
        ),
        "a channel halved": (faults.output_scaled("out_sample", 1, 0.5, 1, 1), accuses()),
        "image negated": (faults.output_scaled("out_sample", -1), accuses()),
        "image a hundredth too bright": (faults.output_scaled("out_sample", 1.01), accuses()),
    }
    return ((name, Fault("deep", edit, named)) for name, (edit, named) in whole.items())


def _each(fault: Callable[[str, float], Edit], number: float) -> Edit:
    edits = [fault(name, number) for name in NAMES]

    def edit(model: ir.Model) -> None:
        for each in edits:
            each(model)

    return edit


def _list_inner_faults() -> Iterator[tuple[str, Fault]]:
    """Faults of weights and layers, whose place is where values begin to differ."""
    for bits in (8, 10):
        yield f"weights of {bits} bits", Fault("attention", faults.in_bits(bits), accuses())
    first = says(r"^first differs: down_blocks\.0")
    yield "GELU by tanh", Fault("attention", faults.tanh_gelu, first, is_searched=True, is_fine=True)
    for epsilon in (1e-3, 1e-2):
        for operator, number, module in (
            ("InstanceNormalization", 0, "down_blocks.0"),
            ("InstanceNormalization", 8, "mid_block"),
            ("LayerNormalization", 0, "down_blocks.0"),
        ):
            edit = faults.other_epsilon(operator, number, epsilon)
            named = says(rf"^first differs: {re.escape(module)}")
            yield f"epsilon {epsilon:g} of {operator} {number}", Fault("attention", edit, named, is_searched=True, is_fine=True)


def _list_controlnet_faults() -> Iterator[tuple[str, Fault]]:
    for name in OUTPUTS:
        at = both(says(rf"^case\[.*{name}\]|in {name}$"), accuses())
        yield f"output lost {name}", Fault("controlnet", faults.output_scaled(name, 0), at)
        yield f"output halved {name}", Fault("controlnet", faults.output_scaled(name, 0.5), at)
        yield f"output negated {name}", Fault("controlnet", faults.output_scaled(name, -1), at)
        yield f"output left out {name}", Fault("controlnet", faults.output_left_out(name), at)
    for one, other in ((OUTPUTS[0], OUTPUTS[1]), (OUTPUTS[3], OUTPUTS[4])):
        holds = says(rf"{one}\]: .*holds what belongs in {other}", rf"{other}\]: .*holds what belongs in {one}")
        named = both(holds, accuses())
        yield f"outputs exchanged {one} {other}", Fault("controlnet", faults.outputs_exchanged(one, other), named)
    for name in ("sample", "timestep", "encoder_hidden_states", "controlnet_cond", "conditioning_scale"):
        yield f"ControlNet's {name} baked", Fault("controlnet", faults.baked(name, 1), accuses(name, lost=True))
        yield f"ControlNet's {name} scaled", Fault("controlnet", faults.scaled(name, 0.9), tells(name))
    strength = tells("conditioning_scale|strength")
    yield "strength at most 1", Fault("controlnet", faults.limited("conditioning_scale", 0, 1), strength)
    yield (
        "ControlNet's image clipped at 0.5",
        Fault("controlnet", faults.clipped("controlnet_cond", 0.5), tells("controlnet_cond")),
    )
    rows = faults.later_rows_not_a_number(3, OUTPUTS[1])
    yield "ControlNet's later rows not a number", Fault("controlnet", rows, says("NaN", "in rows 3 and later"))
    late = faults.later_rows_without(3, "controlnet_cond")
    yield "ControlNet's later rows without image", Fault("controlnet", late, says("in rows 3 and later"))


FAULTS = dict(
    itertools.chain(
        _list_slot_faults(),
        _list_input_faults(),
        _list_adapter_faults(),
        _list_whole_faults(),
        _list_inner_faults(),
        _list_controlnet_faults(),
    )
)


@dataclass
class Workshop:
    """Makes files in a folder and tries them; PyTorch's side of a model and a seed is computed once."""

    folder: Path
    _made: dict[tuple[str, str], tuple[nn.Module, Path]] = field(default_factory=dict)

    def make(self, name: str, dtype: str) -> tuple[nn.Module, Path]:
        """Return a model and the healthy file that was made of it."""
        if (name, dtype) not in self._made:
            kind, path = HEALTHY[name], self.folder / f"{name} {dtype}.onnx"
            model = kind.make().to(PRECISIONS[dtype])
            if kind.is_controlnet:
                onnx_files.controlnet_written(path, model, latent=LATENT)
            else:
                sealed(*onnx_files.written(path, model, latent=LATENT, adapter=kind.adapter))
            if kind.edit is not None:
                planted(path, path, kind.edit)
            self._made[name, dtype] = model, path
        return self._made[name, dtype]

    def try_healthy(self, name: str, dtype: str, seed: int) -> Told:
        return self._try(*self.make(name, dtype), seed, is_searched=False)

    def try_fault(self, name: str, dtype: str, seed: int) -> Told:
        fault, path = FAULTS[name], self.folder / "faulty.onnx"
        model, healthy = self.make(fault.of, dtype)
        return self._try(model, planted(healthy, path, fault.edit), seed, is_searched=fault.is_searched)

    def _try(self, model: nn.Module, path: Path, seed: int, *, is_searched: bool) -> Told:
        """Run all that `parity MODEL --onnx FILE --seed N` does, the search for the first value that differs where it matters.

        The search decides no check, and takes most of the time.
        """
        began = time.perf_counter()
        opener = None if is_searched else partial(open_session, geometries=(), model=None)
        try:
            parity = parity_runs.report(ParityRequest(model, path, seed=seed), (), opener=opener)
        except ShapecheckError as error:
            return Told(True, (str(error),), (), time.perf_counter() - began, f"refused: {error}")
        return _read_verdict(parity, time.perf_counter() - began)


def _read_verdict(parity: Parity, seconds: float) -> Told:
    (side,) = parity.sides
    lines = [f"{result.check}: {result.reason}".removeprefix(f"{side.backend}/") for result in side.failed]
    if side.divergence is not None:
        lines.append(f"first differs: {side.divergence.module} {side.divergence.slot}")
    accused = tuple(result.check.where for result in side.failed if result.check.kind in ("slot", "input"))
    return Told(not parity.passes, tuple(lines), accused, seconds, summarize(parity))


def judge(name: str, dtype: str, told: Told) -> str:
    """Return what is to be said of a verdict about a fault: `missed`, `too fine` to be seen, `not named`, or `named`."""
    fault = FAULTS[name]
    if not told.caught:
        return "too fine" if fault.is_fine and dtype == "float16" else "missed"
    return "named" if fault.named(told) else "not named"


def describe(told: Told) -> str:
    """Return the seconds and the first line of what is told."""
    return f"{told.seconds:5.1f} s  {told.summary[:300]}"


def _list_trials(names: Iterable[str], seeds: range) -> Iterator[tuple[str, str, int]]:
    """Yield every trial, those of one reference together."""
    for seed in seeds:
        parity_runs.forget()
        for dtype in PRECISIONS:
            yield from ((name, dtype, seed) for name in names)


def main() -> int:
    """Run the command line, and return the exit status: 1 if anything was missed, not named, or a false alarm."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="PART", help="of the name of a fault; all of them by default")
    parser.add_argument("--seeds", type=int, default=1, metavar="N")
    parser.add_argument("--healthy", action="store_true", help="try the healthy files for false alarms in place of the faults")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every verdict there as it comes, a line each")
    asked = parser.parse_args()
    every = HEALTHY if asked.healthy else FAULTS
    names = [name for name in every if not asked.names or any(part in name for part in asked.names)]
    counts: dict[str, int] = {}
    wrong: list[str] = []
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="shapecheck-faults-")))
        os.environ.setdefault(FOLDER, str(folder))
        out = stack.enter_context(asked.json.open("w", encoding="utf-8")) if asked.json else None
        workshop = Workshop(folder)
        gc.collect()
        gc.freeze()
        for name, dtype, seed in _list_trials(names, range(asked.seeds)):
            if asked.healthy:
                told = workshop.try_healthy(name, dtype, seed)
                outcome = "FALSE ALARM" if told.caught else "passed"
            else:
                told = workshop.try_fault(name, dtype, seed)
                outcome = judge(name, dtype, told)
            line = f"{outcome:11} {name}, {dtype}, seed {seed}: {describe(told)}"
            print(line, flush=True)
            counts[outcome] = counts.get(outcome, 0) + 1
            wrong += [line] if outcome in ("missed", "not named", "FALSE ALARM") else []
            if out is not None:
                record = {"name": name, "dtype": dtype, "seed": seed, "outcome": outcome} | asdict(told)
                print(json.dumps(record), file=out, flush=True)
    print("\n".join(["", *wrong, ""]), ", ".join(f"{count} {outcome}" for outcome, count in counts.items()), sep="")
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
