"""Nodes of linear attention of ONNX files on a CPU, beside softmax attention.

    python kernels/bench/onnx_linear.py --out kernels/bench/results/onnx_linear.json

One attention layer in ONNX Runtime, one thread, batch 1, float32, 8 heads of 64, states read and
written, feature maps of queries and keys included. All ways run in one process and take turns;
figures are medians of processor time. Outputs are compared with the torch op first.

Ways:
    gqa          the softmax original: ONNX Runtime's GroupQueryAttention over all keys
    lolcats      the preset's node: a softmax over terraces of 64 keys, features of 128 numbers
    elu+1        a state alone, features of 64 numbers, in standard operators
    elu+1-ort    the same by ONNX Runtime's own LinearAttention (flavour `ort`)
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from cpu_run import main
from one_node import Array, Call, bound, session
from onnx import helper
from table import onnx_linear_table
from timing import in_turns
from torch import Tensor

from reattend.kernels.linear_attention import linear_attention
from reattend.kernels.linear_attention.reference import divided, with_ones
from reattend.mixers.features import mapped
from reattend.mixers.linear_window import band
from reattend.targets.onnx.functions import DOMAIN, Uses, function_proto
from reattend.targets.onnx.linear_features import MAPS

COMMAND = "python kernels/bench/onnx_linear.py --out kernels/bench/results/onnx_linear.json"
HEADS, WIDTH, SCALE, WINDOW, MIX = 8, 64, 64**-0.5, 64, 0.1
RING = 2 * WINDOW + 1
LIMIT = 1e-4


@dataclass(frozen=True)
class Case:
    """N queries at the end of M tokens."""

    name: str
    n: int
    m: int


CASES = tuple(
    Case(f"{what} {m}", n or m, m)
    for what, n in (("prompt of", 0), ("token", 1))
    for m in (512, 2048, 8192)
)


class Rows:
    """Queries, keys and values of all M tokens, and weights of feature maps."""

    def __init__(self, case: Case) -> None:
        gen = torch.Generator().manual_seed(0)
        self.case, self.late = case, slice(case.m - case.n, None)
        self.q, self.k, self.v = (
            torch.randn(1, HEADS, case.m, WIDTH, generator=gen) for _ in range(3)
        )
        self.weight = torch.randn(HEADS, WIDTH, WIDTH, generator=gen) * WIDTH**-0.5

    def new(self) -> dict[str, Array]:
        """Those of the new tokens."""
        found = {"q": self.q, "key": self.k, "value": self.v}
        return {k: x[:, :, self.late].contiguous().numpy() for k, x in found.items()}

    def features(self, name: Any, x: Tensor) -> Tensor:
        """By the map of this name."""
        return mapped(name, x, self.weight, None)

    def lolcats(self) -> Tensor:
        """What that way has to give, from torch."""
        near = band(self.q, self.k, with_ones(self.v), SCALE, WINDOW, "terraced") * MIX
        q, k = (self.features("hedgehog", x) for x in (self.q, self.k))
        older = linear_attention(q, k, with_ones(self.v), None, None, WINDOW + 1, WINDOW)[0]
        return divided(near + older)

    def elu(self) -> Tensor:
        """The same of the state alone."""
        q, k = (self.features("elu+1", x) for x in (self.q, self.k))
        made: Tensor = linear_attention(q, k, self.v, None, None, 0, 1, True)[0]
        return made

    def softmax(self) -> Tensor:
        """The same of the original."""
        return torch.nn.functional.scaled_dot_product_attention(
            self.q, self.k, self.v, is_causal=True, scale=SCALE
        )

    def summed(self, name: Any, tokens: int) -> Array:
        """The state after so many tokens."""
        k = self.features(name, self.k[:, :, :tokens])
        made: Array = (k.transpose(-1, -2) @ with_ones(self.v[:, :, :tokens])).numpy()
        return made


def lines(text: str) -> list[Any]:
    """Nodes: `out = Op(a, b)` each, with attributes of numbers behind."""
    made = []
    for line in text.strip().splitlines():
        out, _, rest = line.strip().partition(" = ")
        op, _, rest = rest.partition("(")
        inputs, _, more = rest.partition(")")
        known = {k: int(v) for k, _, v in (x.partition("=") for x in more.split())}
        made.append(helper.make_node(op, inputs.split(", "), [out], **known))
    return made


DIVIDED = """
parts = Slice(sums, zero, width, three)
mass = Slice(sums, width, wide, three)
y = Div(parts, mass)
"""
BORDER = {
    "zero": np.zeros(1, np.int64), "width": np.full(1, WIDTH), "wide": np.full(1, WIDTH + 1),
    "three": np.full(1, 3),
}  # fmt: skip


def lolcats(rows: Rows) -> Call:
    case, past = rows.case, rows.case.m - rows.case.n
    new = rows.new()
    seen = max(0, (past - 1) // WINDOW * WINDOW - WINDOW) if past else 0
    states = {"past_state": ("present_state", rows.summed("hedgehog", seen))}
    for name, array in (("key", rows.k.numpy()), ("value", rows.v.numpy())):
        held = np.zeros((1, HEADS, RING, WIDTH), np.float32)
        times = np.arange(max(0, past - RING), past)
        held[:, :, times % RING] = array[:, :, times]
        states[f"past_{name}"] = (f"present_{name}", held)
    fixed = {
        "weight_t": np.ascontiguousarray(rows.weight.transpose(-1, -2).numpy()),
        "weight": rows.weight.numpy(), "bias": np.zeros((1, 1), np.float32),
        "mix": np.full(HEADS, MIX, np.float32), "decay": np.zeros(HEADS, np.float32),
        "kv_start": np.zeros(1, np.int64), "kv_len": np.full(1, case.m),
    }  # fmt: skip
    inputs = {**new, **{k: v for k, (_, v) in states.items()}, **fixed, **BORDER}
    given = [
        "q", "features", "key", "value", "past_key", "past_value", "past_state", "mix", "weight",
        "bias", "decay", "kv_start", "kv_len",
    ]  # fmt: skip
    outputs = ["sums", "present_key", "present_value", "present_state"]
    node = helper.make_node(
        "WindowLinearAttention", given, outputs, domain=DOMAIN, scale=SCALE, window=WINDOW,
        chunk=2 * WINDOW, terraced=1, decays=0, feature_map=MAPS.index("hedgehog"),
    )  # fmt: skip
    before = lines(
        """
        u = MatMul(q, weight_t)
        minus = Neg(u)
        first = Softmax(u) axis=-1
        second = Softmax(minus) axis=-1
        features = Concat(first, second) axis=-1
        """
    )
    functions = [function_proto(node.op_type, Uses(decayed=False, maps=("hedgehog",)))]
    made = session([*before, node, *lines(DIVIDED)], inputs, ["y", *outputs[1:]], functions)
    return bound(made, inputs, states)


MAPPED = """
q_bent = Elu(q)
q_map = Add(q_bent, one)
key_bent = Elu(key)
key_map = Add(key_bent, one)
value_map = Concat(value, ones) axis=-1
"""


def elu(rows: Rows, own: bool) -> Call:
    """`own`: ONNX Runtime's operator, whose rows are packed over heads."""
    states = {"past_state": ("present_state", rows.summed("elu+1", rows.case.m - rows.case.n))}
    new, n = rows.new(), rows.case.n
    inputs = {
        **new, "past_state": states["past_state"][1], "one": np.ones(1, np.float32),
        "ones": np.ones((1, HEADS, n, 1), np.float32), "decay": np.zeros((1, HEADS, n), np.float32),
        **BORDER,
    }  # fmt: skip
    counts = {"q_num_heads": HEADS, "kv_num_heads": HEADS}
    if not own:
        node = helper.make_node(
            "LinearAttention", ["q_map", "key_map", "value_map", "decay", "past_state"],
            ["sums", "present_state"], domain=DOMAIN, chunk=64, decays=0, **counts,
        )  # fmt: skip
        functions = [function_proto(node.op_type, Uses(decayed=False))]
        nodes = [*lines(MAPPED), node, *lines(DIVIDED)]
    else:
        inputs = {k: x for k, x in inputs.items() if k != "decay"}
        inputs |= {k: apart(x) for k, x in inputs.items() if k in ("q", "key", "value", "ones")}
        inputs["flat"] = np.array([0, 0, -1])
        inputs["heads"] = np.array([0, 0, HEADS, -1])
        packed = [f"{x}_row = Reshape({x}_map, flat)" for x in ("q", "key", "value")]
        node = helper.make_node(
            "LinearAttention", ["q_row", "key_row", "value_row", "past_state"],
            ["packed", "present_state"], domain="com.microsoft", update_rule="linear", scale=1.0,
            **counts,
        )  # fmt: skip
        functions = []
        before = lines(MAPPED) + lines("\n".join(packed))
        nodes = [*before, node, *lines("sums = Reshape(packed, heads)"), *lines(DIVIDED)]
    return bound(session(nodes, inputs, ["y", "present_state"], functions), inputs, states)


def apart(x: Array) -> Array:
    """[B, H, N, w] as [B, N, H, w]."""
    return np.ascontiguousarray(x.transpose(0, 2, 1, 3))


def group_query(rows: Rows) -> Call:
    case = rows.case
    flat = {k: apart(x).reshape(1, case.n, -1) for k, x in rows.new().items()}
    inputs = {
        **flat, "past_key": rows.k.numpy().copy(), "past_value": rows.v.numpy().copy(),
        "last": np.full(1, case.m - 1, np.int32), "total": np.array(case.m, np.int32),
    }  # fmt: skip
    states = {f"past_{x}": (f"present_{x}", inputs[f"past_{x}"]) for x in ("key", "value")}
    outputs = ["y_rows", "present_key", "present_value"]
    node = helper.make_node(
        "GroupQueryAttention", list(inputs), outputs, domain="com.microsoft", num_heads=HEADS,
        kv_num_heads=HEADS, scale=SCALE,
    )  # fmt: skip
    return bound(session([node], inputs, outputs, []), inputs, states)


def run(case: Case, rounds: int) -> dict[str, Any]:
    """One row of the results."""
    rows = Rows(case)
    made: dict[str, tuple[Call, Callable[[], Tensor]]] = {
        "gqa": (group_query(rows), rows.softmax),
        "lolcats": (lolcats(rows), rows.lolcats),
        "elu+1": (elu(rows, False), rows.elu),
        "elu+1-ort": (elu(rows, True), rows.elu),
    }
    for name, (call, want) in made.items():
        y, expected = call(), want()[:, :, rows.late].numpy()
        if y.shape != expected.shape:
            y = y.reshape(1, case.n, HEADS, WIDTH).transpose(0, 2, 1, 3)
        error = float(np.abs(y - expected).max())
        if not error <= LIMIT:
            raise SystemExit(f"{case.name}: {name} gives another result, by {error:.2g}")
    found = in_turns({name: call for name, (call, _) in made.items()}, rounds)
    ratios = {
        name: round(found["gqa"]["cpu_ms"] / row["cpu_ms"], 2)
        for name, row in found.items()
        if name != "gqa"
    }
    sys.stdout.write(f"{case.name}: {found['gqa']['cpu_ms']} ms, {ratios}\n")
    shape = {"n": case.n, "m": case.m, "h": HEADS, "g": HEADS, "d": WIDTH}
    return {"case": case.name, "shape": shape, "ms": found, "times_faster": ratios}


if __name__ == "__main__":
    main(__doc__, COMMAND, CASES, run, onnx_linear_table, 7, ("onnx", "onnxruntime"))
