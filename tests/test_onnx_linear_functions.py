"""The bodies of the nodes of linear attention against the torch ops they stand for, in pieces."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")

from onnx.reference import ReferenceEvaluator  # noqa: E402
from test_onnx_sparse_functions import SCALE, START, B, D, E, G, H, one_node  # noqa: E402

from reattend.targets.onnx.functions import Uses  # noqa: E402
from reattend.targets.onnx.linear_features import MAPS  # noqa: E402
from reattend.targets.onnx.linear_ops import (  # noqa: E402
    held_linear_attention,
    window_linear_attention,
)

NAMES = (
    "q", "features", "key", "value", "past_key", "past_value", "past_state", "mix", "weight",
    "bias", "decay", "kv_start", "kv_len",
)  # fmt: skip
#: window, terraced, decays, heads of the state, maps in the file (the first is the node's)
WINDOWS: dict[str, tuple[int, bool, bool, int, tuple[str, ...]]] = {
    "hedgehog": (3, True, False, H, ("hedgehog",)),
    "hedgehog-fla": (2, False, False, G, ("hedgehog-fla", "relu")),
    "t2r, sliding": (1, False, True, H, ("t2r",)),
    "exp": (2, True, True, G, ("exp",)),
    "softmax among others": (4, False, False, G, ("softmax", "identity", "relu", "t2r")),
    "relu among others": (3, True, True, G, ("relu", "elu+1", "hedgehog")),
}
PIECES = (7, *[1] * 9, 13, 1, 3)


def run(made: Any, reference: bool) -> Any:
    if reference:
        return ReferenceEvaluator(made)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(
        made.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )


@pytest.mark.parametrize("name", WINDOWS)
def test_windows_equal_the_op_on_rings_that_turn(name: str) -> None:
    window, terraced, decays, heads, maps = WINDOWS[name]
    random, tokens = np.random.default_rng(0), sum(PIECES)
    draw = lambda *s: random.standard_normal(s).astype(np.float32)  # noqa: E731
    f, ring = D * (2 if "hedgehog" in maps[0] else 1), window * (2 if terraced else 1) + 1
    rows = draw(B, H, tokens, D), abs(draw(B, H, tokens, f)), draw(B, G, tokens, D)
    rows = (*rows, draw(B, G, tokens, E))
    held = [9 * draw(B, G, ring, D), 9 * draw(B, G, ring, E), 0 * draw(B, heads, f, E + 1)]
    decay = -0.2 * abs(draw(heads)) if decays else 0 * draw(heads)
    fixed = [abs(draw(H)), 0.5 * draw(heads, D, D), 0.1 * draw(heads, D), decay, START]
    rules: dict[str, Any] = {"scale": SCALE, "window": window}
    numbers = {"chunk": 4, "terraced": int(terraced), "decays": int(decays)}
    want, session, at = list(held), None, 0
    for n in PIECES:
        given = [x[:, :, at : at + n] for x in rows]
        at += n
        tail = [*fixed, np.full(B, at)]
        tensors = [torch.from_numpy(x.copy()) for x in (*given, *want, *tail)]
        y, *states = window_linear_attention(
            *tensors, **rules, terraced=terraced, feature_map=maps[0], decays=decays
        )
        want = [x.numpy() for x in states]
        feed = dict(zip(NAMES, (*given, *held, *tail), strict=True))
        if session is None:
            attributes = {**rules, **numbers, "feature_map": MAPS.index(maps[0])}
            outputs = ["y", "present_key", "present_value", "present_state"]
            uses = Uses(decayed=decays, maps=maps)
            made = one_node("WindowLinearAttention", feed, outputs, attributes, uses)
            session = run(made, reference=name == "exp")
        got, *held = session.run(None, feed)
        assert np.isfinite(got).all()
        real = (np.arange(at - n, at) >= START[:, None])[:, None, :, None]
        assert np.abs((got - y.numpy()) * real).max() <= 1e-5 * max(1, np.abs(y.numpy()).max())
        for now, expected in zip(held, want, strict=True):
            assert np.abs(now - expected).max() <= 1e-5 * max(1, np.abs(expected).max())


@pytest.mark.parametrize(
    ("decays", "heads", "featured"), [(False, G, 0), (True, H, 0), (True, G, 0.2), (True, H, 9)]
)
def test_a_state_alone_equals_the_op(decays: bool, heads: int, featured: float) -> None:
    """`featured`: a decay for every feature, up to so much per token; two chunks of them."""
    pieces = (*PIECES, 150) if featured else PIECES
    random, tokens = np.random.default_rng(0), sum(pieces)
    draw = lambda *s: random.standard_normal(s).astype(np.float32)  # noqa: E731
    rows = draw(B, H, tokens, D), draw(B, heads, tokens, D), draw(B, heads, tokens, E)
    decay = -0.2 * abs(draw(B, heads, tokens)) * decays
    if featured:
        decay = -featured * random.random((B, heads, tokens, D), np.float32) ** 4
    want = held = draw(B, heads, D, E)
    session, at = None, 0
    for n in pieces:
        given = [x[:, :, at : at + n] for x in (*rows, decay)]
        at += n
        tensors = [torch.from_numpy(x.copy()).double() for x in (*given, want)]
        y, after = held_linear_attention(*tensors, decays=decays)
        want = after.numpy()
        feed = dict(zip(("q", "key", "value", "decay", "past_state"), (*given, held), strict=True))
        if session is None:
            attributes = {"q_num_heads": H, "kv_num_heads": heads}
            if not featured:
                attributes |= {"chunk": 4, "decays": int(decays)}
            outputs, uses = ["y", "present_state"], Uses(decayed=decays)
            name = "GatedLinearAttention" if featured else "LinearAttention"
            session = run(one_node(name, feed, outputs, attributes, uses), decays and heads == H)
        got, held = session.run(None, feed)
        for now, expected in ((got, y.numpy()), (held, want)):
            assert np.abs(now - expected).max() <= 1e-5 * max(1, np.abs(expected).max())
