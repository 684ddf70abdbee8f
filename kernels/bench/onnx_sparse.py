"""Sparse nodes of ONNX files on a CPU, against the same heads under a dense mask.

    python kernels/bench/onnx_sparse.py --out kernels/bench/results/onnx_sparse.json

One attention layer in ONNX Runtime, one thread, batch 1, float32, 8 heads of 64. All ways run in
one process and take turns; figures are medians of processor time. Outputs are compared first. The
dense mask is an input that is ready: making it is not timed, nor is writing its rows to a state.

Ways:
    ours         the node that an export has for this pattern, states read and written
    mask         the standard Attention of opset 24 with a boolean mask [queries, keys]
    causal       the same without a mask, causal (whole prompts only)
    gqa          ONNX Runtime's GroupQueryAttention over all keys
    gqa-window   the same with local_window_size: a window without sinks, which is another result
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
from table import onnx_sparse_table
from timing import in_turns, times_faster

from reattend.mixers.config import CoreConfig
from reattend.patterns.pattern import HeadPattern
from reattend.targets.onnx.functions import DOMAIN, Uses, function_proto
from reattend.targets.onnx.kept_body import KEPT
from reattend.targets.onnx.sparse_translate import kept_attributes, pattern_attributes

COMMAND = "python kernels/bench/onnx_sparse.py --out kernels/bench/results/onnx_sparse.json"
HEADS, WIDTH, SCALE = 8, 64, 64**-0.5
LIMIT = 1e-4


@dataclass(frozen=True)
class Case:
    """N queries at the end of M tokens."""

    name: str
    n: int
    m: int
    kv_heads: int
    pattern: dict[str, Any]

    @property
    def window(self) -> int:
        """Of a pattern that is sinks and a window; 0: another one."""
        known = set(self.pattern) <= {"sinks", "window"}
        return int(self.pattern["window"]) if known else 0


A_SHAPE = {"sinks": 4, "window": 256}
ELASTIC = {"sinks": 16, "window": 64, "window_slope": 0.125}
S2 = {"window": 1024, "stride": {"period": 8, "block": 64}}
S2_LESS = {"window": 256, "stride": {"period": 16, "block": 64}}
POWER = {"sinks": 64, "window": 256, "powers": {"block": 64}}
CASES = (
    Case("sinks and window: prompt of 4096", 4096, 4096, 8, A_SHAPE),
    Case("sinks and window: prompt of 4096, 2 KV heads", 4096, 4096, 2, A_SHAPE),
    Case("sinks and window: 512 new on 4096", 512, 4608, 8, A_SHAPE),
    Case("sinks and window: prompt of 512", 512, 512, 8, A_SHAPE),
    Case("sinks and window: token 4096", 1, 4096, 8, A_SHAPE),
    Case("sinks and window: token 4096, 2 KV heads", 1, 4096, 2, A_SHAPE),
    Case("sinks and window: token 16384", 1, 16384, 8, A_SHAPE),
    Case("elastic: 512 new on 4096", 512, 4608, 8, ELASTIC),
    Case("elastic: token 4096", 1, 4096, 8, ELASTIC),
    Case("s2: prompt of 4096", 4096, 4096, 8, S2),
    Case("s2: 512 new on 4096", 512, 4608, 8, S2),
    Case("s2: token 4096", 1, 4096, 8, S2),
    Case("s2, window 256, every 16th block: 512 new on 4096", 512, 4608, 8, S2_LESS),
    Case("power: 512 new on 4096", 512, 4608, 8, POWER),
    Case("power: token 4096", 1, 4096, 8, POWER),
)


class Rows:
    """The tensors of a case: queries of the last N tokens, keys and values of all M."""

    def __init__(self, case: Case) -> None:
        random = np.random.default_rng(0)
        self.case = case
        shapes = (HEADS, case.n), (case.kv_heads, case.m), (case.kv_heads, case.m)
        self.q, self.k, self.v = (
            random.standard_normal((1, heads, rows, WIDTH), np.float32) for heads, rows in shapes
        )
        core = CoreConfig(
            heads=HEADS, kv_heads=case.kv_heads, qk_head_dim=WIDTH, v_head_dim=WIDTH, scale=SCALE
        )
        i, j = torch.arange(case.m - case.n, case.m)[:, None], torch.arange(case.m)[None]
        self.seen: Array = HeadPattern(**case.pattern).sees(i, j, core).numpy()
        self.past: Array = (j <= i).numpy()
        self.window: Array = ((j <= i) & (i - j < case.window)).numpy()

    def new(self) -> dict[str, Array]:
        """Queries, keys and values of the new tokens, and how many tokens there are."""
        late = slice(self.case.m - self.case.n, None)
        found = {"q": self.q, "key": self.k[:, :, late], "value": self.v[:, :, late]}
        found = {name: np.ascontiguousarray(array) for name, array in found.items()}
        return found | {"kv_start": np.zeros(1, np.int64), "kv_len": np.full(1, self.case.m)}


def ring(rows: Rows) -> Call:
    """`SparseAttention`, its state filled by the tokens before."""
    case = rows.case
    sinks, window, past = case.pattern["sinks"], case.window, case.m - case.n
    state = {}
    for name, array in (("key", rows.k), ("value", rows.v)):
        held = np.zeros((1, case.kv_heads, sinks + window, WIDTH), np.float32)
        held[:, :, : min(sinks, past)] = array[:, :, : min(sinks, past)]
        times = np.arange(max(0, past - window), past)
        held[:, :, sinks + times % window] = array[:, :, times]
        state[f"past_{name}"] = (f"present_{name}", held)
    rules = {"scale": SCALE, "sinks": sinks, "window": window, "sliding_window": 0, "softcap": 0.0}
    new = rows.new()
    inputs = {k: new[k] for k in ("q", "key", "value")}
    inputs |= {k: v for k, (_, v) in state.items()}
    inputs |= {k: new[k] for k in ("kv_start", "kv_len")}
    outputs = ["y", "present_key", "present_value"]
    node = helper.make_node("SparseAttention", list(inputs), outputs, domain=DOMAIN, **rules)
    functions = [function_proto("SparseAttention", Uses(capped=False, sliding=False))]
    return bound(session([node], inputs, outputs, functions), inputs, state)


def pattern(rows: Rows) -> Call:
    """`PatternAttention` behind the writing of its state, as in an export."""
    case, new = rows.case, rows.new()
    past = case.m - case.n
    inputs = {"q": new["q"], "kv_start": new["kv_start"], "kv_len": new["kv_len"]}
    inputs["at"] = np.full(1, past)
    states, nodes = {}, []
    for name, array in (("key", rows.k), ("value", rows.v)):
        inputs[f"new_{name}"], inputs[f"past_{name}"] = new[name], array.copy()
        written = [f"past_{name}", f"new_{name}", "at"]
        nodes.append(helper.make_node("TensorScatter", written, [f"present_{name}"], axis=2))
        states[f"past_{name}"] = (f"present_{name}", inputs[f"past_{name}"])
    rules: dict[str, Any] = {"scale": SCALE, "sliding_window": 0, "softcap": 0.0}
    rules |= pattern_attributes(HeadPattern(**case.pattern))
    read = ["q", "present_key", "present_value", "kv_start", "kv_len"]
    nodes.append(helper.make_node("PatternAttention", read, ["y"], domain=DOMAIN, **rules))
    uses = Uses(terms=tuple(case.pattern), capped=False, sliding=False)
    functions = [function_proto("PatternAttention", uses)]
    outputs = ["y", "present_key", "present_value"]
    return bound(session(nodes, inputs, outputs, functions), inputs, states)


def kept(rows: Rows) -> Call:
    """`KeptAttention`, its states filled by the tokens before and as long as the text needs."""
    case, meant = rows.case, HeadPattern(**rows.case.pattern)
    past, wide = case.m - case.n, meant.window + int(meant.window_slope * case.m)
    here = meant.by_key(torch.arange(case.m)).nonzero()[:, 0].numpy()
    early, times = here[here < past], np.arange(max(0, past - wide), past)
    inputs, states = rows.new(), {}
    for place, size, at, of in (
        ("ring", wide, times % wide, times), ("kept", len(here) + 1, np.arange(len(early)), early)
    ):  # fmt: skip
        for name, array in (("key", rows.k), ("value", rows.v)):
            held = np.zeros((1, case.kv_heads, size, WIDTH), np.float32)
            held[:, :, at] = array[:, :, of]
            states[f"past_{place}_{name}"] = (f"{place}_{name}", held)
    inputs = (
        {k: inputs[k] for k in ("q", "key", "value")}
        | {k: held for k, (_, held) in states.items()}
        | {k: inputs[k] for k in ("kv_start", "kv_len")}
    )
    rules: dict[str, Any] = {"scale": SCALE, "sliding_window": 0, "softcap": 0.0}
    outputs = ["y", *(out for out, _ in states.values())]
    node = helper.make_node(
        KEPT, list(inputs), outputs, domain=DOMAIN, **rules | kept_attributes(meant)
    )
    uses = Uses(terms=tuple(case.pattern), capped=False, sliding=False)
    return bound(session([node], inputs, outputs, [function_proto(KEPT, uses)]), inputs, states)


def standard(rows: Rows, masked: bool) -> Call:
    """The standard Attention over all keys."""
    inputs = {"q": rows.q, "k": rows.k, "v": rows.v}
    if masked:
        inputs["mask"] = rows.seen
    node = helper.make_node(
        "Attention", list(inputs), ["y"], scale=SCALE, is_causal=int(not masked)
    )
    return bound(session([node], inputs, ["y"], []), inputs, {})


def group_query(rows: Rows, window: int) -> Call:
    """ONNX Runtime's GroupQueryAttention; it writes its state of every row too."""
    case = rows.case
    flat = {
        name: np.ascontiguousarray(array.transpose(0, 2, 1, 3)).reshape(1, case.n, -1)
        for name, array in rows.new().items()
        if name in ("q", "key", "value")
    }
    inputs = {
        **flat, "past_key": rows.k.copy(), "past_value": rows.v.copy(),
        "last": np.full(1, case.m - 1, np.int32), "total": np.array(case.m, np.int32),
    }  # fmt: skip
    states = {f"past_{x}": (f"present_{x}", inputs[f"past_{x}"]) for x in ("key", "value")}
    rules = {"num_heads": HEADS, "kv_num_heads": case.kv_heads, "scale": SCALE}
    rules |= {"local_window_size": window} if window else {}
    outputs = ["y_rows", "present_key", "present_value"]
    node = helper.make_node(
        "GroupQueryAttention", list(inputs), outputs, domain="com.microsoft", **rules
    )
    return bound(session([node], inputs, outputs, []), inputs, states)


def ways(rows: Rows) -> dict[str, tuple[Call, Array]]:
    """Each way, and the mask whose result it has to give."""
    case = rows.case
    node = ring if case.window else kept if HeadPattern(**case.pattern).monotone else pattern
    made = {"ours": (node(rows), rows.seen)}
    made["mask"] = (standard(rows, masked=True), rows.seen)
    if case.n == case.m:
        made["causal"] = (standard(rows, masked=False), rows.past)
    made["gqa"] = (group_query(rows, 0), rows.past)
    if case.window:
        made["gqa-window"] = (group_query(rows, case.window), rows.window)
    return made


def check(rows: Rows, name: str, call: Call, mask: Array) -> float:
    """The difference from torch's SDPA under the mask that describes this way."""
    q, k, v = (torch.from_numpy(x) for x in (rows.q, rows.k, rows.v))
    with torch.inference_mode():
        want = torch.nn.functional.scaled_dot_product_attention(
            q, k, v, torch.from_numpy(mask), scale=SCALE, enable_gqa=rows.case.kv_heads != HEADS
        ).numpy()
    y = call()
    if y.ndim == 3:
        y = y.reshape(1, rows.case.n, HEADS, WIDTH).transpose(0, 2, 1, 3)
    error = float(np.abs(y - want).max())
    if not error <= LIMIT:
        raise SystemExit(f"{rows.case.name}: {name} gives another result, by {error:.2g}")
    return error


def run(case: Case, rounds: int) -> dict[str, Any]:
    """One row of the results."""
    rows = Rows(case)
    made = ways(rows)
    different = {name: check(rows, name, call, mask) for name, (call, mask) in made.items()}
    found = in_turns({name: call for name, (call, _) in made.items()}, rounds)
    ours, ratio = found["ours"]["cpu_ms"], times_faster(found)
    sys.stdout.write(f"{case.name}: {ours:.3f} ms, {ratio}\n")
    return {
        "case": case.name,
        "shape": {"n": case.n, "m": case.m, "h": HEADS, "g": case.kv_heads, "d": WIDTH},
        "pattern": case.pattern,
        "density": round(float(rows.seen.mean()), 4),
        "ms": found,
        "times_faster": ratio,
        "difference": different,
    }


if __name__ == "__main__":
    main(__doc__, COMMAND, CASES, run, onnx_sparse_table, 7, ("onnx", "onnxruntime"))
