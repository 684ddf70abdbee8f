"""The function bodies against the torch ops, in ONNX Runtime and onnx's reference evaluator."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")

import onnx.checker  # noqa: E402
from onnx import TensorProto, helper  # noqa: E402
from onnx.reference import ReferenceEvaluator  # noqa: E402

from reattend.kernels.attention import attention  # noqa: E402
from reattend.kernels.latent_attention import latent_attention  # noqa: E402
from reattend.targets.onnx import dense_body  # noqa: E402
from reattend.targets.onnx.encoder_body import ENCODER  # noqa: E402
from reattend.targets.onnx.encoder_observed import OBSERVED  # noqa: E402
from reattend.targets.onnx.functions import DOMAIN, OPSET, VERSION, Uses, function_proto  # noqa: E402
from reattend.targets.onnx.gated_linear_body import GATED  # noqa: E402
from reattend.targets.onnx.kept_body import KEPT  # noqa: E402
from reattend.targets.onnx.routed_body import NAME as ROUTED  # noqa: E402
from reattend.targets.onnx.selected_body import SELECTED  # noqa: E402

B, H, G, C = 3, 4, 2, 12
OPS = {"Attention": attention, "LatentAttention": latent_attention}
EVERY = (
    *OPS, "SparseAttention", "PatternAttention", KEPT, ROUTED, *SELECTED, *ENCODER, OBSERVED,
    "LinearAttention", GATED, "WindowLinearAttention",
)  # fmt: skip


def inputs(name: str, n: int, rope: int, dtype: Any, long: int = 1) -> dict[str, np.ndarray]:
    c, end = C * long, 9 * long
    if name == "Attention":
        shapes = {"q": (B, H, n, 8), "key": (B, G, c, 8), "value": (B, G, c, 5)}
    else:
        shapes = {
            "q_nope": (B, H, n, 6), "q_rope": (B, H, n, rope),
            "latent": (B, c, 6), "rope": (B, c, rope),
        }  # fmt: skip
    random = np.random.default_rng(0)
    feed = {k: random.standard_normal(s).astype(dtype) for k, s in shapes.items()}
    # Row 1 has two pads; row 2 only pads, so none of its queries sees anything.
    feed["kv_start"], feed["kv_len"] = np.array([0, 2, end]), np.array([end, end, end])
    return feed


def model(
    name: str,
    feed: dict[str, np.ndarray],
    attributes: dict[str, Any],
    empty: bool,
    sliding: bool = True,
) -> Any:
    kinds = {np.dtype(np.float32): TensorProto.FLOAT, np.dtype(np.float16): TensorProto.FLOAT16}
    given = [
        helper.make_tensor_value_info(k, kinds.get(v.dtype, TensorProto.INT64), v.shape)
        for k, v in feed.items()
    ]
    kind = kinds[next(iter(feed.values())).dtype]
    made = helper.make_model(
        helper.make_graph(
            [helper.make_node(name, list(feed), ["y"], domain=DOMAIN, **attributes)],
            "one_node", given, [helper.make_tensor_value_info("y", kind, list("bhne"))],
        ),
        opset_imports=[helper.make_opsetid("", OPSET), helper.make_opsetid(DOMAIN, VERSION)],
        functions=[function_proto(name, Uses(rope_may_be_empty=empty, sliding=sliding))],
        ir_version=11,
    )  # fmt: skip
    onnx.checker.check_model(made, full_check=True)
    return made


PLAIN = {"scale": 0.3, "causal": 1, "sliding_window": 0, "softcap": 0.0}
RULES = {
    "causal": {},
    "full": {"causal": 0},
    "window": {"sliding_window": 3},
    "softcap": {"softcap": 2.0},
}


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize(("n", "rope"), [(1, 4), (5, 4), (5, 0)])
@pytest.mark.parametrize("name", OPS)
@pytest.mark.parametrize(("dtype", "limit"), [(np.float32, 1e-5), (np.float16, 1e-2)])
def test_body_means_what_the_torch_op_means(
    name: str, n: int, rope: int, rule: str, dtype: Any, limit: float
) -> None:
    attributes = PLAIN | RULES[rule]
    feed = inputs(name, n, rope, dtype)
    is_the_torch_op(name, feed, model(name, feed, attributes, empty=rope == 0), attributes, limit)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize(("tile", "n"), [(2, 4), (2, 9), (3, 7), (7, 8)])
@pytest.mark.parametrize(
    ("name", "rope"), [("Attention", 4), *(("LatentAttention", r) for r in (4, 0))]
)
def test_tiles_mean_what_the_torch_op_means(
    name: str, rope: int, tile: int, n: int, rule: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a file in which some node has a window, and in one without."""
    monkeypatch.setattr(dense_body, "DENSE_TILE", tile)
    monkeypatch.setattr(dense_body, "FEW", 1)
    attributes = PLAIN | RULES[rule]
    feed = inputs(name, n, rope, np.float32)
    for sliding in (True, False):
        if sliding or not attributes["sliding_window"]:
            made = model(name, feed, attributes, empty=rope == 0, sliding=sliding)
            is_the_torch_op(name, feed, made, attributes, 1e-5)


@pytest.mark.parametrize("rule", [*RULES, "window of 100", "window of 1000"])
@pytest.mark.parametrize("name", OPS)
def test_a_long_prompt_means_what_the_torch_op_means(name: str, rule: str) -> None:
    window = {"sliding_window": int(rule.split()[-1])} if "of" in rule.split() else {}
    attributes = PLAIN | RULES.get(rule, window)
    feed = inputs(name, 300, 4, np.float32, long=40)
    is_the_torch_op(name, feed, model(name, feed, attributes, empty=False), attributes, 1e-5)


@pytest.mark.parametrize("name", OPS)
def test_a_prompt_does_not_read_what_nothing_was_written_to(name: str) -> None:
    """Nor what a window has left behind: such rows may be anything, even no number."""
    attributes = PLAIN | {"sliding_window": 20}
    feed = inputs(name, 40, 4, np.float32, long=40)
    feed["kv_start"][:], feed["kv_len"][:] = 0, 300
    made = model(name, feed, attributes, empty=False)
    session = onnxruntime.InferenceSession(
        made.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    before = session.run(None, feed)[0]
    for rows in [v for k, v in feed.items() if v.shape[-2:-1] == (C * 40,)]:
        rows[..., 300:, :] = np.nan
        rows[..., : 300 - 40 - 20 + 1, :] = np.nan
    np.testing.assert_array_equal(session.run(None, feed)[0], before)


@pytest.mark.parametrize("sliding", [False, True])
@pytest.mark.parametrize("name", EVERY)
def test_no_name_of_a_branch_is_one_of_what_is_around_it(name: str, sliding: bool) -> None:
    """The standard forbids it, onnx's checker lets inputs of a Scan do so, and ONNX Runtime reads
    the wrong one where sizes are fixed."""

    def names(nodes: Any, inputs: list[str], around: set[str]) -> None:
        made = [*inputs, *(o for node in nodes for o in node.output if o)]
        assert len(made) == len(set(made))
        assert not set(made) & around
        for branch in (a.g for node in nodes for a in node.attribute if a.HasField("g")):
            names(branch.node, [i.name for i in branch.input], around | set(made))

    body = function_proto(name, Uses(sliding=sliding))
    names(body.node, list(body.input), set())


def is_the_torch_op(
    name: str, feed: dict[str, np.ndarray], made: Any, attributes: dict[str, Any], limit: float
) -> None:
    """In both runtimes, and in the dtype that was given; of row 2, which sees nothing, 0."""
    dtype = next(iter(feed.values())).dtype
    tensors = [torch.from_numpy(v) for v in feed.values()]
    tensors = [t.float() if t.is_floating_point() else t for t in tensors]
    expected = OPS[name](*tensors, **(attributes | {"causal": bool(attributes["causal"])}))[0]
    assert torch.isfinite(expected).all()
    assert (expected[2] == 0).all()
    session = onnxruntime.InferenceSession(
        made.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    for got in (session.run(None, feed)[0], ReferenceEvaluator(made).run(None, feed)[0]):
        assert got.dtype == dtype
        assert np.abs(got.astype(np.float32) - expected.numpy()).max() <= limit


def test_unused_rows_do_not_matter_when_finite() -> None:
    feed = inputs("LatentAttention", 2, 4, np.float32)
    session = onnxruntime.InferenceSession(
        model("LatentAttention", feed, PLAIN, False).SerializeToString(),
        providers=["CPUExecutionProvider"],
    )
    before = session.run(None, feed)[0]
    for name in ("latent", "rope"):
        feed[name][:, 9:] = 1e4
        feed[name][1, :2] = -1e4
    np.testing.assert_array_equal(session.run(None, feed)[0], before)
