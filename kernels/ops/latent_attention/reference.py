"""Torch reference of `reattend::latent_attention` (absorbed MLA, DeepSeek-V2 section 2.1).

All H heads share one latent row and one rotary key per token; the up-projections were absorbed
into the queries (and are applied to the result by the caller), so the cache is never expanded.
`latent_attention` is plain, traceable and differentiable; `forward` and `backward` are the same
thing in blocks, used inside the op.
"""

from __future__ import annotations

from torch import Tensor

from reattend.kernels.blocked import attend_blocked, attend_blocked_backward
from reattend.kernels.core import Cache, Rule, attend, compute_dtype, zero_unused
from reattend.kernels.masking import gather_pages, query_positions, scatter_pages


def _queries(q_nope_BHNr: Tensor, q_rope_BHNR: Tensor) -> tuple[Tensor, ...]:
    """As one KV head: (B, 1, H, N, w). A rotary part of width 0 is left out."""
    parts = (q_nope_BHNr[:, None],)
    return (*parts, q_rope_BHNR[:, None]) if q_rope_BHNR.shape[-1] else parts


def _keys(latent_BMr: Tensor, rope_BMR: Tensor) -> tuple[Tensor, ...]:
    parts = (latent_BMr[:, None],)
    return (*parts, rope_BMR[:, None]) if rope_BMR.shape[-1] else parts


def latent_attention(
    q_nope_BHNr: Tensor,
    q_rope_BHNR: Tensor,
    latent_BMr: Tensor,
    rope_BMR: Tensor,
    kv_start_B: Tensor,
    kv_len_B: Tensor,
    block_table_BP: Tensor | None = None,
    *,
    scale: float,
    causal: bool = True,
    sliding_window: int = 0,
    softcap: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Attention of N new queries over latent rows that every head shares.

    ``score = (q_nope . latent + q_rope . rope) * scale`` and ``u = sum_j p_j latent_j``.
    Positions, visibility and unused rows are those of `reattend::attention`.

    Args:
        q_nope_BHNr: queries with the key up-projection absorbed.
        q_rope_BHNR: rotated queries; R may be 0.
        latent_BMr: latent rows, M of capacity; (pages, page, r) with a block table.
        rope_BMR: rotated shared keys; (pages, page, R) with a block table.
        kv_start_B: first valid row (left padding), int32 or int64.
        kv_len_B: one past the last valid row, the new ones included.
        block_table_BP: row j of sequence b is row ``j % page`` of ``block_table[b, j // page]``.
        scale: factor on the score.
        causal: hide rows after the query.
        sliding_window: number of latest rows seen, itself included; 0 is all.
        softcap: cap * tanh(score / cap) before masking; 0 is off.

    Returns:
        ``u_BHNr`` in the dtype of the queries and ``lse_BHN``, the natural log-sum-exp in fp32
        (fp64 for fp64 inputs). A query that sees nothing gives u = 0 and lse = -inf.
    """
    if block_table_BP is not None:
        latent_BMr = gather_pages(latent_BMr, block_table_BP)
        rope_BMR = gather_pages(rope_BMR, block_table_BP)
    dtype = compute_dtype(q_nope_BHNr.dtype)
    keys = tuple(
        zero_unused(k.to(dtype), kv_start_B, kv_len_B, 0) for k in _keys(latent_BMr, rope_BMR)
    )
    queries = tuple(q.to(dtype) for q in _queries(q_nope_BHNr, q_rope_BHNR))
    pos_BN = query_positions(kv_len_B, q_nope_BHNr.shape[2])
    rule = Rule(scale, causal, sliding_window, softcap)
    u, lse = attend(queries, Cache(keys, keys[0], kv_start_B, kv_len_B), pos_BN, rule)
    return u.squeeze(1).to(q_nope_BHNr.dtype), lse.squeeze(1)


def forward(
    q_nope_BHNr: Tensor,
    q_rope_BHNR: Tensor,
    latent_BMr: Tensor,
    rope_BMR: Tensor,
    kv_start_B: Tensor,
    kv_len_B: Tensor,
    block_table_BP: Tensor | None,
    rule: Rule,
) -> tuple[Tensor, Tensor]:
    """`latent_attention` in blocks of queries: bounded memory, reads only visible rows."""
    if block_table_BP is not None:
        latent_BMr = gather_pages(latent_BMr, block_table_BP)
        rope_BMR = gather_pages(rope_BMR, block_table_BP)
    keys = _keys(latent_BMr, rope_BMR)
    cache = Cache(keys, keys[0], kv_start_B, kv_len_B)
    u, lse = attend_blocked(_queries(q_nope_BHNr, q_rope_BHNR), cache, rule)
    return u.squeeze(1), lse.squeeze(1)


def backward(
    grads: tuple[Tensor, Tensor],
    outputs: tuple[Tensor, Tensor],
    inputs: tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor | None],
    rule: Rule,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Closed-form gradient of q_nope, q_rope, latent and rope (in their shapes and dtypes).

    Args:
        grads: of u_BHNr and lse_BHN.
        outputs: u_BHNr and lse_BHN.
        inputs: q_nope, q_rope, latent, rope, kv_start, kv_len, block table, as given to the op.
        rule: the scalar arguments.
    """
    q_nope, q_rope, latent, rope, kv_start_B, kv_len_B, table = inputs
    dense_latent = latent if table is None else gather_pages(latent, table)
    dense_rope = rope if table is None else gather_pages(rope, table)
    keys = _keys(dense_latent, dense_rope)
    dqueries, dkeys, dvalues = attend_blocked_backward(
        (grads[0][:, None], grads[1][:, None]),
        (outputs[0][:, None], outputs[1][:, None]),
        _queries(q_nope, q_rope),
        Cache(keys, keys[0], kv_start_B, kv_len_B),
        rule,
    )
    dlatent = (dkeys[0] + dvalues).squeeze(1)
    drope = dkeys[1].squeeze(1) if len(dkeys) == 2 else dense_rope.new_zeros(dense_rope.shape)
    dq_rope = dqueries[1].squeeze(1) if len(dqueries) == 2 else q_rope.new_zeros(q_rope.shape)
    if table is not None:
        dlatent = scatter_pages(dlatent, latent, table)
        drope = scatter_pages(drope, rope, table)
    return (
        dqueries[0].squeeze(1).to(q_nope.dtype),
        dq_rope.to(q_rope.dtype),
        dlatent.to(latent.dtype),
        drope.to(rope.dtype),
    )
