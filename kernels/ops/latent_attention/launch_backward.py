"""Choice and launch of the Triton kernels of the gradient of `reattend::latent_attention`."""

from __future__ import annotations

import torch
from torch import Tensor

from reattend.kernels.configs import WHOLE, KernelConfig, find_config
from reattend.kernels.core import Rule
from reattend.kernels.latent_attention.launch import MAX_ROPE
from reattend.kernels.latent_attention.triton_dkv import latent_dkv
from reattend.kernels.latent_attention.triton_dq import latent_dq
from reattend.kernels.launching import (
    device_target,
    next_power_of_two,
    on_device,
    rule_options,
    unit_stride,
)
from reattend.kernels.triton_gradient import prepared

MAX_PAIRS = 1 << 30  # of heads and rows of a cache: their product is counted in 32 bits
MIN_SCALE = 2.0**-15  # below this a probability divided by the scale is no number of fp16
PROGRAMS = 4  # of the cache's gradient, per multiprocessor: the first keys are seen by the most
MAX_PARTS = 16

Configs = tuple[KernelConfig, KernelConfig]
Inputs = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


def configs_for(q_nope_BHNr: Tensor, rope_BMR: Tensor) -> Configs | None:
    """The shipped configurations of both kernels, or None: then torch computes the gradient."""
    target, size = device_target(q_nope_BHNr.device), q_nope_BHNr.element_size()
    if target is None or rope_BMR.shape[2] > MAX_ROPE:
        return None
    _, h, n, r = q_nope_BHNr.shape
    for_q = find_config(target.name, "latent_dq", r, size)
    for_kv = find_config(target.name, "latent_dkv", r, size)
    fits = h * max(n, rope_BMR.shape[1]) < MAX_PAIRS
    return None if for_q is None or for_kv is None or not fits else (for_q, for_kv)


def count_parts(device: torch.device, programs: int, tiles: int) -> int:
    """How many programs share the pairs of a tile of the cache, from sizes the host knows.

    Args:
        device: where the kernel runs.
        programs: programs when none share.
        tiles: tiles of pairs that one of them walks at most.
    """
    if device.type != "cuda":
        return 1
    wanted = PROGRAMS * torch.cuda.get_device_properties(device).multi_processor_count
    return max(1, min(-(-wanted // programs), tiles, MAX_PARTS))


def launch_backward(
    grads: tuple[Tensor, Tensor],
    outputs: tuple[Tensor, Tensor],
    inputs: Inputs,
    rule: Rule,
    configs: Configs,
    splits: int | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q_nope, q_rope, latent and rope. A query with lse = -inf takes part in none.

    Args:
        grads: of u_BHNr and lse_BHN.
        outputs: u_BHNr and lse_BHN.
        inputs: q_nope, q_rope, latent, rope, kv_start and kv_len; the cache has no pages.
        rule: scale (at least `MIN_SCALE`), causality, window, softcap.
        configs: tile sizes of the kernel for queries and of the one for the cache.
        splits: how many programs share a tile of the cache; by the device when None.
    """
    q, w, latent, rope = (unit_stride(t) for t in inputs[:4])
    (b, h, n, r), m, rope_width = q.shape, latent.shape[1], w.shape[3]
    dq, dw = (torch.empty_like(t, memory_format=torch.contiguous_format) for t in (q, w))
    if q.numel() == 0 or latent.numel() == 0:
        return dq.zero_(), dw.zero_(), torch.zeros_like(latent), torch.zeros_like(rope)
    programs = -(-m // configs[1].keys) * b
    if splits is None:
        splits = count_parts(q.device, programs, -(-h * n // configs[1].rows))
    dtype = latent.dtype if splits == 1 else torch.float32
    d_latent, d_rope = (latent.new_empty(splits, *t.shape, dtype=dtype) for t in (latent, rope))
    if rope_width == 0:  # an empty tensor has no address to pass; the kernels never read it
        w, rope = q, latent
    du = grads[0].to(q.dtype).contiguous()
    given = (q, w, latent, rope, du, *prepared((du, grads[1]), outputs))
    # fmt: off
    rest = (
        inputs[4].contiguous(), inputs[5].contiguous(), rule.scale, rule.softcap,
        rule.sliding_window, h, n, m, *q.stride()[:3], *w.stride()[:3], *latent.stride()[:2],
        *rope.stride()[:2],
    )
    # fmt: on
    widths = {"RANK": r, "ROPE": rope_width, "BLOCK_RANK": next_power_of_two(r)}
    widths |= {"BLOCK_ROPE": next_power_of_two(rope_width)}
    options_q, options_kv = (rule_options(rule, c, q) | widths for c in configs)
    options_q |= {"SPREAD": configs[0].spread, "SLICE": configs[0].slice or WHOLE}
    options_kv |= {"SPREAD": configs[1].spread_keys, "SLICE": configs[1].slice or WHOLE}
    with on_device(q):
        latent_dq[(-(-h * n // configs[0].rows) * b,)](*given, dq, dw, *rest, **options_q)
        latent_dkv[(programs * splits,)](
            *given, d_latent, d_rope, *rest, splits, b * m, **options_kv
        )
    if splits == 1:
        return dq, dw, d_latent[0], d_rope[0]
    return dq, dw, d_latent.sum(0).to(latent.dtype), d_rope.sum(0).to(latent.dtype)
