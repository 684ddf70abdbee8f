"""The normal forms: the few operations every spelling of attention is rewritten to.

They are ordinary Python functions used as graph targets, so a normalised graph still runs.
"""

from __future__ import annotations

from typing import TypeGuard

import torch
from torch import Tensor, fx

from reattend.passes.evaluate import parameter_only

aten = torch.ops.aten


def rms_norm(x: Tensor, gain: Tensor | None, eps: float) -> Tensor:
    """x / sqrt(mean(x^2, -1) + eps) * gain, in at least float32."""
    wide = x if x.dtype == torch.float64 else x.float()
    y = (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)).to(x.dtype)
    return y if gain is None else y * gain


def attention(
    q_BHNd: Tensor,
    k_BHMd: Tensor,
    v_BHMe: Tensor,
    mask: Tensor | None,
    scale: float,
    softcap: float,
    is_causal: bool,
    sinks: Tensor | None,
) -> Tensor:
    """softmax(softcap(q k^T scale) + mask) v, heads already repeated; `mask` bool or additive.

    `sinks` are per-head logits that take part in the softmax and carry no value (gpt-oss).
    """
    scores = torch.matmul(q_BHNd, k_BHMd.transpose(-1, -2)) * scale
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    if is_causal:
        n, m = scores.shape[-2:]
        visible = torch.ones(n, m, dtype=torch.bool, device=scores.device).tril()
        scores = scores.masked_fill(~visible, float("-inf"))
    if mask is not None:
        if mask.dtype == torch.bool:
            scores = scores.masked_fill(~mask, float("-inf"))
        else:
            scores = scores + mask
    if sinks is not None:
        column = sinks.reshape(1, -1, 1, 1).expand(*scores.shape[:3], 1).to(scores.dtype)
        probs = torch.softmax(torch.cat([scores, column], -1), -1)[..., :-1]
    else:
        probs = torch.softmax(scores, -1)
    return torch.matmul(torch.nan_to_num(probs, nan=0.0).to(v_BHMe.dtype), v_BHMe)


def is_op(node: object, *targets: object) -> TypeGuard[fx.Node]:
    """Whether `node` calls one of these operators (a packet matches all its overloads)."""
    if not isinstance(node, fx.Node) or node.op != "call_function":
        return False
    packet = getattr(node.target, "overloadpacket", None)
    return node.target in targets or (packet is not None and packet in targets)


def is_projection(node: fx.Node) -> bool:
    """A linear layer whose weight does not depend on an input."""
    return is_op(node, aten.linear) and parameter_only(node.args[1])
