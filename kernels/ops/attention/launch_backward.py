"""Choice and launch of the Triton kernels of the gradient of `reattend::attention`."""

from __future__ import annotations

import torch
from torch import Tensor

from reattend.kernels.attention.launch import heads_together
from reattend.kernels.attention.triton_dkv import attention_dkv
from reattend.kernels.attention.triton_dq import attention_dq
from reattend.kernels.configs import KernelConfig, find_config
from reattend.kernels.core import Rule
from reattend.kernels.launching import (
    device_target,
    next_power_of_two,
    on_device,
    rule_options,
    unit_stride,
)
from reattend.kernels.triton_gradient import prepared

Configs = tuple[KernelConfig, KernelConfig]


def configs_for(q_BHNd: Tensor, v_BGMe: Tensor, family: str = "attention") -> Configs | None:
    """The shipped configurations of both kernels, or None: then torch computes the gradient.

    Args:
        q_BHNd: queries.
        v_BGMe: values.
        family: `attention`, or `routed` where the kernels walk lists of queries.
    """
    target, size = device_target(q_BHNd.device), q_BHNd.element_size()
    if target is None or size not in (2, 4):
        return None
    width = max(q_BHNd.shape[3], v_BGMe.shape[3])
    for_q = find_config(target.name, f"{family}_dq", width, size)
    for_kv = find_config(target.name, f"{family}_dkv", width, size)
    return None if for_q is None or for_kv is None else (for_q, for_kv)


def launch_backward(
    grads: tuple[Tensor, Tensor],
    outputs: tuple[Tensor, Tensor],
    inputs: tuple[Tensor, Tensor, Tensor, Tensor, Tensor],
    rule: Rule,
    configs: Configs,
    lists: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v. A query with lse = -inf takes part in none.

    Args:
        grads: of y_BHNe and lse_BHN.
        outputs: y_BHNe and lse_BHN.
        inputs: q, k, v, kv_start and kv_len; the cache has no pages.
        rule: scale, causality, window, softcap.
        configs: tile sizes of the kernel for q and of the one for k and v.
        lists: of routed heads, the queries of each unit (B, U, N) and how many come before each.
    """
    q, k, v = (unit_stride(t) for t in inputs[:3])
    (b, h, n, d), (groups, m), e = q.shape, k.shape[1:3], v.shape[3]
    dq, dk, dv = (torch.empty_like(t, memory_format=torch.contiguous_format) for t in (q, k, v))
    if q.numel() == 0 or k.numel() == 0:
        return dq.zero_(), dk.zero_(), dv.zero_()
    dy = grads[0].to(q.dtype).contiguous()
    given = (q, k, v, dy, *prepared((dy, grads[1]), outputs))
    start, length = inputs[3].contiguous(), inputs[4].contiguous()
    rows, preceding = lists or (start, start)
    # fmt: off
    rest = (
        rows, preceding, start, length, rule.scale, rule.softcap, rule.sliding_window, h,
        h // groups, rows.shape[1] if lists else 1, n, m, *q.stride()[:3], *k.stride()[:3],
        *v.stride()[:3],
    )
    # fmt: on
    widths = {"D": d, "E": e, "BLOCK_D": next_power_of_two(d), "BLOCK_E": next_power_of_two(e)}
    widths |= {"ROUTED": lists is not None}
    options_q, options_kv = (rule_options(rule, c, q) | widths for c in configs)
    together = heads_together(h, h // groups, m * (d + e) * q.element_size())
    with on_device(q):
        attention_dq[(-(-n // configs[0].rows) * h * b,)](*given, dq, *rest, together, **options_q)
        attention_dkv[(-(-m // configs[1].keys) * groups * b,)](*given, dk, dv, *rest, **options_kv)
    return dq, dk, dv
