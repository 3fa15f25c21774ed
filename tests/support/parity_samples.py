"""Sample parity runs: numbers made up by rule, so that each record is the same every time."""

from __future__ import annotations

import math
from dataclasses import replace

from shapecheck import Contract, Geometry, presets
from shapecheck.contract.records import Slot
from shapecheck.parity.results import Check, Divergence, Effect, Grid, Parity, Ran, Result, Side, Verdict, Worst

GEOMETRIES = (Geometry(2, 9, 11), Geometry(1, 16, 24), Geometry(1, 64, 64))
HOSTILE = "<script>alert(1)</script><!-- \"'&amp; | \x1b[31m"
NAN_CASE = "batch 1, latent 16×24, control on"
SWAPPED = ("down_block_residual_04", "down_block_residual_05")
_ORT = Ran("ort", "CPUExecutionProvider", "x86-64 CPU, 8 threads", "float32", "onnxruntime 1.22.0; no TF32 on a CPU")
_TRT = Ran("trt", "TensorRT", "NVIDIA L4", "float16", "tensorrt 10.13.0; TF32 off")
_VERSIONS = (("torch", "2.8.0"), ("diffusers", "0.35.1"), ("onnxruntime", "1.22.0"))


def grid(seed: int) -> Grid:
    """A fingerprint of 8×8 cells: a soft spot whose place depends on `seed`."""
    row, column = 1 + seed * 5 % 7, 1 + seed * 3 % 7
    cells = [[math.exp(-((r - row) ** 2 + (c - column) ** 2) / (3 + seed % 4)) for c in range(8)] for r in range(8)]
    texture = [
        [cell * (1 - 0.3 * ((r * 5 + c * 3 + seed) % 4) / 4) for c, cell in enumerate(line)] for r, line in enumerate(cells)
    ]
    largest = max(map(max, texture))
    return tuple(tuple(round(cell / largest, 4) for cell in line) for line in texture)


def verdict(seed: int, own: float = 2.4e-6, times: float = 8.0, difference: float | None = None) -> Verdict:
    found = own * (0.6 + seed % 7 / 5) if difference is None else difference
    allowed = own * times
    worst = Worst((0, seed % 4, 3, 5), 0.25 + found, 0.25, found)
    outside = 0 if found <= allowed else 117
    return Verdict(
        (2, 4, 9, 11), allowed, own, 3.4, worst, replace(worst, difference=found / 0.25), found / 4, outside,
        cosine=1 - found**2, psnr=20 * math.log10(3.4 / (found / 4)),
    )  # fmt: skip


def effect(seed: int, strength: float | None = None, cosine: float | None = None, found: int | None = None) -> Effect:
    return Effect(
        1 + (seed % 5 - 2) * 1e-5 if strength is None else strength,
        1 - seed * 1e-9 if cosine is None else cosine,
        0.31 / (1 + seed % 6),
        grid(seed),
        grid(seed if found is None else found),
    )


def results(contract: Contract, backend: str, own: float = 2.4e-6) -> list[Result]:
    """Everything that a healthy backend passes."""
    found = [Result(Check(backend, kind, ""), "passed", seconds=0.01) for kind in ("provider", "weights")]
    for number, at in enumerate(GEOMETRIES):
        for control in ("on", "off") if contract.slots else ("off",):
            case = Check(backend, "case", f"{at}, control {control}")
            found.append(Result(case, "passed", "", at, verdict(2 * number + len(control), own), seconds=0.4))
    if contract.slots:
        found.append(Result(Check(backend, "switch", "on, off, on"), "passed", "", GEOMETRIES[0], verdict(1, own), seconds=0.3))
    found.append(
        Result(Check(backend, "cfg", "halves of the batch"), "passed", "", GEOMETRIES[0], verdict(3, own), seconds=0.3)
    )
    names = [("input", each.name) for each in contract.inputs] + [("slot", each.name) for each in contract.slots]
    for number, (kind, name) in enumerate(names):
        check = Check(backend, kind, name)  # type: ignore[arg-type]
        found.append(Result(check, "passed", "", GEOMETRIES[0], None, effect(number), 0.1))
    return found


def parity(contract: Contract, *sides: Side, model: str = "") -> Parity:
    name = model or contract.header.source
    return Parity(name, contract, "PyTorch float64 on cpu", 8.0, 0, GEOMETRIES, sides, _VERSIONS)


def healthy(preset: str = "sd15") -> Parity:
    contract = presets.contract(preset)
    return parity(contract, Side("ort", f"models/{preset}/unet.onnx", _ORT, tuple(results(contract, "ort"))))


def two_backends() -> Parity:
    """Both healthy."""
    one = healthy("sdxl")
    trt = Side("trt", "models/sdxl/unet.engine", _TRT, tuple(results(one.contract, "trt", 3.1e-3)), notes=("built in 312 s",))
    return replace(one, sides=(*one.sides, trt))


def broken() -> Parity:
    """Two slots of one shape swapped, one without effect, NaN in one case, the mid slot wrong, one check not run."""
    whole = healthy()
    first, second = SWAPPED
    changed = {
        first: (f"acts like {second} of PyTorch (cosine 0.9998): the two slots are swapped", effect(7, 0.03, 0.04, 8)),
        second: (f"acts like {first} of PyTorch (cosine 0.9997): the two slots are swapped", effect(8, 0.02, 0.05, 7)),
        "down_block_residual_10": (
            "changes nothing: the graph does not use it. Export again with the residual given as a graph input.",
            replace(effect(13, 0.0, math.nan), found=((0.0,) * 8,) * 8),
        ),
        "mid_block_residual": ("acts at 0.5 of its strength: it is added after the scale, not before", effect(15, 0.5, 0.9991)),
    }
    nan = replace(verdict(2), nan=96, outside=96, absolute=None, relative=None, rms=math.nan, cosine=math.nan, psnr=math.nan)
    found = [_spoilt(each, changed, nan) for each in whole.sides[0].results]
    where = Divergence(
        "skip_4_sum", "down_blocks.1.attentions.0", first, verdict(4, difference=0.31), ("conv_in", "skip_0_sum", "skip_3_sum"),
        "polygraphy run unet.onnx --onnxrt --onnx-outputs skip_4_sum --load-outputs reference.json --rtol 0 --atol 1.9e-5",
        "found on the graph without ONNX Runtime's optimizations",
    )  # fmt: skip
    side = replace(whole.sides[0], results=tuple(found), divergence=where, notes=("graph optimizations: all",))
    return replace(whole, sides=(side,))


def _spoilt(result: Result, changed: dict[str, tuple[str, Effect]], nan: Verdict) -> Result:
    where = result.check.where
    if where in changed:
        reason, seen = changed[where]
        return replace(result, status="failed", reason=f"{where} {reason}", effect=seen)
    if where == NAN_CASE:
        return replace(result, status="failed", reason=f"{where}: 96 NaN among 792 values", verdict=nan)
    if result.check.kind == "switch":
        return replace(result, status="not run", reason="not tried: a case with control on has failed", verdict=None)
    return result


def could_not_run() -> Parity:
    """One backend runs; TensorRT was asked for, and is not there."""
    whole = healthy()
    why = "TensorRT cannot run here: no NVIDIA driver; install one, or leave trt out"
    failed = Result(Check("trt", "provider", ""), "failed", why)
    return replace(whole, sides=(*whole.sides, Side("trt", "", None, (failed,))))


def without_slots() -> Parity:
    contract = replace(presets.contract("sd15"), slots=())
    return parity(contract, Side("ort", "plain.onnx", _ORT, tuple(results(contract, "ort"))))


def few_slots(pooled: bool = False) -> Parity:
    """Two down slots and the mid slot."""
    slots = presets.contract("sd15").slots
    chosen: tuple[Slot, ...] = (slots[0], slots[4], slots[-1])
    if pooled:
        chosen = tuple(replace(slot, spatial="pooled") for slot in chosen)
    contract = replace(presets.contract("sd15"), slots=chosen)
    return parity(contract, Side("ort", "small.onnx", _ORT, tuple(results(contract, "ort"))))


def nothing_tried() -> Parity:
    return parity(presets.contract("sd15"))


def hostile() -> Parity:
    """Every text that comes from outside tries to be markup."""
    whole = broken()
    side = whole.sides[0]
    assert side.ran and side.divergence
    found = tuple(replace(each, reason=each.reason and f"{each.reason} {HOSTILE}") for each in side.results)
    found += (Result(Check(HOSTILE, "slot", HOSTILE), "failed", HOSTILE, None, None, effect(3, math.inf, -math.inf)),)
    ran = replace(side.ran, device=HOSTILE, detail=HOSTILE)
    where = replace(side.divergence, value=HOSTILE, module=HOSTILE, command=HOSTILE, note=HOSTILE)
    spoilt = Side(HOSTILE, HOSTILE, ran, found, where, (HOSTILE,))
    return replace(whole, model=HOSTILE, reference=HOSTILE, sides=(spoilt,), versions=((HOSTILE, HOSTILE),))


SAMPLES = {
    "healthy": healthy,
    "broken": broken,
    "two-backends": two_backends,
    "could-not-run": could_not_run,
    "without-slots": without_slots,
    "few-slots": few_slots,
    "pooled": lambda: few_slots(pooled=True),
    "nothing-tried": nothing_tried,
    "hostile": hostile,
    "sdxl": lambda: healthy("sdxl"),
    "koala": lambda: healthy("koala-700m"),
}
