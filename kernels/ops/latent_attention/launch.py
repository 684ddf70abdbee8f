"""Choice and launch of the Triton kernels of `reattend::latent_attention`."""

from __future__ import annotations

from torch import Tensor

from reattend.kernels.configs import (
    DECODE_QUERIES,
    TALL_ROWS,
    WIDE_ROWS,
    KernelConfig,
    find_config,
)
from reattend.kernels.core import Rule
from reattend.kernels.latent_attention.triton_kernel import latent_decode, latent_prefill
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

MAX_ROPE = 64  # widest rotary part the shipped tiles were compiled for


def config_for(q_nope_BHNr: Tensor, q_rope_BHNR: Tensor) -> KernelConfig | None:
    """The shipped configuration for these tensors, or None: then torch computes the op."""
    target = device_target(q_nope_BHNr.device)
    size = q_nope_BHNr.element_size()
    if target is None or size not in (2, 4) or q_rope_BHNR.shape[3] > MAX_ROPE:
        return None
    _, h, n, r = q_nope_BHNr.shape
    if n > DECODE_QUERIES:
        return find_config(target.name, "latent_prefill", r, size)
    names = ["latent_decode"]
    names += ["latent_decode_wide"] * (h * n > WIDE_ROWS)
    names += ["latent_decode_tall"] * (h * n > TALL_ROWS)
    found = (find_config(target.name, name, r, size) for name in reversed(names))
    return next((config for config in found if config is not None), None)


def launch(
    q_nope_BHNr: Tensor,
    q_rope_BHNR: Tensor,
    latent_BMr: Tensor,
    rope_BMR: Tensor,
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
        q_nope_BHNr: absorbed queries, and so on as in `reference.latent_attention`.
        q_rope_BHNR: rotated queries.
        latent_BMr: latent rows.
        rope_BMR: rotated shared keys.
        kv_start_B: first valid row.
        kv_len_B: one past the last valid row.
        block_table_BP: pages, or None.
        rule: scale, causality, window, softcap.
        config: tile sizes.
        decode: which kernel; by the number of queries when None.
        splits: how many programs share the rows of a sequence in decode; by the device when None.

    Returns:
        ``u_BHNr`` and ``lse_BHN`` (fp32).
    """
    q, w = unit_stride(q_nope_BHNr), unit_stride(q_rope_BHNR)
    latent, rope = unit_stride(latent_BMr), unit_stride(rope_BMR)
    b, h, n, r = q.shape
    rows, rope_width = latent.shape[1], w.shape[3]
    paged = block_table_BP is not None
    capacity = block_table_BP.shape[1] * rows if block_table_BP is not None else rows
    table = block_table_BP if block_table_BP is not None else kv_start_B
    if rope_width == 0:  # an empty tensor has no address to pass; the kernel never reads it
        w, rope = q, latent
    decode = n <= DECODE_QUERIES if decode is None else decode
    programs = -(-h * n // config.rows) * b
    if not decode:
        splits = 1
    elif splits is None:
        splits = count_splits(q.device, programs, capacity, config)
    u, lse, part, part_lse = outputs((b, h, n, r), splits, q)
    if u.numel() == 0:
        return u, lse
    # fmt: off
    args = (
        q, w, latent, rope, part, part_lse, kv_start_B.contiguous(), kv_len_B.contiguous(), table,
        rule.scale, rule.softcap, rule.sliding_window, h, n, capacity, rows,
        *q.stride()[:3], *w.stride()[:3], *latent.stride()[:2], *rope.stride()[:2],
        table.stride(0),
    )
    # fmt: on
    options = common_options(rule, config, paged, q)
    options |= {"RANK": r, "ROPE": rope_width, "SPREAD": config.spread}
    options |= {
        "BLOCK_RANK": next_power_of_two(r),
        "BLOCK_ROPE": next_power_of_two(rope_width),
    }
    with on_device(q):
        if not decode:
            latent_prefill[(programs,)](*args, **options)
            return u, lse
        latent_decode[(programs * splits,)](*args, b * h * n, splits, **options)
        if splits > 1:
            merge(part, part_lse, u, lse)
    return u, lse
