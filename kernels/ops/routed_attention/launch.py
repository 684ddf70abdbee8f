"""Choice and launch of the Triton kernels of `reattend::routed_attention`."""

from __future__ import annotations

import torch
from torch import Tensor

from reattend.kernels.attention import launch_backward as gradient
from reattend.kernels.configs import DECODE_QUERIES, KernelConfig, find_config
from reattend.kernels.core import Rule
from reattend.kernels.launching import (
    count_splits,
    device_target,
    merge,
    next_power_of_two,
    on_device,
    outputs,
    rule_options,
    unit_stride,
)
from reattend.kernels.routed_attention.reference import Inputs
from reattend.kernels.routed_attention.triton_kernel import routed_decode, routed_prefill
from reattend.kernels.routed_attention.triton_rows import list_rows

LISTED = 1024  # queries that are listed at once


def config_for(x: Inputs) -> KernelConfig | None:
    """The shipped configuration for these tensors, or None: then torch computes the op."""
    target, size = device_target(x.q_BHNd.device), x.q_BHNd.element_size()
    if target is None or size not in (2, 4):
        return None
    kernel = "routed_decode" if x.q_BHNd.shape[2] <= DECODE_QUERIES else "routed_prefill"
    width = max(x.q_BHNd.shape[3], x.v_BGMe.shape[3])
    return find_config(target.name, kernel, width, size)


def listed(active_BUN: Tensor) -> tuple[Tensor, Tensor]:
    """The queries of each unit, first those that use it, and how many come before each of them.

    Shapes do not depend on values, so the host does not wait for the device.
    """
    b, units, n = active_BUN.shape
    rows = active_BUN.new_empty(b, units, n, dtype=torch.int32)
    preceding = active_BUN.new_empty(b, units, n + 1, dtype=torch.int32)
    block, users = min(LISTED, next_power_of_two(n)), _bytes(active_BUN)
    if rows.numel():
        with on_device(active_BUN):
            list_rows[(b * units,)](users, rows, preceding, n, BLOCK_ROWS=block, num_warps=4)
    return rows, preceding


def _bytes(active_BUN: Tensor) -> Tensor:
    """The same memory as numbers."""
    return active_BUN.contiguous().view(torch.int8)


def launch(
    x: Inputs,
    rule: Rule,
    config: KernelConfig,
    *,
    decode: bool | None = None,
    splits: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Run the prefill or decode kernel.

    Args:
        x: arguments of the op.
        rule: scale, causality, window, softcap.
        config: tile sizes.
        decode: which kernel; by the number of queries when None.
        splits: how many programs share the keys of a row in decode; by the device when None.

    Returns:
        ``y_BHNe`` and ``lse_BHN`` (fp32).
    """
    q, k, v = (unit_stride(t) for t in x[:3])
    (b, h, n, d), (groups, m), e = q.shape, k.shape[1:3], v.shape[3]
    group, units = h // groups, x.active_BUN.shape[1]
    decode = n <= DECODE_QUERIES if decode is None else decode
    if decode:
        programs = -(-group * n // config.rows) * groups * b
        splits = count_splits(q.device, programs, m, config) if splits is None else splits
    else:
        programs, splits = -(-n // config.rows) * h * b, 1
    y, lse, part, part_lse = outputs((b, h, n, e), splits, q)
    if y.numel() == 0:
        return y, lse
    # fmt: off
    rest = (
        x.kv_start_B.contiguous(), x.kv_len_B.contiguous(), rule.scale, rule.softcap,
        rule.sliding_window, h, group, units, n, m, *q.stride()[:3], *k.stride()[:3],
        *v.stride()[:3],
    )
    # fmt: on
    options = rule_options(rule, config, q)
    options |= {"D": d, "E": e, "BLOCK_D": next_power_of_two(d), "BLOCK_E": next_power_of_two(e)}
    with on_device(q):
        if not decode:
            routed_prefill[(programs,)](q, k, v, y, lse, *listed(x.active_BUN), *rest, **options)
            return y, lse
        routed_decode[(programs * splits,)](
            q, k, v, part, part_lse, _bytes(x.active_BUN), *rest, b * h * n, splits, **options
        )
        if splits > 1:
            merge(part, part_lse, y, lse)
    return y, lse


def configs_for(x: Inputs) -> gradient.Configs | None:
    """The configurations of attention's gradient, or None: then torch computes it."""
    return gradient.configs_for(x.q_BHNd, x.v_BGMe, "routed")


def launch_backward(
    grads: tuple[Tensor, Tensor],
    outputs: tuple[Tensor, Tensor],
    x: Inputs,
    rule: Rule,
    configs: gradient.Configs,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v by the kernels of `attention`, over the queries that use a head.

    Args:
        grads: of y_BHNe and lse_BHN.
        outputs: y_BHNe and lse_BHN.
        x: arguments of the op.
        rule: scale, causality, window, softcap.
        configs: tile sizes of the kernel for q and of the one for k and v.
    """
    given, lists = (*x[:3], x.kv_start_B, x.kv_len_B), listed(x.active_BUN)
    return gradient.launch_backward(grads, outputs, given, rule, configs, lists)
