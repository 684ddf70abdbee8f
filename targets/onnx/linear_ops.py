"""The torch ops that become the nodes of linear attention; they say what those mean.

Layout letters: B batch, N new tokens, H query heads, G KV heads, S heads of the state, d and e key
and value widths, f features, c columns of the state, Q rows of the ring.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor

from reattend.kernels.linear_attention.reference import linear_attention, with_ones
from reattend.mixers.features import mapped
from reattend.mixers.linear_config import FeatureMapName, WindowForm
from reattend.mixers.linear_rows import absorbed
from reattend.mixers.linear_window import first_visible, shifted_exp


@torch.library.custom_op(
    "reattend::held_linear_attention",
    mutates_args=(),
    schema="(Tensor q_BHNf, Tensor k_BSNf, Tensor v_BSNc, Tensor decay_BSN, Tensor past_state, *,"
    " bool decays) -> (Tensor, Tensor)",
)
def held_linear_attention(
    q_BHNf: Tensor,
    k_BSNf: Tensor,
    v_BSNc: Tensor,
    decay_BSN: Tensor,
    past_state: Tensor,
    *,
    decays: bool,
) -> tuple[Tensor, Tensor]:
    """`reattend::linear_attention` of every key up to the query's own, nothing divided.

    `decays`: whether `decay_BSN`, or [B, S, N, f] of each feature, may be other than 0.
    """
    return linear_attention(q_BHNf, k_BSNf, v_BSNc, decay_BSN, past_state)


@held_linear_attention.register_fake
def _fake_held(
    q: Tensor, k: Tensor, v: Tensor, decay: Tensor, past_state: Tensor, *, decays: bool
) -> tuple[Tensor, Tensor]:
    return q.new_empty(*q.shape[:3], v.shape[3]), past_state.new_empty(past_state.shape)


@torch.library.custom_op(
    "reattend::window_linear_attention",
    mutates_args=(),
    schema="(Tensor q_BHNd, Tensor features_BHNf, Tensor k_BGNd, Tensor v_BGNe, Tensor past_key,"
    " Tensor past_value, Tensor past_state, Tensor mix_H, Tensor weight, Tensor bias,"
    " Tensor decay_S, Tensor kv_start_B, Tensor kv_len_B, *, float scale, int window,"
    " bool terraced, str feature_map, bool decays) -> (Tensor, Tensor, Tensor, Tensor)",
)
def window_linear_attention(
    q_BHNd: Tensor,
    features_BHNf: Tensor,
    k_BGNd: Tensor,
    v_BGNe: Tensor,
    past_key: Tensor,
    past_value: Tensor,
    past_state: Tensor,
    mix_H: Tensor,
    weight: Tensor,
    bias: Tensor,
    decay_S: Tensor,
    kv_start_B: Tensor,
    kv_len_B: Tensor,
    *,
    scale: float,
    window: int,
    terraced: bool,
    feature_map: str,
    decays: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Softmax over a window, and a state of what is older: N tokens are N steps of one.

    A step moves what leaves the window into the state, writes the token's row, then looks at both.

    Args:
        q_BHNd, k_BGNd, v_BGNe: of the new tokens.
        features_BHNf: of the queries.
        past_key, past_value: [B, G, Q, d or e], Q one more than a window's rows: token t of the
            batch, padding counted, at t mod Q.
        past_state: [B, S, f, e + 1].
        mix_H: weight of the window.
        weight, bias: of the keys' feature map, where it has them.
        decay_S: logarithm of what a token leaves of the state.
        kv_start_B, kv_len_B: padding on the left, and tokens so far, the same in every row.
        scale: of the scores.
        window, terraced, feature_map: see `LinearConfig`.
        decays: whether `decay_S` may be other than 0.

    Returns:
        Sums and, in the last column, what to divide by [B, H, N, e + 1]; the three states after.
    """
    keys, values, state = past_key.clone(), past_value.clone(), past_state
    form: WindowForm = "terraced" if terraced else "sliding"
    groups, heads, ring = k_BGNd.shape[1], past_state.shape[1], past_key.shape[2]
    slot, decay = torch.arange(ring), tuple(decay_S.tolist()) if decays else ()
    found = []
    for index in range(q_BHNd.shape[2]):
        now = int(kv_len_B[0]) - q_BHNd.shape[2] + index
        count_B = (now + 1 - kv_start_B.long()).clamp_min(0)
        first_B = first_visible(count_B, window, form)
        before_B = first_visible((count_B - 1).clamp_min(0), window, form)
        # rows in order of time, from the first that is not in the state yet
        time = now - 1 - (now - 1 - slot) % ring
        at = (time - kv_start_B.long()[:, None] - before_B[:, None]) % (ring + now + 1)
        order = at.argsort(-1)[:, None, :, None]
        rows, columns = (
            x.gather(2, order.expand(-1, groups, -1, x.shape[3])) for x in (keys, values)
        )
        each = heads // groups
        made = mapped(
            cast("FeatureMapName", feature_map), rows.repeat_interleave(each, 1), weight, bias
        )
        given = with_ones(columns).repeat_interleave(each, 1)
        state = absorbed(state, made, given, first_B - before_B, decay)
        keys[:, :, now % ring], values[:, :, now % ring] = k_BGNd[:, :, index], v_BGNe[:, :, index]
        place = now - (now - slot) % ring - kv_start_B.long()[:, None]
        seen = (place >= first_B[:, None]) | (count_B[:, None] == 0)  # padding stays finite
        scores = q_BHNd[:, :, index].unflatten(1, (groups, -1)) @ keys.transpose(-1, -2) * scale
        near = shifted_exp(scores.masked_fill(~seen[:, None, None], float("-inf")))
        y = (near @ with_ones(values)).flatten(1, 2) * mix_H[:, None]
        older = (features_BHNf[:, :, index].unflatten(1, (heads, -1)) @ state).flatten(1, 2)
        if decays:
            left = ((count_B - first_B)[:, None] * decay_S).exp()
            older = older * left.repeat_interleave(older.shape[1] // heads, 1)[..., None]
        found.append(y + older)
    return torch.stack(found, 2), keys, values, state


@window_linear_attention.register_fake
def _fake_window(
    q: Tensor, features: Tensor, k: Tensor, v: Tensor, past_key: Tensor, past_value: Tensor,
    past_state: Tensor, mix: Tensor, weight: Tensor, bias: Tensor, decay: Tensor, start: Tensor,
    length: Tensor, *, scale: float, window: int, terraced: bool, feature_map: str, decays: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    rings = past_key.new_empty(past_key.shape), past_value.new_empty(past_value.shape)
    y = q.new_empty(*q.shape[:3], v.shape[3] + 1)
    return y, *rings, past_state.new_empty(past_state.shape)
