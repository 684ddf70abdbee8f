"""First-order influence: what a loss changes by when one key is hidden from one query."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from reattend.mixers.config import CoreConfig
from reattend.mixers.scores import attend
from reattend.passes.rewrite.sparse_influence import hidden_shares, predicted, tiles
from reattend.passes.rewrite.sparse_watch import Look
from reattend.patterns.pattern import HeadPattern

N, WIDTH = 11, 6


def core(**more: object) -> CoreConfig:
    given = {"heads": 4, "kv_heads": 2, "qk_head_dim": WIDTH, "v_head_dim": WIDTH, "scale": 0.4}
    return CoreConfig.model_validate({**given, **more})


@pytest.mark.parametrize(
    "more", [{}, {"pattern": "sliding", "window": 5}, {"softcap": 2.0}, {"sinks": True}]
)
def test_influence_is_what_hiding_the_key_changes(more: dict[str, object]) -> None:
    """dL/dO times (the output with the key masked minus the output), computed by `attend`."""
    torch.manual_seed(0)
    c = core(**more)
    q, dy = (torch.randn(2, 4, N, WIDTH, dtype=torch.float64) for _ in range(2))
    k, v = (torch.randn(2, 2, N, WIDTH, dtype=torch.float64) for _ in range(2))
    sinks = torch.randn(4, dtype=torch.float64) if c.sinks else None
    found = tiles(Look(q, k, v, None, sinks, c), dy, block=1)
    causal = torch.ones(N, N, dtype=torch.bool).tril()
    if c.window:
        causal &= ~torch.ones(N, N, dtype=torch.bool).tril(-c.window)

    def output(seen: Tensor) -> Tensor:
        own = None if sinks is None else sinks[:, None, None]
        return attend(q, k, v, c, seen[None, None], None, own)

    whole = output(causal)
    for i, j in [(1, 0), (5, 2), (7, 7), (10, 6), (10, 9)]:
        seen = causal.clone()
        seen[i, j] = False
        expected = (dy * (output(seen) - whole)).sum((0, 2, 3))
        assert (found[:, i, j] - expected).abs().max() <= 1e-12
    assert found[:, ~causal].abs().max() == 0
    pooled = tiles(Look(q, k, v, None, sinks, c), dy, block=4)
    assert pooled.shape == (4, 3, 3)
    assert (pooled[:, 1, 0] - found[:, 4:8, :4].sum((1, 2))).abs().max() <= 1e-12


def test_a_pattern_costs_the_tiles_it_hides() -> None:
    c = core()
    pattern = HeadPattern(sinks=1, window=4)
    shares = hidden_shares(pattern, c, N, 4)
    assert shares.tolist() == [[0, 0, 0], [6 / 16, 0, 0], [9 / 12, 6 / 12, 0]]
    worth = torch.rand(2, 3, 3, dtype=torch.float64)
    assert predicted(worth, pattern, c, N, 4).tolist() == pytest.approx(
        (worth * shares).sum((1, 2)).tolist()
    )
    assert predicted(worth, HeadPattern(full=True), c, N, 4).tolist() == [0.0, 0.0]
