"""Selectors: exact where the budget covers everything, else the dense block under a naive mask."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from mla_blocks import CASES, HIDDEN, config, dense
from pydantic import ValidationError
from torch import Tensor

from reattend.errors import ArgumentError
from reattend.mixers.base import Context
from reattend.mixers.dense import DenseAttention
from reattend.mixers.kinds import build_mixer
from reattend.mixers.selecting import frame
from reattend.mixers.selecting.budget import within
from reattend.mixers.sparse_blocks import LEAST
from reattend.passes.rewrite.sparse import ToSparse
from reattend.passes.rewrite.sparse_options import SparseOptions
from reattend.patterns.pattern import HeadPattern
from reattend.patterns.routing import Blocks

LONG = LEAST + 41
FULL = config().core.model_copy(update={"pattern": "full"})
BOTH_WAYS = config().model_copy(update={"core": FULL})


def converted(block: DenseAttention, **pattern: Any) -> Any:
    made, given = ToSparse(), SparseOptions(pattern=HeadPattern.model_validate(pattern))
    refusal = made.check(block.config, given)
    assert refusal is None, refusal
    return made.build(block, None, given).mixer


def inputs(n: int, pads: tuple[int, ...] = (0, 5)) -> tuple[Tensor, Tensor]:
    """Hidden states and validity, padded on the left."""
    x = torch.randn(len(pads), n, HIDDEN, dtype=torch.float64)
    return x, torch.arange(n)[None] >= torch.tensor(pads)[:, None]


def gap(a: Tensor, b: Tensor, real: Tensor) -> float:
    return float((a - b)[real].abs().max() / b[real].abs().max())


def scores(block: DenseAttention, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Queries [H, N, d], keys of every query head and their scaled products, of one real text."""
    (q, _, _), (k, _) = block.project(x[None], x[None], Context(), None)
    k = k[0].repeat_interleave(2, 0)
    return q[0], k, q[0] @ k.transpose(-1, -2) * block.config.core.scale


def lines(block: DenseAttention, x: Tensor) -> Tensor:
    """Vertical-slash with 6 columns, 9 diagonals, 8 last queries, 2 and 3 forced; [H, N, N]."""
    n, p = len(x), scores(block, x)[2]
    seen = torch.zeros(4, n, n, dtype=torch.bool)
    p = p.masked_fill(~torch.ones(n, n).tril().bool(), float("-inf")).softmax(-1)[:, -8:]
    for h in range(4):
        last, column = p[h].tolist(), p[h].sum(0).tolist()
        diagonal = [
            sum(last[r][n - 8 + r - t] for r in range(8) if n - 8 + r >= t) for t in range(n)
        ]
        best = sorted(range(2, n), key=lambda j: -column[j])[:4]
        near = sorted(range(3, n), key=lambda t: -diagonal[t])[:6]
        for i in range(n):
            seen[h, i, [j for j in (0, 1, *best) if j <= i]] = True
            seen[h, i, [i - t for t in (0, 1, 2, *near) if t <= i]] = True
    return seen


def routed(block: DenseAttention, x: Tensor, size: int, pooled: bool, topk: int = 2) -> Tensor:
    """Every query (or block of queries) and its `topk` blocks, its own among them; [H, N, N]."""
    q, k, _ = scores(block, x)
    n = len(x)
    starts = range(0, n, size)
    means = torch.stack([k[:, s : s + size].mean(1) for s in starts], 1)
    if pooled:
        each = [q[:, s : s + size].mean(1, keepdim=True) for s in starts]
        q = torch.cat(
            [e.expand(-1, min(size, n - s), -1) for e, s in zip(each, starts, strict=True)], 1
        )
    gate = (q @ means.transpose(-1, -2)).tolist()
    seen = torch.zeros(4, n, n, dtype=torch.bool)
    for h in range(4):
        for i in range(n):
            own = i // size
            best = sorted(range(own), key=lambda b: -gate[h][i][b])[: topk - 1]
            for b in (own, *best):
                seen[h, i, b * size : min((b + 1) * size, i + 1)] = True
    return seen


def labelled(block: DenseAttention, x: Tensor) -> Tensor:
    """The 9 best tokens by the first 2 channels; [H, N, N]."""
    q, k, _ = scores(block, x)
    n = len(x)
    gate = (q[..., :2] @ k[..., :2].transpose(-1, -2)).tolist()
    seen = torch.zeros(4, n, n, dtype=torch.bool)
    for h in range(4):
        for i in range(n):
            seen[h, i, sorted(range(i + 1), key=lambda j: -gate[h][i][j])[:9]] = True
    return seen


LINES: dict[str, Any] = {
    "kind": "vertical-slash", "columns": 6, "slashes": 9, "last_queries": 8, "first_columns": 2,
    "last_slashes": 3,
}  # fmt: skip
METHODS: dict[str, tuple[dict[str, Any], Callable[..., Tensor]]] = {
    "vertical-slash": (LINES, lines),
    "moba": ({"kind": "blocks", "block": 64, "topk": 2}, lambda b, x: routed(b, x, 64, False)),
    "moba, small": ({"kind": "blocks", "block": 5, "topk": 2}, lambda b, x: routed(b, x, 5, False)),
    "pooled": (
        {"kind": "blocks", "block": 64, "topk": 2, "queries": "pooled"},
        lambda b, x: routed(b, x, 64, True),
    ),
    "channels": ({"kind": "channels", "share": 0.25, "topk": 9, "phase": "both"}, labelled),
}
COVERING: list[dict[str, Any]] = [
    {"kind": "vertical-slash"},
    {"kind": "blocks", "block": 64, "topk": 999},
    {"kind": "blocks", "block": 7, "topp": 1.0},
    {"kind": "blocks", "block": 64, "ratio": 1.0, "queries": "pooled"},
    {"kind": "blocks", "block": 7, "threshold": 0.0, "queries": "pooled"},
    {"kind": "channels", "ratio": 1.0, "phase": "both"},
]


@pytest.mark.parametrize("select", COVERING, ids=str)
def test_a_budget_that_covers_everything_is_the_original(select: dict[str, Any]) -> None:
    for name in ("gqa", "softcap", "window", "sinks"):
        block = dense(CASES[name])
        mixer = converted(block, select=select)
        for n in (30, LONG):
            x, real = inputs(n)
            with torch.no_grad():
                assert gap(mixer(x, Context(mask=real)), block(x, Context(mask=real)), real) < 1e-12


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("window", [3, 0])
def test_what_is_chosen_equals_a_naive_mask(
    name: str, window: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Blocks and masks, with padding; a window beside what is chosen, or nothing."""
    select, naive = METHODS[name]
    block = dense(config())
    mixer = converted(block, select=select, window=window)
    ran: list[int] = []
    op = frame.sparse_attention
    monkeypatch.setattr(frame, "DENSE", 1.0)  # texts this short are read nearly whole
    monkeypatch.setattr(frame, "sparse_attention", lambda *a: ran.append(1) or op(*a))
    routed_op = frame.attend_routed
    monkeypatch.setattr(frame, "attend_routed", lambda *a: ran.append(2) or routed_op(*a))
    for n in (30, LONG):
        x, real = inputs(n, (0, 7))
        mask = torch.eye(n, dtype=torch.bool).expand(2, 4, n, n).clone()
        near = torch.ones(n, n).tril().triu(-2 if window else 0).bool()  # with itself
        with torch.no_grad():
            for row, pad in enumerate((0, 7)):
                own = x[row, pad:]
                mask[row, :, pad:, pad:] = naive(block, own) | near[pad:, pad:]
            # a product over some channels is not one of distances: positions of real tokens count
            at = (real.cumsum(-1) - 1).clamp_min(0)
            got = mixer(x, Context(mask=real, position_BN=at))
            assert gap(got, block(x, Context(mask=mask)), real) < 1e-12
    by_query = name.startswith("moba") and not window
    assert ran == ([] if name == "channels" else [2, 2] if by_query else [1, 1])  # the long call


@pytest.mark.parametrize("budget", [{"topk": 2}, {"topp": 0.5}, {"threshold": 0.2}], ids=str)
def test_later_tokens_change_nothing_where_queries_choose_by_themselves(
    budget: dict[str, Any],
) -> None:
    mixer = converted(dense(config()), select={"kind": "blocks", "block": 16, **budget})
    x, real = inputs(LONG, (0,))
    changed = x.clone()
    changed[:, 130:] = torch.randn_like(x[:, 130:])
    with torch.no_grad():
        a, b = mixer(x, Context()), mixer(changed, Context())
    assert (a - b)[:, :130].abs().max() < 1e-12 < (a - b)[:, 130:].abs().max()


def test_gradients_are_those_of_the_masked_block() -> None:
    block = dense(config())
    mixer = converted(block, select=METHODS["moba"][0])
    x, _ = inputs(LONG, (0,))
    with torch.no_grad():
        mask = routed(block, x[0], 64, False)[None]
    grads = []
    for module, ctx in ((mixer, Context()), (block, Context(mask=mask))):
        block.zero_grad()
        (module(x, ctx) ** 2).sum().backward()
        grads.append({name: p.grad.clone() for name, p in block.named_parameters()})
    for name, g in grads[0].items():
        assert torch.allclose(g, grads[1][name], rtol=1e-9, atol=1e-9), name


@pytest.mark.parametrize("queries", ["pooled", "each"])
def test_tiles_of_a_grid_choose_tiles(queries: str) -> None:
    """Not causal: tiles of 2 x 4 places see their two best; a token of text before, two behind."""
    block = dense(BOTH_WAYS)
    select = {"kind": "blocks", "tile": (2, 4), "queries": queries, "topk": 2}
    options = {"image_grid": (16, 16), "text_before": 1, "text_after": 2}
    given = SparseOptions.model_validate({"pattern": {"select": select}, **options})
    mixer = ToSparse().build(block, None, given).mixer
    x = torch.randn(1, 259, HIDDEN, dtype=torch.float64)
    place = torch.arange(256)
    region = place // 16 // 2 * 4 + place % 16 // 4
    with torch.no_grad():
        q, k = (t[:, 1:257] for t in scores(block, x[0])[:2])
        means = torch.stack([k[:, region == r].mean(1) for r in range(32)], 1)
        if queries == "pooled":
            q = torch.stack([q[:, region == r].mean(1) for r in range(32)], 1)[:, region]
        best = (q @ means.transpose(-1, -2)).topk(2).indices
        chosen = torch.zeros(4, 256, 32, dtype=torch.bool).scatter(-1, best, True)
        mask = torch.ones(4, 259, 259, dtype=torch.bool)
        mask[:, 1:257, 1:257] = chosen[:, :, region] | torch.eye(256, dtype=torch.bool)
        real = torch.ones(1, 259, dtype=torch.bool)
        assert gap(mixer(x, Context()), block(x, Context(mask=mask[None])), real) < 1e-12
        with pytest.raises(ArgumentError, match="grid of 256 tokens was given 255"):
            mixer(x[:, :255], Context())


def test_budgets() -> None:
    s = torch.tensor([0.0, 3.0, 1.0, 2.0, 9.0])
    allowed = torch.tensor([True, True, True, True, False])

    def chosen(forced: int | None = None, **budget: Any) -> list[int]:
        sure = None if forced is None else torch.arange(5) == forced
        found = within(s, allowed, Blocks(kind="blocks", **budget), sure)
        return found.nonzero()[:, 0].tolist()

    assert chosen(topk=2) == [1, 3]
    assert chosen(topk=2, forced=0) == [0, 1]
    assert chosen(topk=9) == [0, 1, 2, 3]
    assert chosen(ratio=0.5) == [1, 3] and chosen(ratio=0.51) == [1, 2, 3]
    assert chosen(topp=0.6) == [1] and chosen(topp=0.7) == [1, 3]  # .644, .237, .087, .032
    assert chosen(threshold=0.2) == [1, 3] and chosen(threshold=0.2, forced=0) == [0, 1, 3]
    assert Blocks(kind="blocks", ratio=0.3).units(10) == 3


def test_a_mixer_is_rebuilt_from_its_description() -> None:
    mixer = converted(dense(config()), select=METHODS["moba"][0], sinks=2)
    again = build_mixer(**mixer.described()).double()
    again.load_state_dict(mixer.state_dict())
    x, real = inputs(LONG)
    with torch.no_grad():
        assert torch.equal(again(x, Context(mask=real)), mixer(x, Context(mask=real)))


MOBA = METHODS["moba"][0]


@pytest.mark.parametrize(
    ("cfg", "options", "reason"),
    [
        (BOTH_WAYS, {"pattern": {"select": LINES}}, "needs a causal block"),
        (config(), {"pattern": {"select": MOBA}, "evict": True}, "is not KV-monotone"),
        (config(), {"pattern": {"select": {**MOBA, "across": "head"}}}, "looks ahead"),
        (config(), {"pattern": {"select": {"kind": "recorded", "at": (0,)}}}, "stack of layers"),
        (BOTH_WAYS, {"pattern": {"select": {**MOBA, "tile": (2, 2)}}}, "give image_grid"),
        (
            BOTH_WAYS,
            {"candidates": [{"window": 4}, {"select": LINES}], "kv_density": 0.5},
            "needs a causal block",
        ),
    ],
)
def test_what_cannot_be_is_refused(cfg: Any, options: dict[str, Any], reason: str) -> None:
    refusal = ToSparse().check(cfg, SparseOptions(**options))
    assert refusal is not None and reason in refusal.reason


@pytest.mark.parametrize(
    ("pattern", "words"),
    [
        ({"full": True, "select": MOBA}, "give no other term"),
        ({"select": {**MOBA, "topk": 0}}, "greater than 0"),
        ({"select": {**MOBA, "topp": 0.5}}, "exactly one budget"),
        ({"select": {"kind": "blocks"}}, "exactly one budget"),
        ({"select": {**MOBA, "shape": (4, 4), "tile": (3, 2)}}, "does not divide"),
        ({"select": {"kind": "magic"}}, "magic"),
    ],
)
def test_descriptions_that_say_nothing_are_refused(pattern: dict[str, Any], words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        HeadPattern.model_validate(pattern)


def test_texts_packed_into_a_row_are_refused() -> None:
    x, _ = inputs(12, (0,))
    text = torch.arange(12) >= 6
    packed = (text[:, None] == text[None]) & torch.ones(12, 12).tril().bool()
    with pytest.raises(ArgumentError, match="hides more than padding"):
        converted(dense(config()), select=MOBA)(x, Context(mask=packed[None, None]))
