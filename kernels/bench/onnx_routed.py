"""`RoutedAttention` of ONNX files on a CPU, gathered and dense, against all heads.

    python kernels/bench/onnx_routed.py --out kernels/bench/results/onnx_routed.json

One attention node in ONNX Runtime, one thread, batch 1, float32. Each query uses the same number of
KV groups (or heads), drawn at random. Outputs are compared before anything is timed; the ways take
turns; figures are medians of processor time.

Ways:
    ours       the gathered body, whatever the number of queries
    dense      `Attention`, and what is left out hidden: the body for few queries
    gqa        ONNX Runtime's GroupQueryAttention of all heads, nothing hidden
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx.parser
import torch
from cpu_run import main
from one_node import Array, Call, bound, session
from onnx import helper
from table import onnx_routed_table
from timing import in_turns, times_faster

from reattend.kernels.routed_attention import routed_attention
from reattend.targets.onnx.functions import DOMAIN, Uses, function_proto, function_text
from reattend.targets.onnx.routed_body import FEW

COMMAND = "python kernels/bench/onnx_routed.py --out kernels/bench/results/onnx_routed.json"
LIMIT = 1e-4


@dataclass(frozen=True)
class Case:
    """N queries at the end of M tokens, H heads of width d in G groups, `share` of `units` used."""

    name: str
    n: int
    m: int
    h: int
    g: int
    d: int
    units: int
    share: float


CASES = tuple(
    Case(f"{name}, {share:.0%}", *sizes, share)
    for name, sizes in (
        ("prefill 1k, 8 groups of 4", (1024, 1024, 32, 8, 64, 8)),
        ("prefill 1k, 8 groups of 4, by head", (1024, 1024, 32, 8, 64, 32)),
        ("prefill 128, 8 groups of 4", (128, 128, 32, 8, 64, 8)),
        ("17 new on 1k, 8 groups of 4", (17, 1041, 32, 8, 64, 8)),
        ("decode 4k, 8 groups of 4", (1, 4096, 32, 8, 64, 8)),
        ("decode 32k, 8 groups of 4", (1, 32768, 32, 8, 64, 8)),
    )
    for share in (0.75, 0.5)
)


def tensors(case: Case) -> dict[str, Array]:
    """The node's inputs."""
    random = np.random.default_rng(0)
    shapes = {"q": (case.h, case.n), "key": (case.g, case.m), "value": (case.g, case.m)}
    found: dict[str, Array] = {
        name: random.standard_normal((1, *shape, case.d), np.float32)
        for name, shape in shapes.items()
    }
    rank = random.random((1, case.units, case.n)).argsort(1).argsort(1)
    found["active"] = rank < round(case.share * case.units)
    return found | {"kv_start": np.zeros(1, np.int64), "kv_len": np.full(1, case.m)}


def node(case: Case, inputs: dict[str, Array], gathered: bool) -> Call:
    """The function with one of its bodies."""
    few = 0 if gathered else case.n
    text = function_text("RoutedAttention", Uses(capped=False))
    text = text.replace(f"value_int = {FEW}>", f"value_int = {few}>")
    functions = [onnx.parser.parse_function(text), function_proto("Attention")]
    rules = {"scale": case.d**-0.5, "causal": 1, "sliding_window": 0, "softcap": 0.0}
    made = helper.make_node("RoutedAttention", list(inputs), ["y"], domain=DOMAIN, **rules)
    return bound(session([made], inputs, ["y"], functions), inputs, {})


def group_query(case: Case, given: dict[str, Array]) -> Call:
    """ONNX Runtime's GroupQueryAttention over all keys."""
    late = slice(case.m - case.n, None)
    flat = {
        name: np.ascontiguousarray(x.transpose(0, 2, 1, 3)).reshape(1, case.n, -1)
        for name, x in (("q", given["q"]), *((k, given[k][:, :, late]) for k in ("key", "value")))
    }
    inputs = {
        **flat, "past_key": given["key"].copy(), "past_value": given["value"].copy(),
        "last": np.full(1, case.m - 1, np.int32), "total": np.array(case.m, np.int32),
    }  # fmt: skip
    states = {f"past_{x}": (f"present_{x}", inputs[f"past_{x}"]) for x in ("key", "value")}
    rules = {"num_heads": case.h, "kv_num_heads": case.g, "scale": case.d**-0.5}
    outputs = ["y_rows", "present_key", "present_value"]
    made = helper.make_node(
        "GroupQueryAttention", list(inputs), outputs, domain="com.microsoft", **rules
    )
    return bound(session([made], inputs, outputs, []), inputs, states)


def run(case: Case, rounds: int) -> dict[str, Any]:
    """One row of the results."""
    given = tensors(case)
    ways = {
        "ours": node(case, given, gathered=True),
        "dense": node(case, given, gathered=False),
        "gqa": group_query(case, given),
    }
    want = routed_attention(*map(torch.from_numpy, given.values()), scale=case.d**-0.5)[0].numpy()
    different = {}
    for name in ("ours", "dense"):
        different[name] = float(np.abs(ways[name]() - want).max())
        if not different[name] <= LIMIT:
            raise SystemExit(f"{case.name}: {name} gives another result, {different[name]:.2g}")
    found = in_turns(ways, rounds)
    ratio = times_faster(found)
    sys.stdout.write(f"{case.name}: {found['ours']['cpu_ms']:.3f} ms, {ratio}\n")
    return {
        "case": case.name,
        "shape": {k: getattr(case, k) for k in ("n", "m", "h", "g", "d", "units")},
        "density": case.share,
        "ms": found,
        "times_faster": ratio,
        "difference": different,
    }


if __name__ == "__main__":
    main(__doc__, COMMAND, CASES, run, onnx_routed_table, 5, ("onnx", "onnxruntime"))
