"""The Triton kernels in Triton's interpreter against the fp64 reference.

The interpreter must be chosen before the kernels are decorated, and an address error there kills
the process, so one child process runs every case (this file run as a script) and prints the
errors; the tests read them.
"""

from __future__ import annotations

import json
import math
import sys
from functools import partial
from typing import Any

import pytest
import torch
from interpreter import interpreted, poisoned

DTYPES = ("float32", "float16", "bfloat16")
# name: op, heads, groups, queries, capacity, widths (d, e) or (r, R), rows, options
CASES: dict[str, dict[str, Any]] = {
    "prefill": {"n": 37, "m": 37},
    "prefill-on-past-left-padding": {"n": 21, "m": 50, "start": [0, 7], "length": [45, 41]},
    "prefill-window-softcap": {"n": 33, "m": 33, "window": 9, "softcap": 2.0, "start": [3, 0]},
    "prefill-wide-window": {"n": 90, "m": 90, "window": 61, "start": [0, 4], "parts": 2},
    "prefill-not-causal": {"n": 19, "m": 23, "causal": False, "length": [23, 17]},
    "prefill-paged": {"n": 18, "m": 40, "page": 8, "start": [0, 5], "length": [40, 29]},
    "prefill-sees-nothing": {"n": 17, "m": 20, "start": [0, 9], "length": [20, 9]},
    "prefill-few-heads-at-a-time": {"n": 37, "m": 37, "l2": 1, "start": [0, 2]},
    "prefill-tall": {"n": 70, "m": 75, "rows": 64, "warps": 8, "length": [75, 71], "parts": 3},
    # rows of the cache lie so far apart that addresses need more than 32 bits
    "prefill-far": {"n": 17, "m": 34, "far": 1 << 26},
    "decode-far": {"n": 1, "m": 34, "far": 1 << 26, "splits": 2},
    "decode": {"n": 1, "m": 53, "length": [53, 31], "decode": True},
    "decode-split": {"n": 1, "m": 100, "start": [40, 2], "length": [99, 3], "splits": 4},
    "decode-small-chunk": {"n": 3, "m": 60, "start": [0, 11], "length": [58, 13], "splits": 2},
    "decode-window": {"n": 2, "m": 70, "window": 20, "length": [70, 50], "splits": 2},
    "decode-paged": {"n": 1, "m": 48, "page": 16, "length": [47, 30], "splits": 2},
    "decode-empty-row": {"n": 1, "m": 40, "length": [40, 0], "splits": 2},
}
# gradients: what both kernels skip, mask and take whole, for several tiles of either
BACKWARD = (
    "prefill", "prefill-on-past-left-padding", "prefill-window-softcap", "prefill-not-causal",
    "prefill-sees-nothing", "prefill-tall", "prefill-wide-window",
)  # fmt: skip
SHAPES = {
    "attention": {"h": 4, "g": 2, "widths": (20, 24)},
    "latent": {"h": 3, "g": 1, "widths": (40, 12)},
    "latent-no-rope": {"h": 2, "g": 1, "widths": (16, 0)},
    "attention-32": {"h": 2, "g": 1, "widths": (32, 32)},
    "attention-80": {"h": 2, "g": 1, "widths": (80, 80)},
    "attention-256": {"h": 2, "g": 1, "widths": (256, 96)},
    "routed": {"h": 4, "g": 2, "widths": (20, 24), "units": 4},
    "routed-groups": {"h": 6, "g": 3, "widths": (20, 24), "units": 3},
}
TOLERANCE = {"float32": 2e-6, "float16": 2e-3, "bfloat16": 1.6e-2}


def has_gradient(shape: str, case: str, dtype: str) -> bool:
    """Whether the gradient of a case is compared: in fp32, and of one case in the other dtypes."""
    one = shape == "latent-no-rope" or dtype != "float32"
    some = shape == "attention" or shape.startswith(("latent", "routed"))
    return some and case in (BACKWARD[:1] if one else BACKWARD)


def run_case(shape: str, name: str, dtype_name: str) -> dict[str, Any]:
    """Executed in the child: errors of one case."""
    from reattend.kernels.attention import launch as attention_launch
    from reattend.kernels.attention import reference as attention_reference
    from reattend.kernels.configs import KernelConfig
    from reattend.kernels.core import Rule
    from reattend.kernels.latent_attention import launch as latent_launch
    from reattend.kernels.latent_attention import reference as latent_reference
    from reattend.kernels.routed_attention import launch as routed_launch
    from reattend.kernels.routed_attention import reference as routed_reference

    case = {"causal": True, "window": 0, "softcap": 0.0, "splits": 1, "page": 0} | CASES[name]
    attention_launch.L2_BYTES = case.get("l2", 24_000_000)
    config = KernelConfig(case.get("rows", 16), 32, case.get("warps", 4), 1)
    gen = torch.Generator().manual_seed(len(name))
    dtype = getattr(torch, dtype_name)
    b, n, m, (d, e) = 2, case["n"], case["m"], SHAPES[shape]["widths"]
    h, g, page = SHAPES[shape]["h"], SHAPES[shape]["g"], case["page"]
    start = torch.tensor(case.get("start", [0, 0]))
    length = torch.tensor(case.get("length", [m, m]), dtype=torch.int32)

    def draw(*size: int) -> torch.Tensor:
        return torch.randn(*size, generator=gen).to(dtype)

    routed = shape.startswith("routed")
    if not shape.startswith("latent"):
        queries: list[torch.Tensor] = [draw(b, h, n, d)]
        caches = [draw(b, g, m, d), draw(b, g, m, e)]
    else:
        queries = [draw(b, h, n, d), draw(b, h, n, e)]
        caches = [draw(b, m, d), draw(b, m, e)]
    for cache in caches:  # whatever lies outside the valid rows must not be seen
        for row in range(b):
            cache[row, ..., : int(start[row]), :] = math.nan
            cache[row, ..., int(length[row]) :, :] = math.nan
    table = None
    dense = caches
    if page:
        order = torch.randperm(b * m // page, generator=gen).view(b, m // page)
        table = order.to(torch.int32)
        pages = []
        for cache in caches:
            split = cache.unflatten(-2, (m // page, page)).movedim(-3, 1)
            out = torch.empty_like(split.flatten(0, 1))
            out[order.flatten()] = split.flatten(0, 1)
            pages.append(out)
        caches = pages
    if "far" in case:
        caches = [spread(cache, case["far"]) for cache in caches]
    rule = Rule(0.3, case["causal"], case["window"], case["softcap"])
    how = {"decode": name.startswith("decode"), "splits": case["splits"]}
    used = []
    if routed:  # the first unit of the first row is nobody's
        used = [torch.rand(b, SHAPES[shape]["units"], n, generator=gen) < 0.6]
        used[0][0, 0] = False
        idle = ~used[0].repeat_interleave(h // SHAPES[shape]["units"], 1)
        unread = idle.unflatten(1, (g, -1)).flatten(2).all(-1)[..., None, None]
        queries_given = (t.masked_fill(idle[..., None], math.nan) for t in queries)
        caches_given = (t.masked_fill(unread, math.nan) for t in caches)
        x = routed_reference.Inputs(*queries_given, *caches_given, *used, start, length)
        with poisoned():
            y, lse = routed_launch.launch(x, rule, config, **how)
        function: Any = routed_reference.routed_attention
    else:
        heads = shape.startswith("attention")
        module: Any = attention_launch if heads else latent_launch
        with poisoned():
            y, lse = module.launch(*queries, *caches, start, length, table, rule, config, **how)
        function = latent_reference.latent_attention
        if heads:
            function = attention_reference.attention
    want, want_lse = function(
        *(x.double() for x in (*queries, *dense)),
        *used,
        start,
        length,
        scale=0.3,
        causal=case["causal"],
        sliding_window=case["window"],
        softcap=case["softcap"],
    )
    dead = want_lse == -math.inf
    gradients: list[float] = []
    if has_gradient(shape, name, dtype_name):
        from reattend.kernels.attention.launch_backward import launch_backward
        from reattend.kernels.latent_attention import launch_backward as latent_backward

        dy, dlse = draw(*y.shape), torch.randn(lse.shape, generator=gen)
        leaves = [x.double().requires_grad_() for x in (*queries, *dense)]
        out, top = function(
            *leaves, *used, start, length, scale=0.3, causal=case["causal"],
            sliding_window=case["window"], softcap=case["softcap"],
        )  # fmt: skip
        loss = (out * dy.double()).sum() + (top * dlse)[~dead].sum()
        wanted = torch.autograd.grad(loss, leaves, materialize_grads=True)
        inputs = (*queries, *caches, start, length)
        backward: Any = launch_backward
        if routed:  # nothing is read of a query that does not use the head
            inputs, backward = x, routed_launch.launch_backward
            dy = dy.masked_fill(idle[..., None], math.nan)
        elif shape.startswith("latent"):  # several programs share the pairs of some tiles
            backward = partial(latent_backward.launch_backward, splits=case.get("parts", 1))
        with poisoned():
            made = backward((dy, dlse), (y, lse), inputs, rule, (config, config))
        gradients = [
            float((a.double() - w).abs().max() / w.abs().max()) if w.numel() else float(a.numel())
            for a, w in zip(made, wanted, strict=True)
        ]
    return {
        "gradients": gradients,
        "y": float((y.double() - want).abs().max() / want.abs().max()),
        "lse": float((lse.double() - want_lse)[~dead].abs().max()),
        "dead": int(dead.sum()),
        "dead_agree": bool(torch.equal(lse == -math.inf, dead)),
        "dead_zero": bool((y[dead] == 0).all()),
        "dtype": str(y.dtype),
    }


def spread(cache: torch.Tensor, apart: int) -> torch.Tensor:
    """The same rows, so many numbers apart: memory that nothing touches is not there."""
    *many, rows, width = cache.shape
    strides = [width * math.prod(many[i + 1 :]) for i in range(len(many))]
    store = torch.empty(rows * apart, dtype=cache.dtype)
    return store.as_strided(cache.shape, (*strides, apart, 1)).copy_(cache)


def names() -> list[tuple[str, str, str]]:
    """fp32 and fp16 everywhere; bf16 (computed in fp32 by the interpreter) on two cases."""
    near = [c for c in CASES if "far" not in c and "wide" not in c]
    full = [(s, c, d) for s in ("attention", "latent") for c in near for d in DTYPES[:2]]
    full += [(s, c, "float16") for s in ("attention", "latent") for c in CASES if "far" in c]
    full += [(s, "prefill-wide-window", "float32") for s in ("attention", "latent")]
    widths = [s for s in SHAPES if s.startswith("attention-")]
    full += [(s, c, "float32") for s in widths for c in ("prefill", "decode-split")]
    few = [(s, c, "bfloat16") for s in ("attention", "latent") for c in ("prefill", "decode-split")]
    none = [("latent-no-rope", c, "float32") for c in ("prefill", "decode-split", "decode-paged")]
    plain = [c for c in near if "paged" not in c and "few-heads" not in c]
    routed = [("routed", c, "float32") for c in plain] + [("routed", "prefill", "bfloat16")]
    routed += [("routed-groups", "prefill-window-softcap", "float32")]
    routed += [("routed-groups", c, "float16") for c in ("prefill", "decode", "decode-small-chunk")]
    return full + few + none + routed


@pytest.fixture(scope="module")
def results() -> dict[str, dict[str, Any]]:
    return interpreted(__file__)


@pytest.mark.parametrize(("shape", "case", "dtype"), names())
def test_equals_reference(results: dict[str, Any], shape: str, case: str, dtype: str) -> None:
    got = results[f"{shape} {case} {dtype}"]
    assert got["dtype"] == f"torch.{dtype}"
    assert got["y"] <= TOLERANCE[dtype], got
    assert got["lse"] <= 5e-6, got
    assert got["dead_agree"], got
    assert got["dead_zero"], got
    assert all(error <= 3 * TOLERANCE[dtype] for error in got["gradients"]), got
    made = 4 if shape.startswith("latent") else 3
    assert len(got["gradients"]) == made * has_gradient(shape, case, dtype)


def test_cases_include_rows_that_see_nothing(results: dict[str, Any]) -> None:
    for shape in ("attention", "latent", "routed"):
        assert results[f"{shape} prefill-sees-nothing float32"]["dead"] > 0
        assert results[f"{shape} decode-empty-row float32"]["dead"] > 0


if __name__ == "__main__":
    found = {" ".join(name): run_case(*name) for name in names()}
    sys.stdout.write(json.dumps(found) + "\n")
