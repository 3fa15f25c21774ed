"""Every name of TensorRT's that the code uses is in 10.6, 10.16 and 11.4: read from the source."""

from __future__ import annotations

import ast
import json
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCES = (
    "shapecheck/tensorrt/worker.py",
    "shapecheck/tensorrt/engine_tensors.py",
    "shapecheck/runtime/engine_loading.py",
    "shapecheck/runtime/engine_session.py",
    "shapecheck/doctor/probes.py",
)
APIS = {
    release: json.loads((ROOT / "tests" / "support" / "data" / f"tensorrt_api_{release}.json").read_text(encoding="utf-8"))[
        "api"
    ]
    for release in ("10.6", "10.16", "11.4")
}
KINDS = {
    "builder": "Builder",
    "network": "INetworkDefinition",
    "config": "IBuilderConfig",
    "parser": "OnnxParser",
    "parser_error": "ParserError",
    "tensor": "ITensor",
    "runtime": "Runtime",
    "engine": "ICudaEngine",
    "context": "IExecutionContext",
    "cache": "ITimingCache",
}
"""What a variable of this name, or an attribute `_name`, is of."""
RTX_ONLY = {("IBuilderConfig", "num_compute_capabilities"), ("IBuilderConfig", "set_compute_capability")}
"""Asked of TensorRT for RTX alone, which has them (1.7.1)."""
PLANTED = """
def planted(trt, builder, network):
    config = builder.create_builder_config()
    config.set_flag(trt.BuilderFlag.FP16)
    builder.build_engine(network, config)
    builder.platform_has_fast_fp16
"""


def used(source: str) -> set[tuple[str, ...]]:
    """(class, member) of every attribute of an object of TensorRT's, and (name,) of every name of its module."""
    found: set[tuple[str, ...]] = set()
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Attribute):
            continue
        owner = node.value
        if isinstance(owner, ast.Attribute) and is_module(owner.value):
            found.add((owner.attr, node.attr))
        elif is_module(owner):
            found.add((node.attr,))
        elif (kind := KINDS.get(name_of(owner))) is not None:
            found.add((kind, node.attr))
    return found


def name_of(node: ast.AST) -> str:
    name = node.id if isinstance(node, ast.Name) else node.attr if isinstance(node, ast.Attribute) else ""
    return name.lstrip("_")


def is_module(node: ast.AST) -> bool:
    return name_of(node) == "trt"


def unknown(names: set[tuple[str, ...]], release: str) -> set[tuple[str, ...]]:
    api = APIS[release]
    return {
        each
        for each in names
        if each[0] != "__version__" and (each[0] not in api or (len(each) > 1 and each[1] not in api[each[0]]))
    }


@pytest.mark.parametrize("release", APIS)
@pytest.mark.parametrize("source", SOURCES)
def test_every_name_is_there(source, release):
    names = used((ROOT / source).read_text(encoding="utf-8"))
    assert names
    assert unknown(names, release) - RTX_ONLY == set()


def test_the_main_calls_are_among_what_is_read():
    worker = {each for source in SOURCES[:2] for each in used((ROOT / source).read_text(encoding="utf-8"))}
    assert {
        ("OnnxParser", "parse_from_file"),
        ("IBuilderConfig", "get_timing_cache"),
        ("ICudaEngine", "get_tensor_profile_shape"),
    } <= worker
    session = {each for source in SOURCES[1:4] for each in used((ROOT / source).read_text(encoding="utf-8"))}
    assert {("IExecutionContext", "execute_async_v3"), ("IExecutionContext", "set_tensor_address")} <= session
    assert {("Runtime", "deserialize_cuda_engine"), ("ICudaEngine", "create_execution_context")} <= session


def test_what_11_removed_would_be_seen():
    assert unknown(used(PLANTED), "11.4") == {
        ("BuilderFlag", "FP16"),
        ("Builder", "build_engine"),
        ("Builder", "platform_has_fast_fp16"),
    }


def test_precision_is_never_asked_of_polygraphy():
    """TensorRT 11 has no precision flags: it is the dtype of the graph."""
    removed = {
        "fp16",
        "bf16",
        "int8",
        "fp8",
        "explicit_batch",
        "calibrator",
        "precision_constraints",
        "obey_precision_constraints",
    }
    tree = ast.parse((ROOT / SOURCES[0]).read_text(encoding="utf-8"))
    words = {node.arg for node in ast.walk(tree) if isinstance(node, ast.keyword)}
    words |= {node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str)}
    assert "strongly_typed" in words
    assert not words & removed
