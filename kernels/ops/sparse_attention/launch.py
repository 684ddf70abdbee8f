"""Choice and launch of the Triton kernels of `reattend::sparse_attention`."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from reattend.kernels.configs import DECODE_QUERIES, KernelConfig, find_config
from reattend.kernels.core import Rule
from reattend.kernels.launching import (
    count_splits,
    device_target,
    merge,
    next_power_of_two,
    on_device,
    outputs,
    tile_options,
    unit_stride,
)
from reattend.kernels.sparse_attention.blocked import Inputs
from reattend.kernels.sparse_attention.mask import entry_rows
from reattend.kernels.sparse_attention.triton_backward import sparse_dkv, sparse_dq
from reattend.kernels.sparse_attention.triton_kernel import sparse_decode, sparse_prefill
from reattend.kernels.triton_gradient import prepared


def config_for(x: Inputs, kernel: str) -> KernelConfig | None:
    """The shipped configuration for these tensors, or None: then torch computes the op.

    Args:
        x: arguments of the op.
        kernel: ``forward``, ``dq`` or ``dkv``.
    """
    target, size = device_target(x.q_BHNd.device), x.q_BHNd.element_size()
    if target is None or size not in (2, 4):
        return None
    if kernel == "forward":
        kernel = "decode" if x.q_BHNd.shape[2] <= DECODE_QUERIES else "prefill"
    width = max(x.q_BHNd.shape[3], x.v_BGMe.shape[3])
    return find_config(target.name, f"sparse_{kernel}", width, size)


def _options(x: Inputs, rule: Rule, config: KernelConfig, decode: bool = False) -> dict[str, Any]:
    """Tiles never exceed a block; those of decode hold rows of many blocks."""
    rows = config.rows if decode else min(config.rows, x.block)
    config = replace(config, rows=rows, keys=min(config.keys, x.block))
    d, e = x.q_BHNd.shape[3], x.v_BGMe.shape[3]
    return tile_options(rule.softcap, config, x.q_BHNd) | {
        "BLOCK": x.block,
        "D": d,
        "E": e,
        "BLOCK_D": next_power_of_two(d),
        "BLOCK_E": next_power_of_two(e),
    }


def _query_programs(x: Inputs, rows: int) -> int:
    """Programs of a grid over queries: N of them touch so many blocks, wherever they begin."""
    b, h, n, _ = x.q_BHNd.shape
    return ((n + x.block - 2) // x.block + 1) * (x.block // rows) * h * b


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
        rule: scale and softcap.
        config: tile sizes.
        decode: which kernel; by the number of queries when None.
        splits: how many programs share the entries of a row in decode; by the device when None.

    Returns:
        ``y_BHNe`` and ``lse_BHN`` (fp32).
    """
    q, k, v = (unit_stride(t) for t in (x.q_BHNd, x.k_BGMd, x.v_BGMe))
    (b, h, n, _), groups, e = q.shape, k.shape[1], v.shape[3]
    decode = n <= DECODE_QUERIES if decode is None else decode
    options = _options(x, rule, config, decode)
    group, blocks = h // groups, x.layout[0].shape[1] - 1
    programs = -(-group * n // config.rows) * groups * b
    if not decode:
        splits = 1
    elif splits is None:
        # entries of a row, on average: the host knows no more without waiting
        entries = -(-x.layout[1].shape[0] // (blocks * x.layout[0].shape[0]))
        splits = count_splits(q.device, programs, entries * x.block, config)
    y, lse, part, part_lse = outputs((b, h, n, e), splits, q)
    if y.numel() == 0:
        return y, lse
    # fmt: off
    args = (
        q, k, v, part, part_lse, *(t.contiguous() for t in (*x.layout, *x.rows)), rule.scale,
        rule.softcap, h, group, n, k.shape[2], blocks, x.first, *q.stride()[:3], *k.stride()[:3],
        *v.stride()[:3],
    )
    # fmt: on
    with on_device(q):
        if not decode:
            y.zero_()  # queries in padding are of no program
            lse.fill_(float("-inf"))
            sparse_prefill[(_query_programs(x, options["BLOCK_ROWS"]),)](*args, **options)
            return y, lse
        sparse_decode[(programs * splits,)](*args, b * h * n, splits, **options)
        if splits > 1:
            merge(part, part_lse, y, lse)
    return y, lse


def by_column(row_ptr: Tensor, col: Tensor, columns: int) -> tuple[Tensor, Tensor, Tensor]:
    """The entries of a layout sorted by column, without waiting for the device.

    Returns:
        Where each (layout, column) begins, with one column more per layout for what lies beyond
        and one number more at the end; the row of each entry; its number in the layout.
    """
    layouts, blocks = row_ptr.shape[0], row_ptr.shape[1] - 1
    row = entry_rows(row_ptr, col.shape[0])
    place = row // blocks * (columns + 1) + col.clamp(max=columns)
    place, order = torch.sort(place, stable=True)
    every = torch.arange(layouts * (columns + 1) + 1, device=col.device)
    begins = torch.searchsorted(place, every)
    return begins.int(), (row % blocks)[order].int(), order


def launch_backward(
    grads: tuple[Tensor, Tensor],
    outputs: tuple[Tensor, Tensor],
    x: Inputs,
    rule: Rule,
    configs: tuple[KernelConfig, KernelConfig],
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v.

    Args:
        grads: of y_BHNe and lse_BHN.
        outputs: y_BHNe and lse_BHN.
        x: arguments of the op.
        rule: scale and softcap.
        configs: tile sizes of the kernel for q and of the one for k and v.
    """
    x = x.contiguous()
    q, k, v = x.q_BHNd, x.k_BGMd, x.v_BGMe
    (b, h, n, _), (groups, m) = q.shape, k.shape[1:3]
    dq, dk, dv = (torch.zeros_like(t) for t in (q, k, v))
    dy = grads[0].to(q.dtype).contiguous()
    given = (q, k, v, dy, *prepared((dy, grads[1]), outputs))
    row_ptr, col, tile, tiles, head_layout = (t.contiguous() for t in x.layout)
    rows = tuple(t.contiguous() for t in x.rows)
    columns = -(-m // x.block)
    if q.numel() == 0 or columns == 0:
        return dq, dk, dv
    begins, row, order = by_column(row_ptr, col, columns)
    scalars = (rule.scale, rule.softcap, h, h // groups, n, m)
    options_q, options_kv = (_options(x, rule, config) for config in configs)
    # fmt: off
    with on_device(q):
        sparse_dq[(_query_programs(x, options_q["BLOCK_ROWS"]),)](
            *given, dq, row_ptr, col, tile, tiles, head_layout, *rows, *scalars,
            row_ptr.shape[1] - 1, x.first, **options_q,
        )
        sparse_dkv[(columns * (x.block // options_kv["BLOCK_KEYS"]) * groups * b,)](
            *given, dk, dv, begins, row, tile[order], tiles, head_layout, *rows, *scalars, columns,
            x.first, **options_kv,
        )
    # fmt: on
    return dq, dk, dv
