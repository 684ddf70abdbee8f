"""The two distances of calibration, both per real token.

Layout letters: B batch, N tokens, D features, R real tokens of one row, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def squared_error(
    y_BND: Tensor, target_BND: Tensor, real_BN: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Sum over real tokens of |y - t|^2 (differentiable) and of |t|^2.

    Their quotient is the normalised mean squared error: 0 is the teacher, 1 is as far as zeros.
    """
    gap_BND = y_BND - target_BND
    if real_BN is not None:  # before squaring: 0 x NaN would reach the gradient
        gap_BND = gap_BND.masked_fill(~real_BN[..., None], 0)
        target_BND = target_BND.masked_fill(~real_BN[..., None], 0)
    return gap_BND.square().sum(), target_BND.square().sum()


def row_divergence(student_RV: Tensor, teacher_RV: Tensor) -> tuple[Tensor, Tensor]:
    """Sum over rows of logits of KL(teacher || student) in nats, and its gradient [R, V]."""
    guess_RV, target_RV = student_RV.log_softmax(-1), teacher_RV.log_softmax(-1)
    p_RV = target_RV.exp()
    return (p_RV * (target_RV - guess_RV)).sum(-1).double().sum(), guess_RV.exp() - p_RV


class _Divergence(torch.autograd.Function):
    """Sum of KL(teacher || student); row by row, holding one gradient and no log-softmax."""

    @staticmethod
    def forward(ctx: Any, student_BNV: Tensor, teacher_BNV: Tensor, real_BN: Tensor) -> Tensor:
        wide = torch.float64 if student_BNV.dtype == torch.float64 else torch.float32
        total = torch.zeros((), dtype=torch.float64, device=student_BNV.device)
        gradient = torch.zeros_like(student_BNV)
        for row, (student_NV, teacher_NV, real_N) in enumerate(
            zip(student_BNV, teacher_BNV, real_BN, strict=True)
        ):
            guess_RV, target_RV = student_NV[real_N].to(wide), teacher_NV[real_N].to(wide)
            apart, toward_RV = row_divergence(guess_RV, target_RV)
            total += apart
            gradient[row, real_N] = toward_RV.to(gradient.dtype)
        ctx.save_for_backward(gradient)
        return total.to(wide)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * upstream.to(gradient.dtype), None, None


def divergence(student_BNV: Tensor, teacher_BNV: Tensor, real_BN: Tensor | None) -> Tensor:
    """Sum over real tokens of KL(teacher || student) in nats, temperature 1.

    d KL / d logits = p_student - p_teacher, so the gradient is formed with the value and nothing
    else of size V is kept for the backward pass.

    Args:
        student_BNV: logits, [B, N, V] or [B, V].
        teacher_BNV: logits, same shape; no gradient.
        real_BN: True where the token counts; None counts all.
    """
    if student_BNV.dim() == 2:
        student_BNV, teacher_BNV, real_BN = student_BNV[:, None], teacher_BNV[:, None], None
    if real_BN is None:
        real_BN = torch.ones(student_BNV.shape[:2], dtype=torch.bool, device=student_BNV.device)
    total: Tensor = _Divergence.apply(  # type: ignore[no-untyped-call]
        student_BNV, teacher_BNV.detach(), real_BN
    )
    return total
