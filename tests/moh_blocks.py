"""Routed blocks for tests, and the paper's formulas written out one token and head at a time."""

from __future__ import annotations

import math
from typing import Any

import torch
from mla_blocks import HIDDEN, moments
from torch import Tensor

from reattend.mixers.dense import DenseAttention
from reattend.passes.rewrite.moh import ToMoh
from reattend.passes.rewrite.moh_options import MohOptions

#: every way to route, of blocks with 8 query heads in 4 KV groups
WAYS: dict[str, dict[str, Any]] = {
    "kv-group": {"shared": 1, "top_k": 2},
    "head": {"shared": 2, "top_k": 3, "route": "head"},
    "head-none-shared": {"shared": 0, "top_k": 3, "route": "head"},
    "one": {"shared": 0, "top_k": 1},
    "hard": {"shared": 2, "top_k": 3, "route": "head", "gate": "hard"},
    "qnorm": {"shared": 4, "top_k": 2, "route": "head", "gate": "hard", "router": "qnorm"},
    "qnorm-kv-group": {"shared": 0, "top_k": 2, "gate": "hard", "router": "qnorm"},
}


def wide(cfg: Any) -> Any:
    """A case of mla_blocks with eight heads in four KV groups."""
    alibi = None if cfg.alibi is None else tuple(s * f for s in cfg.alibi for f in (1.0, 0.7))
    core = cfg.core.model_copy(update={"heads": 8, "kv_heads": 4})
    return cfg.model_copy(update={"core": core, "alibi": alibi})


def routed(block: DenseAttention, trained: bool = True, **options: Any) -> Any:
    """The block converted; `trained`: its router is no longer zero."""
    made, given = ToMoh(), MohOptions(**options)
    refusal = made.check(block.config, given)
    assert refusal is None, refusal
    needs = made.wants(block.config, given)
    mixer: Any = made.build(block, moments(block) if needs else None, given).mixer
    return shaken(mixer) if trained else mixer


def shaken(model: Any) -> Any:
    """Routers of random weights."""
    generator = torch.Generator().manual_seed(11)
    for name, p in model.named_parameters():
        if "router." in name:
            p.data = torch.randn(p.shape, generator=generator).to(p)
    return model


def gates(mixer: Any, x_BND: Tensor, q_BHNd: Tensor) -> Tensor:
    """What the paper and its code say each query head weighs, [B, H, N], in Python numbers."""
    c, router = mixer.config, mixer.router
    found = torch.zeros(x_BND.shape[0], c.core.heads, x_BND.shape[1], dtype=torch.float64)
    for b in range(x_BND.shape[0]):
        for n in range(x_BND.shape[1]):
            each = _token(c, router, x_BND[b, n], q_BHNd[b, :, n])
            for unit, gate in enumerate(each):
                for head in range(c.heads_per_unit):
                    found[b, unit * c.heads_per_unit + head, n] = gate
    return found


def _token(c: Any, router: Any, x_D: Tensor, q_Hd: Tensor) -> list[float]:
    shared, k, units = c.shared, c.top_k, c.core.heads // c.heads_per_unit
    rows = q_Hd.reshape(units, -1)
    if c.router == "qnorm":
        norms = torch.tensor([float((row * row).sum()) ** 0.5 for row in rows[shared:]])
        z = (norms.double() / norms.double().std()).tolist()
    else:
        z = [float(w @ x_D) for w in router.routed.weight]
    best = sorted(range(len(z)), key=lambda u: -z[u])[:k]
    if c.gate_by == "hard":
        return [1.0] * shared + [float(u in best) for u in range(len(z))]
    a1 = a2 = 0.5
    ones: list[float] = []
    if shared:
        e1, e2 = (math.exp(float(w @ x_D)) for w in router.share.weight)
        a1, a2 = e1 / (e1 + e2), e2 / (e1 + e2)
        s = [math.exp(float(w @ x_D)) for w in router.shared.weight]
        ones = [2 * a1 * shared * v / sum(s) for v in s]
    p = [math.exp(v) for v in z]
    p = [v / sum(p) for v in p]
    total = sum(p[u] for u in best)
    return ones + [2 * a2 * k * p[u] / total if u in best else 0.0 for u in range(len(z))]


__all__ = ["HIDDEN", "WAYS", "gates", "routed", "shaken", "wide"]
