"""Launch of `linear_channels`: outputs, and all gradients by the same sums.

Letters as in `reference.py`; columns: the values', with one of ones where outputs are divided.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from reattend.kernels.configs import KernelConfig
from reattend.kernels.launching import interpreting, next_power_of_two, on_device
from reattend.kernels.linear_attention.gradient import decay_gradient
from reattend.kernels.linear_attention.reference import divided, undivided, with_ones
from reattend.kernels.linear_attention.triton_channels import linear_channels


class Sums(NamedTuple):
    """What one launch computes: q [B, H, N, f], k [B, G, N, f], v [B, G, N, c], `decay` [B, G, N,
    f] (`back`: of the columns, [B, G, N, c]), `state` [B, G, f, c].
    """

    q: Tensor
    k: Tensor
    v: Tensor
    decay: Tensor
    state: Tensor
    back: bool = False


def run(x: Sums, config: KernelConfig) -> tuple[Tensor, Tensor]:
    """Sums [B, H, N, c] and the state after all tokens, float32, nothing divided."""
    q, k, v = (t.contiguous() for t in x[:3])
    (b, h, n, f), g, e = q.shape, k.shape[1], v.shape[3]
    chunks = -(-n // config.rows)
    padded = F.pad(x.decay.float(), (0, 0, 0, chunks * config.rows - n))
    within = padded.unflatten(2, (chunks, config.rows)).cumsum(3).contiguous()
    before = x.state.float().contiguous()
    y = q.new_empty(b, h, n, e, dtype=torch.float32)
    after = torch.empty_like(before)
    with on_device(q):
        linear_channels[(-(-e // config.keys) * h * b,)](
            q, k, v, y, before, after, within, n, chunks, h, h // g,
            F=f, E=e, BACK=x.back,
            # the interpreter holds bf16 as integers: compute in fp32 there
            UPCAST=interpreting() and q.dtype == torch.bfloat16, PRECISION="ieee",
            BLOCK_ROWS=config.rows, WHOLE_F=max(16, next_power_of_two(f)), BLOCK_E=config.keys,
            enable_fp_fusion=True, **config.launch,
        )  # fmt: skip
    return y, after


def forward(x: Sums, normalize: bool, config: KernelConfig) -> tuple[Tensor, Tensor]:
    """``y_BHNe`` in the dtype of q, and the state after all keys in fp32."""
    v = with_ones(x.v) if normalize else x.v
    y, after = run(x._replace(v=v), config)
    return (divided(y) if normalize else y).to(x.q.dtype).contiguous(), after


def backward(
    dy: Tensor, dstate: Tensor, x: Sums, normalize: bool, config: KernelConfig
) -> tuple[Tensor, ...]:
    """Gradients of q, k, v, decay and state.

    Those of keys and values are sums over later queries: the same launch with time turned round,
    where a token's decay is that of the one behind it.
    """
    q, k, decay = x.q, x.k, x.decay.float()
    v = with_ones(x.v) if normalize else x.v
    y, after = run(x._replace(v=v), config)
    dy = dy.float()
    dy = (undivided(dy, y) if normalize else dy).to(q.dtype)
    dq, _ = run(Sums(dy, v, k, decay, x.state.transpose(-1, -2), back=True), config)
    each = q.shape[1] // k.shape[1]
    shifted = F.pad(decay.flip(2), (0, 0, 1, 0))[:, :, :-1]
    k_H, v_H, decay_H = (t.repeat_interleave(each, 1) for t in (k.flip(2), v.flip(2), shifted))
    first = torch.arange(q.shape[1], device=q.device) % each == 0  # one head of a group has it
    last = dstate.float().repeat_interleave(each, 1) * first[:, None, None]
    turned_q, turned_dy = q.flip(2), dy.flip(2)
    dv, before = run(Sums(k_H, turned_q, turned_dy, decay_H, last), config)
    swapped = Sums(v_H, turned_dy, turned_q, decay_H, last.transpose(-1, -2), back=True)
    dk, _ = run(swapped, config)

    def grouped(t: Tensor) -> Tensor:
        made: Tensor = t.unflatten(1, (-1, each)).sum(2)
        return made

    dk, dv = grouped(dk.flip(2)), grouped(dv.flip(2))[..., : x.v.shape[3]]
    dfirst = grouped(before) * decay[:, :, 0, :, None].exp()
    ddecay = decay_gradient(q, dq, k, dk, (dstate * after).sum(-1))
    return dq, dk, dv, ddecay, dfirst
