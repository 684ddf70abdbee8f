"""`reattend::linear_attention` where every query sees all keys: the state after them, read once.

Two products, and five for the gradient, which forms the state again: there is nothing to cut into
chunks and nothing that a kernel of ours would do better than torch, on any device. Letters as in
`reference.py`.
"""

from __future__ import annotations

from torch import Tensor


def forward(
    q_BHNf: Tensor, k_BGNf: Tensor, v_BGNe: Tensor, state_BGfe: Tensor
) -> tuple[Tensor, Tensor]:
    """Outputs and the state after all keys; arguments as in `reference.linear_attention`."""
    after = state_BGfe + k_BGNf.transpose(-1, -2) @ v_BGNe
    y = q_BHNf.unflatten(1, (k_BGNf.shape[1], -1)) @ after[:, :, None]
    return y.flatten(1, 2), after


def backward(
    dy_BHNe: Tensor,
    dstate_BGfe: Tensor,
    q_BHNf: Tensor,
    k_BGNf: Tensor,
    v_BGNe: Tensor,
    state_BGfe: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v, decay (there is none) and state."""
    dy, q = (x.unflatten(1, (k_BGNf.shape[1], -1)) for x in (dy_BHNe, q_BHNf))
    after = state_BGfe + k_BGNf.transpose(-1, -2) @ v_BGNe
    asked = dstate_BGfe + (q.transpose(-1, -2) @ dy).sum(2)
    dq = (dy @ after.transpose(-1, -2)[:, :, None]).flatten(1, 2)
    return dq, v_BGNe @ asked.transpose(-1, -2), k_BGNf @ asked, q.new_zeros(0), asked
