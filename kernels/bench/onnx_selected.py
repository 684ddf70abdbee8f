"""Nodes whose heads choose keys at run time against dense ones, on a CPU: one token, 512, or a
prompt.

    python kernels/bench/onnx_selected.py --out kernels/bench/results/onnx_selected.json

One attention layer in ONNX Runtime, one thread, batch 1, float32, heads of 64, patterns as in the
plans. All ways run in one process and take turns; figures are medians of processor time. Every way
writes the new rows to its states first. Outputs are compared before anything is timed.

Ways:
    ours   the node that an export has for this pattern
    dense  `ai.reattend::Attention`, the node of a dense layer, over all keys
    gqa    ONNX Runtime's GroupQueryAttention over all keys
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from cpu_run import main
from one_node import Array, Call, bound, session
from onnx import helper
from table import onnx_selected_table
from timing import in_turns, times_faster

from reattend.mixers.config import CoreConfig, RotaryConfig
from reattend.mixers.selecting.base import Whole
from reattend.mixers.selecting.methods import method
from reattend.patterns.pattern import HeadPattern
from reattend.targets.onnx.functions import DOMAIN, Uses, function_proto, with_called
from reattend.targets.onnx.selected_body import KINDS
from reattend.targets.onnx.selected_layout import attributes, selected_form
from reattend.targets.onnx.selected_ops import selected_attention

COMMAND = "python kernels/bench/onnx_selected.py --out kernels/bench/results/onnx_selected.json"
HEADS, WIDTH, SCALE = 8, 64, 64**-0.5
LIMIT = 1e-4
#: queries that may choose another key, where two rank alike to rounding
TIES = 1e-4
RULES: dict[str, Any] = {"scale": SCALE, "sliding_window": 0, "softcap": 0.0}


@dataclass(frozen=True)
class Case:
    """N tokens behind M - N others; a single one completes no block."""

    name: str
    m: int
    kv_heads: int
    select: dict[str, Any]
    n: int = 1

    @property
    def pattern(self) -> HeadPattern:
        """What the heads see."""
        return HeadPattern.model_validate({"select": self.select})


MOBA = {"kind": "blocks", "block": 512, "topk": 3}
SEER = {"kind": "gate", "block": 64, "gate_dim": 128, "ratio": 0.25}
LABELS = {"kind": "channels", "share": 1 / 16, "ratio": 1 / 16}
LONGHEADS = {
    "kind": "blocks",
    "key": "attended",
    "block": 256,
    "ratio": 0.25,
    "first": 1,
    "last": 2,
}
DHSA = {"kind": "segments", "local": 128, "ratio": 0.25}
DMA = {"kind": "values", "ratio": 0.25}
PLANS = {
    "moba": MOBA, "seer": SEER, "double-sparsity": LABELS, "longheads": LONGHEADS, "dhsa": DHSA,
    "dma": DMA,
}  # fmt: skip
ROTARY = RotaryConfig(inv_freq=tuple(10_000 ** (-2 * i / WIDTH) for i in range(WIDTH // 2)))
CASES = tuple(
    Case(f"{name}: token {m}, {kv_heads} KV heads", m, kv_heads, select)
    for name, select in PLANS.items()
    for m in (2010, 8010)
    for kv_heads in (8, 2)
)
DRAFT = {"kind": "blocks", "block": 128, "queries": "pooled", "ratio": 0.25}
#: an eighth of the plan's 3500 columns for 32768 tokens; and lines that pass through all blocks
MINFERENCE = {"kind": "vertical-slash", "columns": 438, "slashes": 100}
SCATTERED = {"kind": "vertical-slash", "columns": 100, "slashes": 800}
LINES = {"minference": MINFERENCE, "minference, 800 diagonals": SCATTERED}
ALL_LABELS = {**LABELS, "phase": "both"}  # by the plan prompts are dense
IN_PROMPTS = {"draft": DRAFT, **PLANS, **LINES, "double-sparsity": ALL_LABELS}
PROMPTS = (
    *(
        Case(f"{name}: 512 new on 3584, {kv_heads} KV heads", 4096, kv_heads, select, 512)
        for name, select in IN_PROMPTS.items()
        for kv_heads in (8, 2)
    ),
    *(
        Case(f"{name}: prompt of 4096", 4096, 8, select, 4096)
        for name, select in IN_PROMPTS.items()
    ),
)


class Rows:
    """A case's tensors: queries of the last token, keys and values of all, what chooses."""

    def __init__(self, case: Case) -> None:
        torch.manual_seed(0)
        self.case = case
        self.all_q = torch.randn(1, HEADS, case.m, WIDTH)
        self.q = self.all_q[:, :, -case.n :].contiguous()
        self.k, self.v = (torch.randn(1, case.kv_heads, case.m, WIDTH) for _ in range(2))
        core = CoreConfig(
            heads=HEADS, kv_heads=case.kv_heads, qk_head_dim=WIDTH, v_head_dim=WIDTH, scale=SCALE
        )
        assert case.pattern.select is not None
        self.form = selected_form(case.name, case.pattern, core)
        self.method: Any = method(case.pattern.select, core, ROTARY)
        weights = self.method.state_dict()
        floats = {n: torch.randn_like(w) for n, w in weights.items() if w.is_floating_point()}
        self.method.load_state_dict({**weights, **floats})
        self.density = case.pattern.reads(case.m, core) / case.m

    def new(self) -> dict[str, Array]:
        """Of the new tokens, and how many there are."""
        n = self.case.n
        late = {"q": self.q, "key": self.k[:, :, -n:], "value": self.v[:, :, -n:]}
        found = {name: np.ascontiguousarray(x.numpy()) for name, x in late.items()}
        return found | {"kv_start": np.zeros(1, np.int64), "kv_len": np.full(1, self.case.m)}

    def more(self) -> list[torch.Tensor]:
        """What the method keeps of the tokens before."""
        if not self.form.extra:
            return []
        extra, *recent = self.form.extra
        rows = torch.zeros(1, self.case.kv_heads, -(-self.case.m // extra.block), extra.width)
        whole = (self.case.m - self.case.n) // extra.block
        end = whole * extra.block
        q, k, v = (
            x[:, :, :end].unflatten(2, (whole, extra.block)) for x in (self.all_q, self.k, self.v)
        )
        with torch.no_grad():
            rows[:, :, :whole] = self.method.summarise(Whole(k, v, q, 0, self.k[:, :, :end]))
        return [rows, *(self.last_queries(x.rows) for x in recent)]

    def last_queries(self, count: int) -> torch.Tensor:
        """Of the tokens before, token t at t mod count."""
        last = torch.arange(self.case.m - self.case.n - count, self.case.m - self.case.n)
        by_group = self.all_q[:, :, last].unflatten(1, (self.case.kv_heads, -1))
        rows = torch.zeros(1, self.case.kv_heads, count, HEADS // self.case.kv_heads * WIDTH)
        rows[:, :, last % count] = by_group.transpose(2, 3).flatten(3)
        return rows


def ours(rows: Rows) -> Call:
    """The node that chooses; it writes its states itself."""
    kind, new = KINDS[rows.form.op], rows.new()
    states = [rows.k.clone(), rows.v.clone(), *rows.more()]
    weights = [w.numpy() for w in rows.method.state_dict().values()]
    given = [*(x.numpy() for x in states), *weights]
    values = [*list(new.values())[:3], *given, *list(new.values())[3:]]
    inputs = dict(zip(kind.all_inputs, values, strict=True))
    outputs = list(kind.all_outputs)
    pasts = list(kind.all_inputs)[3 : 3 + len(states)]
    held = {p: (o, inputs[p]) for p, o in zip(pasts, outputs[1:], strict=True)}
    rules = RULES | attributes(rows.case.pattern, ROTARY)
    node = helper.make_node(rows.form.op, list(inputs), outputs, domain=DOMAIN, **rules)
    budgets = tuple(b for b in Uses().budgets if getattr(rows.case.pattern.select, b, None))
    uses = Uses(budgets=budgets, capped=False, sliding=False)
    functions = [function_proto(name, uses) for name in with_called({rows.form.op})]
    return bound(session([node], inputs, outputs, functions), inputs, held)


def dense(rows: Rows) -> Call:
    """`Attention` behind the writing of its state, as in an export."""
    inputs = rows.new() | {"at": np.full(1, rows.case.m - rows.case.n)}
    states, nodes = {}, []
    for name, tensor in (("key", rows.k), ("value", rows.v)):
        inputs[f"past_{name}"] = tensor.clone().numpy()
        written = [f"past_{name}", name, "at"]
        nodes.append(helper.make_node("TensorScatter", written, [f"present_{name}"], axis=2))
        states[f"past_{name}"] = (f"present_{name}", inputs[f"past_{name}"])
    read = ["q", "present_key", "present_value", "kv_start", "kv_len"]
    nodes.append(helper.make_node("Attention", read, ["y"], domain=DOMAIN, causal=1, **RULES))
    outputs = ["y", "present_key", "present_value"]
    return bound(session(nodes, inputs, outputs, [function_proto("Attention")]), inputs, states)


def group_query(rows: Rows) -> Call:
    """ONNX Runtime's own operator."""
    flat = {
        name: np.ascontiguousarray(x.transpose(0, 2, 1, 3)).reshape(1, rows.case.n, -1)
        for name, x in rows.new().items()
        if name in ("q", "key", "value")
    }
    inputs = {
        **flat, "past_key": rows.k.clone().numpy(), "past_value": rows.v.clone().numpy(),
        "last": np.full(1, rows.case.m - 1, np.int32), "total": np.array(rows.case.m, np.int32),
    }  # fmt: skip
    states = {f"past_{x}": (f"present_{x}", inputs[f"past_{x}"]) for x in ("key", "value")}
    rules = {"num_heads": HEADS, "kv_num_heads": rows.case.kv_heads, "scale": SCALE}
    outputs = ["y_rows", "present_key", "present_value"]
    node = helper.make_node(
        "GroupQueryAttention", list(inputs), outputs, domain="com.microsoft", **rules
    )
    run = bound(session([node], inputs, outputs, []), inputs, states)
    return lambda: run().reshape(1, rows.case.n, HEADS, WIDTH).transpose(0, 2, 1, 3)


def wanted(rows: Rows, chosen: bool) -> Array:
    """By torch: of the keys that are chosen, or of all."""
    n, m = rows.case.n, rows.case.m
    if not chosen:
        past = torch.ones(n, m, dtype=torch.bool).tril(m - n)
        y = torch.nn.functional.scaled_dot_product_attention(
            rows.q, rows.k, rows.v, past, scale=SCALE, enable_gqa=True
        )
        return y.numpy()
    more = [*rows.more(), rows.k, rows.k][:2]
    weights = list(rows.method.state_dict().values())
    new = (rows.q, rows.k[:, :, -n:], rows.v[:, :, -n:])
    span = torch.zeros(1, dtype=torch.long), torch.full((1,), rows.case.m)
    text = rows.case.pattern.model_dump_json()
    y = selected_attention(
        *new, rows.k, rows.v, *more, weights, *span, pattern=text, **RULES,
        inv_freq=list(ROTARY.inv_freq),
    )  # fmt: skip
    return y[0].numpy()  # type: ignore[no-any-return]


def run(case: Case, rounds: int) -> dict[str, Any]:
    """One row of the results."""
    rows = Rows(case)
    calls = {"ours": ours(rows), "dense": dense(rows), "gqa": group_query(rows)}
    different, ties = {}, {}
    for name, call in calls.items():
        error = np.abs(call() - wanted(rows, name == "ours")).max(-1)
        near = error <= LIMIT
        different[name], ties[name] = float(error[near].max(initial=0)), int((~near).sum())
        if ties[name] > (TIES * near.size if name == "ours" else 0):
            raise SystemExit(f"{case.name}: {name} is off by {error.max():.2g}")
    found = in_turns(calls, rounds)
    ratio = times_faster(found)
    sys.stdout.write(f"{case.name}: {found['ours']['cpu_ms']:.3f} ms, {ratio}\n")
    return {
        "case": case.name,
        "shape": {"n": case.n, "m": case.m, "h": HEADS, "g": case.kv_heads, "d": WIDTH},
        "pattern": {"select": case.select},
        "density": round(rows.density, 4),
        "ms": found,
        "times_faster": ratio,
        "difference": different,
        "other_keys": ties["ours"],
    }


if __name__ == "__main__":
    main(
        __doc__, COMMAND, (*CASES, *PROMPTS), run, onnx_selected_table, 15, ("onnx", "onnxruntime")
    )
