"""Attentions in a graph that are read as one, and those that are not: ONNX Runtime's own operator gives the same numbers."""

from __future__ import annotations

import exports
import numpy as np
import onnx
import onnx.parser
import onnx_ir as ir
import onnxruntime
import pytest
import small
import torch
from diffusers.models.attention_processor import Attention

from shapecheck import Geometry, read_contract
from shapecheck.onnx import attention
from shapecheck.runtime.onnx_session import OnnxSession

# queries, keys and values of (batch, tokens, 4 heads × 2), as torch.onnx writes them
HEADS = """
q4 = Reshape(query, apart) k4 = Reshape(key, apart) v4 = Reshape(value, apart)
qt = Transpose<perm=[0,2,1,3]>(q4) kt = Transpose<perm=[0,2,1,3]>(k4) vt = Transpose<perm=[0,2,1,3]>(v4)
"""
END = """
ot = Transpose<perm=[0,2,1,3]>(o) flat = Reshape(ot, together) image = Neg(flat)
"""
PRODUCTS = f"""{HEADS}
joint = Reshape(kt, one_batch) turned = Transpose<perm=[0,2,1]>(joint) keys = Reshape(turned, batches)
qs = Mul(qt, root) ks = Mul(keys, root) scores = MatMul(qs, ks) p = Softmax<axis=-1>(scores) o = MatMul(p, vt) {END}
"""
NODE = f"{HEADS} o = Attention<is_causal=0, softcap=0.0>(qt, kt, vt) {END}"
LEFT_ALONE = {
    "a mask": PRODUCTS.replace("p = Softmax<axis=-1>(scores)", "masked = Add(scores, mask) p = Softmax<axis=-1>(masked)"),
    "another scale": PRODUCTS.replace("Mul(keys, root)", "Mul(keys, one)"),
    "another axis": PRODUCTS.replace("axis=-1", "axis=2"),
    "probabilities read twice": PRODUCTS + "also = Neg(p)",
    "values in the place of probabilities": PRODUCTS.replace("MatMul(p, vt)", "MatMul(vt, square)").replace(
        "p = Softmax<axis=-1>(scores)", "p = Softmax<axis=-1>(scores) square = MatMul(p, p)"
    ),
    "keys not turned": PRODUCTS.replace("turned = Transpose<perm=[0,2,1]>(joint)", "turned = Transpose<perm=[0,1,2]>(joint)"),
    "heads not turned back": PRODUCTS.replace("ot = Transpose<perm=[0,2,1,3]>(o)", "ot = Transpose<perm=[0,1,2,3]>(o)"),
    "an unknown shape": PRODUCTS.replace("k4", "unknown"),
    "a node with a mask": NODE.replace("vt)", "vt, mask)"),
    "a causal node": NODE.replace("is_causal=0", "is_causal=1"),
    "a node with a cap": NODE.replace("softcap=0.0", "softcap=2.0"),
    "a node with another scale": NODE.replace("softcap=0.0", "softcap=0.0, scale=1.0"),
    "an output of the graph": NODE.replace("flat = Reshape(ot, together) image = Neg(flat)", "image = Reshape(ot, together)"),
}


def parse(nodes, number="float", tokens=7, heads=4, width=2):
    """Make a model of one attention."""
    opset, flat, apart = 23 if "Attention" in nodes else 20, f"[b,{tokens},{heads * width}]", f"[b,{tokens},{heads},{width}]"
    # the text has float16 as its bits
    numbers = (width**-0.25, 1.0, 0.5)
    root, one, mask = (int(np.float16(each).view(np.uint16)) if number == "float16" else each for each in numbers)
    return onnx.parser.parse_model(f"""
    <ir_version: 10, opset_import: ["": {opset}]>
    unet ({number}{flat} query, {number}{flat} key, {number}{flat} value) => ({number}{flat} image)
    <int64[4] apart = {{0, 0, {heads}, {width}}}, int64[3] together = {{0, 0, {heads * width}}},
     int64[3] one_batch = {{-1, {tokens}, {width}}}, int64[4] batches = {{-1, {heads}, {width}, {tokens}}},
     {number}[1] root = {{{root}}}, {number}[1] one = {{{one}}}, {number}[1] mask = {{{mask}}},
     {number}{apart} q4, {number}{apart} k4, {number}{apart} v4, {number}{flat} flat>
    {{ {nodes} }}
    """)


def run(model):
    generator = np.random.default_rng(0)
    given = {name: generator.standard_normal((3, 7, 8)).astype(np.float32) for name in ("query", "key", "value")}
    return onnxruntime.InferenceSession(model.SerializeToString()).run(None, given)[0]


@pytest.mark.parametrize("nodes", [PRODUCTS, NODE], ids=["products", "node"])
def test_the_fused_attention_gives_the_same(nodes):
    model = ir.from_proto(parse(nodes))
    assert attention.fuse_attention(model, [ir.DataType.FLOAT]) == 1
    fused = ir.to_proto(model)
    assert {node.op_type for node in fused.graph.node} == {"MultiHeadAttention", "Neg"}
    np.testing.assert_allclose(run(fused), run(parse(nodes)), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("nodes", LEFT_ALONE.values(), ids=LEFT_ALONE.keys())
def test_another_computation_is_left_alone(nodes):
    before = parse(nodes)
    model = ir.from_proto(before)
    assert attention.fuse_attention(model, [ir.DataType.FLOAT]) == 0
    assert [node.op_type for node in model.graph] == [node.op_type for node in before.graph.node]


@pytest.mark.full
def test_every_attention_of_an_exported_unet_is_fused():
    """Its weights stay in the file beside it."""
    unet = small.unet(**small.SHALLOW)
    path = exports.exported_once(unet).path
    model = ir.load(path)
    attentions = [module for module in unet.modules() if isinstance(module, Attention)]
    assert attention.fuse_attention(model, [ir.DataType.FLOAT]) == len(attentions) > 0
    assert not any(node.op_type == "Softmax" for node in model.graph)
    fused = ir.to_proto(model).SerializeToString()
    assert len(fused) < path.stat().st_size
    contract, generator = read_contract(path), torch.Generator().manual_seed(0)
    for geometry in (Geometry(2, 17, 25), Geometry(1, 9, 13)):
        shapes = contract.input_shapes(geometry)
        inputs = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
        with OnnxSession.open(path) as plain, OnnxSession.open(fused, folder=path.parent) as other:
            (expected,), (found,) = plain(inputs).values(), other(inputs).values()
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("nodes", [PRODUCTS, NODE], ids=["products", "node"])
@pytest.mark.parametrize(("tokens", "width"), [(4096, 40), (77, 160)])
def test_on_cuda_the_fused_attention_errs_as_pytorchs(nodes, tokens, width, tmp_path, shapecheck_require):
    """ONNX Runtime's own Attention errs eleven times as much in float16."""
    shapecheck_require("ort-cuda")
    path, shape = tmp_path / "attention.onnx", (2, tokens, 8 * width)
    onnx.save(parse(nodes, "float16", tokens, 8, width), path)
    generator = torch.Generator("cuda").manual_seed(0)
    given = {name: torch.randn(shape, generator=generator, device="cuda").half() for name in ("query", "key", "value")}

    def attend(dtype):
        apart = [each.to(dtype).unflatten(2, (8, width)).transpose(1, 2) for each in given.values()]
        return -torch.nn.functional.scaled_dot_product_attention(*apart).transpose(1, 2).flatten(2).double()

    expected = attend(torch.float64)
    with OnnxSession.open(path, backend="ort-cuda") as session:
        assert session.detail.endswith("attention fused")
        found = session(given, {"image": torch.empty(shape, dtype=torch.float16, device="cuda")})["image"].double()
    error, allowed = (found - expected).abs().max().item(), 2 * (attend(torch.float16) - expected).abs().max().item()
    print(f"{tokens} tokens, heads of {width}: {error:.1e}, PyTorch's {allowed / 2:.1e}", flush=True)
    assert error <= allowed


@pytest.fixture
def opened(monkeypatch):
    """What ONNX Runtime was given to open."""
    sources = []

    def refuse(source, *_args, **_options):
        sources.append(source)
        raise RuntimeError("no GPU")

    monkeypatch.setattr(onnxruntime, "InferenceSession", refuse)
    return sources


@pytest.mark.parametrize(
    ("backend", "number", "fuses"),
    [("ort-cuda", "float16", True), ("ort-cuda", "float", False), ("ort-trt", "float16", False), ("ort", "float16", False)],
)
def test_onnx_runtime_on_cuda_opens_a_half_precision_file_fused(backend, number, fuses, opened, tmp_path):
    """The file stays as it is; TensorRT fuses by itself, and in float32 nothing is gained."""
    path = tmp_path / "unet.onnx"
    onnx.save(parse(PRODUCTS, number), path)
    before = path.read_bytes()
    with pytest.raises(Exception, match=rf"ONNX Runtime cannot load {path}: no GPU"):
        OnnxSession.open(path, backend=backend)
    source, *others = opened
    assert path.read_bytes() == before
    assert isinstance(source, bytes) and b"MultiHeadAttention" in source if fuses else source == str(path)
    assert others == ([str(path)] if fuses else [])  # one that cannot be opened fused is opened as it is
