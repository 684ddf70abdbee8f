"""Nodes of models without caches on a CPU, against the same heads under a dense mask.

    python kernels/bench/onnx_encoder.py --out kernels/bench/results/onnx_encoder.json

One attention layer over 4096 tokens in ONNX Runtime, one thread, batch 1, float32, 8 heads of 64.
All ways run in one process and take turns; figures are medians of processor time. Outputs are
compared first. The dense mask is an input that is ready: making it is not timed, nor is choosing.

Ways:
    ours    the node that an export has for this pattern
    mask    `MaskedAttention`, the node of what has no better one
    theirs  the standard Attention of opset 24 with a boolean mask [queries, keys]
    full    the same without a mask
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
from table import onnx_encoder_table
from timing import in_turns, times_faster

from reattend.mixers.config import CoreConfig
from reattend.patterns.pattern import HeadPattern, laid_out
from reattend.targets.onnx.encoder_band import band_of
from reattend.targets.onnx.encoder_body import ENCODER
from reattend.targets.onnx.encoder_regions import regions
from reattend.targets.onnx.functions import DOMAIN, Uses, function_proto

COMMAND = "python kernels/bench/onnx_encoder.py --out kernels/bench/results/onnx_encoder.json"
HEADS, WIDTH, SCALE, TOKENS = 8, 64, 64**-0.5, 4096
QUERIES, LIMIT = 256, 1e-4
RULES = {"scale": SCALE, "softcap": 0.0}
CORE = CoreConfig(
    heads=HEADS, kv_heads=HEADS, qk_head_dim=WIDTH, v_head_dim=WIDTH, scale=SCALE, pattern="full"
)


@dataclass(frozen=True)
class Case:
    """A pattern over a grid or a text; or tokens per block and share of blocks a head chose, in an
    earlier pass if so said; or 256 queries, of which so many together read a quarter of the rows,
    chosen by themselves."""

    name: str
    pattern: dict[str, Any] | None = None
    shape: tuple[int, ...] = (64, 64)
    chosen: tuple[int, float] = (0, 0.0)
    before: bool = False
    together: int = 0


CASES = (
    Case("text: 4 sinks, window of 256 on both sides", {"sinks": 4, "window": 256}),
    Case("text: window of 64 on both sides", {"window": 64}),
    Case("neighborhood: 7 x 7 of 64 x 64", {"grid": {"radius": 3, "norm": "neighborhood"}}),
    Case("clear: radius 8 of 64 x 64", {"grid": {"radius": 8, "norm": "circle"}}),
    Case("clear: radius 16 of 64 x 64", {"grid": {"radius": 16, "norm": "circle"}}),
    Case("tile: 8 x 8 and the next ones of 64 x 64", {"tiles": {"tile": [8, 8], "radius": 1}}),
    Case("radial: 16 frames of 16 x 16", {"radial": {}}, (16, 16, 16)),
    Case("radial: 32 frames of 8 x 16", {"radial": {}}, (32, 8, 16)),
    Case("radial: 64 frames of 8 x 8, blocks of 64", {"radial": {"block": 64}}, (64, 8, 8)),
    Case("biformer: 16 of 64 tiles", chosen=(64, 0.25)),
    Case("sparsed: a later pass, 30 % of blocks of 128", chosen=(128, 0.3), before=True),
    Case("256 queries, each with rows of its own", together=1),
    Case("256 queries, 4 with rows of their own", together=4),
    Case("256 queries, 16 with rows of their own", together=16),
    Case("256 queries, 64 with rows of their own", together=64),
)


class Rows:
    """Queries, keys, values, and what is seen [1 or H, N, M]."""

    def __init__(self, case: Case) -> None:
        random = np.random.default_rng(0)
        self.case, shape = case, (3, 1, HEADS, TOKENS, WIDTH)
        self.q, self.k, self.v = random.standard_normal(shape, np.float32)
        if case.pattern is not None:
            self.pattern = HeadPattern.model_validate(laid_out(case.pattern, {"shape": case.shape}))
            place = torch.arange(TOKENS)
            self.seen: Array = self.pattern.sees(place[:, None], place, CORE)[None].numpy()
            return
        if case.together:
            self.q = np.ascontiguousarray(self.q[:, :, :QUERIES])
            pairs = (1, HEADS, QUERIES // case.together, TOKENS)
            self.order = np.sort(random.random(pairs).argsort(-1)[..., : TOKENS // 4], -1)
            seen = np.zeros(pairs[1:], bool)
            np.put_along_axis(seen, self.order[0], True, -1)
            self.seen = seen.repeat(case.together, 1)
            return
        block, share = case.chosen
        blocks = TOKENS // block
        many = -(-int(1000 * share * blocks) // 1000)
        order = random.random((1, HEADS, blocks, blocks)).argsort(-1)
        self.order = np.ascontiguousarray(np.sort(order[..., :many], -1))
        seen = np.zeros((HEADS, blocks, blocks), bool)
        np.put_along_axis(seen, self.order[0], True, -1)
        self.seen = seen.repeat(block, 1).repeat(block, 2) | np.eye(TOKENS, dtype=bool)

    @property
    def inputs(self) -> dict[str, Array]:
        """What every node reads."""
        return {"q": self.q, "key": self.k, "value": self.v}


def one(name: str, inputs: dict[str, Array], outputs: list[str], rules: Any, ours: bool) -> Call:
    node = helper.make_node(name, list(inputs), outputs, domain=DOMAIN if ours else "", **rules)
    functions = [function_proto(name, Uses(capped=False))] if ours else []
    return bound(session([node], inputs, outputs[:1], functions), inputs, {})


def boxes(rows: Rows) -> Call:
    """`RegionAttention` with the boxes that an export finds."""
    found = regions(rows.pattern, CORE, TOKENS)
    assert found is not None
    told = [x.numpy() for x in found.told]
    inputs = {**rows.inputs, **dict(zip(ENCODER["RegionAttention"][3:], told, strict=True))}
    return one("RegionAttention", inputs, ["y"], RULES, ours=True)


def band(rows: Rows) -> Call:
    """`BandAttention`, of a text without padding."""
    inputs = {**rows.inputs, "place": np.arange(TOKENS)[None]}
    rules = {**RULES, "sinks": rows.pattern.sinks, "window": rows.pattern.window}
    return one("BandAttention", inputs, ["y"], rules, ours=True)


def tiles(rows: Rows) -> Call:
    """`ChosenRegionAttention`; tokens lie tile by tile, and a query's own row is read beside."""
    block = rows.case.chosen[0]
    grid = np.arange(TOKENS).reshape(-1, block)
    own = np.broadcast_to(grid[None, None], (1, HEADS, *grid.shape))
    chosen = (rows.order == np.arange(len(grid))[:, None]).any(-1)[..., None, None]
    keys = np.concatenate([grid[rows.order].reshape(1, HEADS, len(grid), -1), own], 3)
    every = np.ones((1, HEADS, len(grid), block, keys.shape[3] - block), bool)
    seen = np.concatenate([every, ~chosen & np.eye(block, dtype=bool)], 4)
    told = {"query_rows": grid, "key_rows": keys, "seen": seen, "at": np.arange(TOKENS)}
    return one("ChosenRegionAttention", {**rows.inputs, **told}, ["y"], RULES, ours=True)


def apart(rows: Rows) -> Call:
    """`ChosenRegionAttention`, the rows of every region of queries its own."""
    c = rows.case.together
    told = {
        "query_rows": np.arange(QUERIES).reshape(-1, c), "key_rows": rows.order,
        "seen": np.ones((1, 1, 1, 1, 1), bool), "at": np.arange(QUERIES),
    }  # fmt: skip
    return one("ChosenRegionAttention", {**rows.inputs, **told}, ["y"], RULES, ours=True)


def later(rows: Rows) -> Call:
    """`ObservedAttention` with blocks that an earlier pass found."""
    block = rows.case.chosen[0]
    told = {"past_blocks": rows.order, "phase": np.array([2]), "prompt_blocks": np.array([1])}
    rules = {**RULES, "block": block, "topk": 0, "ratio": rows.case.chosen[1]}
    return one("ObservedAttention", {**rows.inputs, **told}, ["y", "blocks"], rules, ours=True)


def ours(rows: Rows) -> Call:
    """The node that an export has for a case."""
    case = rows.case
    if case.together:
        return apart(rows)
    if case.pattern is None:
        return later(rows) if case.before else tiles(rows)
    return band(rows) if band_of(rows.pattern, CORE) else boxes(rows)


def ways(rows: Rows) -> dict[str, Call]:
    """Each way; `full` gives another result."""
    masked = {**rows.inputs, "seen": rows.seen[None]}
    theirs = {"scale": SCALE, "is_causal": 0}
    return {
        "ours": ours(rows),
        "mask": one("MaskedAttention", masked, ["y"], RULES, ours=True),
        "theirs": one("Attention", masked, ["y"], theirs, ours=False),
        "full": one("Attention", rows.inputs, ["y"], theirs, ours=False),
    }


def run(case: Case, rounds: int) -> dict[str, Any]:
    """One row of the results."""
    rows = Rows(case)
    made = ways(rows)
    q, k, v = (torch.from_numpy(x) for x in (rows.q, rows.k, rows.v))
    sdpa = torch.nn.functional.scaled_dot_product_attention
    want = sdpa(q, k, v, torch.from_numpy(rows.seen)[None], scale=SCALE).numpy()
    different = {n: float(np.abs(c() - want).max()) for n, c in made.items() if n != "full"}
    if not max(different.values()) <= LIMIT:
        raise SystemExit(f"{case.name}: another result, {different}")
    found = in_turns(made, rounds)
    ours, ratio = found["ours"]["cpu_ms"], times_faster(found)
    sys.stdout.write(f"{case.name}: {ours:.2f} ms, {ratio}\n")
    return {
        "case": case.name,
        "shape": {"n": TOKENS, "h": HEADS, "d": WIDTH},
        "density": round(float(rows.seen.mean()), 4),
        "ms": found,
        "times_faster": ratio,
        "difference": different,
    }


if __name__ == "__main__":
    main(__doc__, COMMAND, CASES, run, onnx_encoder_table, 5, ("onnx", "onnxruntime"))
