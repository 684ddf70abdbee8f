"""Rewrites of an exported graph: what a norm is after them."""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")

import onnx.checker  # noqa: E402
import onnx.parser  # noqa: E402
import onnx.shape_inference  # noqa: E402
import onnx_ir as ir  # noqa: E402
from onnx.reference import ReferenceEvaluator  # noqa: E402

from reattend.targets.onnx.simplify import fuse_norms  # noqa: E402

# x -> float32 -> normalised, as exporters spell it; what follows differs from model to model
NORM = """<ir_version: 11, opset_import: ["" : 24]>
norm ({kind} [N, 8] x, {gain} [8] w) => ({out} [N, 8] y)
<float two = {{2.0}}, float eps = {{0.00001}}, int64[1] axes = {{-1}}>
{{
  wide = Cast <to = 1> (x)
  square = Pow (wide, two)
  mean = ReduceMean <keepdims = 1, noop_with_empty_axes = 0> (square, axes)
  more = Add (mean, eps)
  rms = Sqrt (more)
  less = Reciprocal (rms)
  normed = Mul (wide, less)
{rest}
}}"""
GAINS = {
    "both narrow": ("float16", "float16", "  h = Cast <to = 10> (normed) y = Mul (h, w)"),
    "wide gain": ("float16", "float", "  g = Mul (normed, w) y = Cast <to = 10> (g)"),
    "narrow gain": ("float", "float16", "  h = Cast <to = 10> (normed) y = Mul (h, w)"),
}  # fmt: skip


@pytest.mark.parametrize("name", GAINS)
def test_norms_in_two_types_pass_the_checker_and_give_the_same(name: str) -> None:
    kind, gain, rest = GAINS[name]
    text = NORM.format(kind=kind, gain=gain, out="float16", rest=rest.replace(") ", ")\n  "))
    plain = onnx.shape_inference.infer_shapes(onnx.parser.parse_model(text))
    model = ir.serde.deserialize_model(plain)
    assert fuse_norms(model) == 1
    fused = ir.serde.serialize_model(model)
    assert "RMSNormalization" in [node.op_type for node in fused.graph.node]
    onnx.checker.check_model(fused, full_check=True)
    types = {"float": np.float32, "float16": np.float16}
    random = np.random.default_rng(0)
    feed = {
        "x": (3 * random.standard_normal((5, 8))).astype(types[kind]),
        "w": random.standard_normal(8).astype(types[gain]),
    }
    (want,) = ReferenceEvaluator(plain).run(None, feed)
    session = onnxruntime.InferenceSession(
        fused.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    (got,) = session.run(None, feed)
    assert got.dtype == want.dtype == np.float16
    assert np.abs(got.astype(np.float32) - want).max() <= 4e-3
