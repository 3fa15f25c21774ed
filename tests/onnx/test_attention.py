"""Attentions in a graph that are read as one, and those that are not: ONNX Runtime's own operator gives the same numbers."""

from __future__ import annotations

import numpy as np
import onnx
import onnx.parser
import onnx_ir as ir
import onnxruntime
import pytest

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


def parse(nodes, number="float"):
    opset = 23 if "Attention" in nodes else 20
    # the text has float16 as its bits
    root, one, mask = (int(np.float16(each).view(np.uint16)) if number == "float16" else each for each in (0.8408964, 1.0, 0.5))
    return onnx.parser.parse_model(f"""
    <ir_version: 10, opset_import: ["": {opset}]>
    unet ({number}[b,7,8] query, {number}[b,7,8] key, {number}[b,7,8] value) => ({number}[b,7,8] image)
    <int64[4] apart = {{0, 0, 4, 2}}, int64[3] together = {{0, 0, 8}}, int64[3] one_batch = {{-1, 7, 2}},
     int64[4] batches = {{-1, 4, 2, 7}},
     {number}[1] root = {{{root}}}, {number}[1] one = {{{one}}}, {number}[1] mask = {{{mask}}},
     {number}[b,7,4,2] q4, {number}[b,7,4,2] k4, {number}[b,7,4,2] v4, {number}[b,7,8] flat>
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
    (source,) = opened
    assert path.read_bytes() == before
    assert isinstance(source, bytes) and b"MultiHeadAttention" in source if fuses else source == str(path)
