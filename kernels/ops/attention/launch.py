"""Choice and launch of the Triton kernels of `reattend::attention`."""

from __future__ import annotations

from torch import Tensor

from reattend.kernels.attention.triton_kernel import attention_decode, attention_prefill
from reattend.kernels.configs import DECODE_QUERIES, KernelConfig, find_config
from reattend.kernels.core import Rule
from reattend.kernels.launching import (
    common_options,
    count_splits,
    device_target,
    merge,
    next_power_of_two,
    on_device,
    outputs,
    unit_stride,
)

L2_BYTES = 24_000_000  # of the cache of the devices listed, what keys may count on


def config_for(q_BHNd: Tensor, v_BGMe: Tensor) -> KernelConfig | None:
    """The shipped configuration for these tensors, or None: then torch computes the op."""
    target = device_target(q_BHNd.device)
    if target is None or q_BHNd.element_size() not in (2, 4):
        return None
    kernel = "attention_decode" if q_BHNd.shape[2] <= DECODE_QUERIES else "attention_prefill"
    width = max(q_BHNd.shape[3], v_BGMe.shape[3])
    return find_config(target.name, kernel, width, q_BHNd.element_size())


def heads_together(heads: int, group: int, bytes_per_group: int) -> int:
    """How many heads prefill side by side: whole groups whose keys and values stay in L2.

    Args:
        heads: query heads.
        group: query heads per KV head.
        bytes_per_group: keys and values of one KV head of one row of the batch.
    """
    fitting = max(L2_BYTES // max(bytes_per_group, 1), 1)
    groups = heads // group
    return group * max(n for n in range(1, groups + 1) if groups % n == 0 and n <= fitting)


def launch(
    q_BHNd: Tensor,
    k_BGMd: Tensor,
    v_BGMe: Tensor,
    kv_start_B: Tensor,
    kv_len_B: Tensor,
    block_table_BP: Tensor | None,
    rule: Rule,
    config: KernelConfig,
    *,
    decode: bool | None = None,
    splits: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Run the prefill or decode kernel.

    Args:
        q_BHNd: queries, and so on as in `reference.attention`.
        k_BGMd: keys.
        v_BGMe: values.
        kv_start_B: first valid key.
        kv_len_B: one past the last valid key.
        block_table_BP: pages, or None.
        rule: scale, causality, window, softcap.
        config: tile sizes.
        decode: which kernel; by the number of queries when None.
        splits: how many programs share the keys of a row in decode; by the device when None.

    Returns:
        ``y_BHNe`` and ``lse_BHN`` (fp32).
    """
    q, k, v = unit_stride(q_BHNd), unit_stride(k_BGMd), unit_stride(v_BGMe)
    b, h, n, d = q.shape
    groups, rows, e = k.shape[1], k.shape[2], v.shape[3]
    paged = block_table_BP is not None
    capacity = block_table_BP.shape[1] * rows if block_table_BP is not None else rows
    table = block_table_BP if block_table_BP is not None else kv_start_B
    decode = n <= DECODE_QUERIES if decode is None else decode
    group = h // groups
    if decode:
        programs = -(-group * n // config.rows) * groups * b
        splits = count_splits(q.device, programs, capacity, config) if splits is None else splits
    else:
        programs, splits = -(-n // config.rows) * h * b, 1
    y, lse, part, part_lse = outputs((b, h, n, e), splits, q)
    if y.numel() == 0:
        return y, lse
    # fmt: off
    args = (
        q, k, v, part, part_lse, kv_start_B.contiguous(), kv_len_B.contiguous(), table,
        rule.scale, rule.softcap, rule.sliding_window, h, group, n, capacity, rows,
        *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], table.stride(0),
    )
    # fmt: on
    options = common_options(rule, config, paged, q)
    options |= {"D": d, "E": e, "BLOCK_D": next_power_of_two(d), "BLOCK_E": next_power_of_two(e)}
    with on_device(q):
        if not decode:
            together = heads_together(h, group, capacity * (d + e) * q.element_size())
            attention_prefill[(programs,)](*args, together, **options)
            return y, lse
        attention_decode[(programs * splits,)](*args, b * h * n, splits, **options)
        if splits > 1:
            merge(part, part_lse, y, lse)
    return y, lse
