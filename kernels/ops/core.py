"""Softmax attention on cleaned tensors: the arithmetic the attention ops share.

Scores may be a sum of several products (content and rotary part of a latent cache), so queries
and keys come as equally long tuples. Queries are grouped by KV head: ``(B, G, h, N, w)`` with
h = H / G; keys are ``(B, G, M, w)`` and never repeated. Two forms live here: `attend`, pure and
differentiable by autograd, and `attend_backward`, the closed-form gradient that the custom ops
use (derivation: kernels/README.md).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from reattend.kernels.masking import visible_keys


@dataclass(frozen=True)
class Rule:
    """What a score means and which keys count: the scalar arguments of both ops."""

    scale: float
    causal: bool
    sliding_window: int
    softcap: float


@dataclass(frozen=True)
class Cache:
    """The key side: tensors in compute dtype and the validity of their rows.

    Attributes:
        keys: tuple of (B, G, M, w); their products with the queries are summed.
        values: (B, G, M, e), what is averaged.
        start: (B,), first valid key.
        length: (B,), one past the last valid key.
        first: absolute index of row 0 of the tensors (they may be a slice of the cache).
    """

    keys: tuple[Tensor, ...]
    values: Tensor
    start: Tensor
    length: Tensor
    first: int = 0


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """fp64 stays fp64; every other float type is computed in fp32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def zero_unused(tensor_BGMe: Tensor, kv_start_B: Tensor, kv_len_B: Tensor, first: int) -> Tensor:
    """Zero the rows no query may see, so that garbage there (NaN) cannot leak through 0 * NaN."""
    key_M = first + torch.arange(tensor_BGMe.shape[2], device=tensor_BGMe.device)
    used_BM = (key_M >= kv_start_B[:, None]) & (key_M < kv_len_B[:, None])
    return torch.where(used_BM[:, None, :, None], tensor_BGMe, 0)


def products(queries: tuple[Tensor, ...], keys: tuple[Tensor, ...], rule: Rule) -> Tensor:
    """Scores (B, G, h, N, M): scaled and soft-capped, nothing hidden."""
    total: Tensor | None = None
    for q_BGhNw, k_BGMw in zip(queries, keys, strict=True):
        b, g, h, n, w = q_BGhNw.shape
        rows = (q_BGhNw * rule.scale).reshape(b, g, h * n, w)
        part = torch.matmul(rows, k_BGMw.transpose(-1, -2)).view(b, g, h, n, k_BGMw.shape[2])
        total = part if total is None else total + part
    assert total is not None
    if rule.softcap:
        total = rule.softcap * torch.tanh(total / rule.softcap)
    return total


def scores(queries: tuple[Tensor, ...], cache: Cache, pos_BN: Tensor, rule: Rule) -> Tensor:
    """Masked scores (B, G, h, N, M): scaled, soft-capped, -inf where a key is not visible."""
    total = products(queries, cache.keys, rule)
    key_M = cache.first + torch.arange(total.shape[-1], device=total.device)
    mask_BNM = visible_keys(
        cache.start,
        cache.length,
        pos_BN,
        key_M,
        causal=rule.causal,
        sliding_window=rule.sliding_window,
    )
    return total.masked_fill(~mask_BNM[:, None, None], float("-inf"))


def average(s: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """Softmax of masked scores, and the values it averages; `s` is overwritten.

    Rows that see nothing give 0 and -inf, never NaN.

    Args:
        s: scores (B, G, h, N, M), -inf where a key is not visible.
        values: (B, G, M, e).

    Returns:
        ``y (B, G, h, N, e)`` and ``lse (B, G, h, N)``, natural logarithm.
    """
    top = s.detach().amax(-1, keepdim=True)
    p = s.sub_(torch.where(top == float("-inf"), 0, top)).exp_()
    mass = p.sum(-1, keepdim=True)
    seen = mass > 0
    safe = torch.where(seen, mass, 1)
    b, g, h, n, m = p.shape
    y = torch.matmul(p.reshape(b, g, h * n, m), values)
    y = y.view(b, g, h, n, y.shape[-1]) / safe
    lse = torch.where(seen, top + torch.log(safe), float("-inf"))
    return y, lse.squeeze(-1)


def attend(
    queries: tuple[Tensor, ...], cache: Cache, pos_BN: Tensor, rule: Rule
) -> tuple[Tensor, Tensor]:
    """Attention output and log-sum-exp, as `average` defines them.

    Args:
        queries: tuple of (B, G, h, N, w) in the compute dtype.
        cache: the key side.
        pos_BN: absolute index of each query.
        rule: scale, causality, window, softcap.
    """
    return average(scores(queries, cache, pos_BN, rule), cache.values)


def attend_backward(
    grads: tuple[Tensor, Tensor],
    outputs: tuple[Tensor, Tensor],
    queries: tuple[Tensor, ...],
    cache: Cache,
    pos_BN: Tensor,
    rule: Rule,
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...], Tensor]:
    """Gradient of `attend` in closed form, by recomputing the probabilities from lse.

    Args:
        grads: gradient of y (B, G, h, N, e) and of lse (B, G, h, N).
        outputs: y and lse as `attend` returned them.
        queries: as given to `attend`.
        cache: as given to `attend`.
        pos_BN: as given to `attend`.
        rule: as given to `attend`.

    Returns:
        Gradients of the queries, of the keys (tuples) and of the values.
    """
    s = scores(queries, cache, pos_BN, rule)
    return average_backward(grads, outputs, s, queries, cache.keys, cache.values, rule)


def average_backward(
    grads: tuple[Tensor, Tensor],
    outputs: tuple[Tensor, Tensor],
    s: Tensor,
    queries: tuple[Tensor, ...],
    keys: tuple[Tensor, ...],
    values: Tensor,
    rule: Rule,
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...], Tensor]:
    """Gradient of `average` after `products`, where `s` are the masked scores again."""
    (dy, dlse), (y, lse) = grads, outputs
    dead = lse == float("-inf")
    p = torch.exp(s - torch.where(dead, 0, lse)[..., None])
    b, g, h, n, m = p.shape

    def flat(x: Tensor) -> Tensor:
        return x.reshape(b, g, h * n, x.shape[-1])

    dvalues = torch.matmul(flat(p).transpose(-1, -2), flat(dy))
    dp = torch.matmul(flat(dy), values.transpose(-1, -2)).view(b, g, h, n, m)
    shift = torch.where(dead, 0, dlse) - (dy * y).sum(-1)
    ds = p * (dp + shift[..., None])
    if rule.softcap:
        capped = torch.where(s == float("-inf"), 0, s / rule.softcap)
        ds = ds * (1 - capped * capped)
    ds = flat(ds) * rule.scale
    dqueries = tuple(torch.matmul(ds, k).view(q.shape) for q, k in zip(queries, keys, strict=True))
    dkeys = tuple(torch.matmul(ds.transpose(-1, -2), flat(q)) for q in queries)
    return dqueries, dkeys, dvalues
