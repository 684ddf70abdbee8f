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
Gradients = tuple[Tensor, Tensor, Tensor, Tensor]
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
) -> Gradients:
    """Gradients of q_nope, q_rope, latent and rope. A query with lse = -inf takes part in none.

    Args:
        grads: of u_BHNr and lse_BHN.
        outputs: u_BHNr and lse_BHN.
        inputs: q_nope, q_rope, latent, rope, kv_start and kv_len; the cache has no pages.
        rule: scale (at least `MIN_SCALE`), causality, window, softcap.
        configs: tile sizes of the kernel for queries and of the one for the cache.
        splits: how many programs share a tile of the cache; by the device when None.
    """
    dq, dw, latents, ropes = launch_parts(grads, outputs, inputs, rule, configs, splits)
    if latents.shape[0] == 1:
        return dq, dw, latents[0], ropes[0]
    dtype = inputs[2].dtype
    return dq, dw, latents.sum(0).to(dtype), ropes.sum(0).to(dtype)


def launch_parts(
    grads: tuple[Tensor, Tensor],
    outputs: tuple[Tensor, Tensor],
    inputs: Inputs,
    rule: Rule,
    configs: Configs,
    splits: int | None = None,
    kept: Tensor | None = None,
) -> Gradients:
    """`launch_backward`, those of the cache in parts [splits, ...]: several are fp32.

    Args:
        kept: [2, B, N, H, M] in the inputs' dtype, where probabilities and their gradients go, so
            that they are computed once; None: twice.
    """
    q, w, latent, rope = (unit_stride(t) for t in inputs[:4])
    (b, h, n, r), m, rope_width = q.shape, latent.shape[1], w.shape[3]
    dq, dw = (torch.empty_like(t, memory_format=torch.contiguous_format) for t in (q, w))
    if q.numel() == 0 or latent.numel() == 0:
        return dq.zero_(), dw.zero_(), torch.zeros_like(latent)[None], torch.zeros_like(rope)[None]
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
    halves = (None, None) if kept is None else (kept[0], kept[1])
    options_q |= {"SPREAD": configs[0].spread, "SLICE": configs[0].slice or WHOLE}
    options_kv |= {
        "SPREAD": configs[1].spread_keys,
        "SLICE": configs[1].slice or WHOLE,
    }
    with on_device(q):
        latent_dq[(-(-h * n // configs[0].rows) * b,)](*given, dq, dw, *halves, *rest, **options_q)
        latent_dkv[(programs * splits,)](
            *given, d_latent, d_rope, *halves, *rest, splits, b * m, **options_kv
        )
    return dq, dw, d_latent, d_rope
