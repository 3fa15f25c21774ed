"""reports/gpu.md from recorded numbers: what tests/bench/gpu.py measured is told, and what is missing looks so."""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
_spec = importlib.util.spec_from_file_location("gpu_page", ROOT / "tests/bench/gpu_page.py")
gpu_page = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(gpu_page)


def make_timing(backend: str, unet: float, controlnet: float, handover: float, **changes) -> dict:
    frame, total = {"controlnet": controlnet, "handover": handover, "unet": unet}, unet + controlnet + handover
    picture = {"frames": 20 * total, "decode": 10.0, "text": 2.0, "total": 20 * total + 12}
    shares = {part: picture[part] / picture["total"] for part in ("frames", "decode", "text")}
    values = {
        "backend": backend,
        "ran": "",
        "frames": [frame],
        "memory": 2048 << 20,
        "reason": "",
        "controlnets": "1, compiled likewise",
        "seconds": 31.5,
        "median_ms": total,
        "picture": picture | {"shares": shares},
        "picture_vae_compiled": picture | {"total": 20 * total + 7, "shares": shares},
    }
    return values | changes


def make_record(**parts: dict) -> dict:
    about = {"commit": "abc123", "date": "2026-12-01", "quick": False, "seconds": 170.0}
    machine = {"gpu": "NVIDIA H200", "python": "3.12.3", "system": "Linux", "capability": "9.0", "memory": 140 << 30}
    machine |= {"driver": ["580.1"], "cuda": "13.0", "versions": {"torch": "2.11.0"}}
    named = {name.replace("__", "/"): about | part for name, part in parts.items()}
    return {"shapecheck_gpu": 1, "machine": machine, "parts": named}


LATENCY = {
    "bench": {
        "geometry": {"batch": 2, "height": 64, "width": 64, "tokens": 77},
        "steps": 20,
        "timings": [
            make_timing("torch", 30.0, 10.0, 0.5),
            make_timing("torch-reduce-overhead", 7.0, 2.5, 0.5),
            make_timing("torch-compile", 5.5, 2.0, 0.06),
            make_timing("trt", 0, 0, 0, frames=[], seconds=None, reason="no unet.plan", controlnets=""),
        ],
        "parts": [
            {"name": "VAE decode", "ran": "AutoencoderKL, float16", "eager": 10.0, "compiled": 5.0, "reason": ""},
            {"name": "text", "ran": "", "eager": None, "compiled": None, "reason": "needs transformers"},
        ],
    },
    "compiled_first": [
        {"backend": "torch-compile", "ready": 95.0, "unet": 62.0, "controlnet": 31.0, "reason": "", "side_by_side": 2}
    ],
}
LIMIT = {"flops": {"unet": 1.61e12, "controlnet": 0.57e12}, "rate": 790e12, "side": 8192}
ROW = {"backend": "torch-compile", "precision": "float16", "role": "unet", "compared": 15}
PARITY = {
    "rows": [
        ROW | {"error": 1.5e-3, "at": "control on", "ratio": 1.25, "ratio_at": "another mid_block_residual", "passes": True},
        ROW
        | {"backend": "ort-cuda", "error": "Infinity", "at": "off", "ratio": "Infinity", "ratio_at": "off", "passes": False},
        ROW | {"backend": "trt", "role": "controlnet", "reason": "no controlnet.plan"},
    ]
}


def read_rows(page: str, start: str) -> list[str]:
    return [cell.strip() for line in page.splitlines() if line.startswith(f"| {start} ") for cell in line.split("|")[2:-1]]


def test_frames_stand_beside_both_baselines_and_the_limit():
    page = gpu_page.render(make_record(sd15__latency=LATENCY, sd15__limit=LIMIT))
    assert "## SD1.5, 512×512, batch 2, 20 steps" in page
    assert read_rows(page, "torch-compile")[:6] == ["5.50", "2.00", "0.06", "7.56", "0.19×", "0.76×"]
    assert read_rows(page, "limit of the arithmetic") == ["2.04", "0.72", "", "2.76", "0.07×", "0.28×"]
    assert read_rows(page, "torch-compile")[6:13] == ["163.2", "158.2", "92.6%", "6.1%", "1.2%", "2048", "31.5"]
    assert "- trt did not run: no unet.plan" in page
    assert "- text: not timed: needs transformers" in page
    assert re.search(r"torch-compile, compiled for the first time, side by side +\| 95 \(UNet 62, ControlNet 31\)", page)
    assert "- commit: abc123, 2026-12-01\n" in page


def test_without_a_baseline_no_ratio_is_told():
    alone = LATENCY["bench"] | {"timings": LATENCY["bench"]["timings"][2:]}
    page = gpu_page.render(make_record(sd15__latency=LATENCY | {"bench": alone}))
    assert read_rows(page, "torch-compile")[4:6] == ["not measured", "not measured"]
    assert "limit of the arithmetic" not in page


def test_parity_is_told_with_where_it_is_worst_and_a_failure_as_such():
    page = gpu_page.render(make_record(sd15__parity=PARITY))
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in page.splitlines() if "float16" in line]
    place = "1.25× (another mid_block_residual)"
    assert rows[0] == ["torch-compile", "float16", "UNet", "15", "1.5e-03", "control on", place, "PARITY"]
    assert rows[1][4:] == ["inf", "off", "inf× (off)", "BROKEN"]
    assert rows[2] == ["trt", "float16", "ControlNet", "", "", "", "", "not run: no controlnet.plan"]


def test_what_was_not_run_is_said_for_every_backend_and_kind_of_card():
    page = gpu_page.render(make_record(sd15__latency=LATENCY, sdxl__parity={"reason": "TimeoutError: interrupted"}))
    table = page[page.index("## What was not run") :]
    header = next(line for line in table.splitlines() if line.startswith("| backend"))
    assert "NVIDIA H200" in header and "RTX 40" in header and "H100" not in header
    assert read_rows(table, "torch-compile") == ["SD1.5", *["not run"] * 5]
    assert all(read_rows(table, backend) == ["not run"] * 6 for backend in ("ort-cuda", "ort-trt", "trt", "rtx"))
    assert "- parity ended early: TimeoutError: interrupted" in page


def test_a_published_page_is_what_its_numbers_render_to():
    for numbers in (ROOT / "reports").glob("gpu*.json"):
        page = numbers.with_suffix(".md").read_text(encoding="utf-8")
        assert page == gpu_page.render(json.loads(numbers.read_text(encoding="utf-8")))
