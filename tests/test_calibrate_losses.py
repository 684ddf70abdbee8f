"""Losses of calibration against their plain definitions."""

from __future__ import annotations

import torch
from torch import Tensor

from reattend.calibrate.losses import divergence, squared_error


def plain_divergence(student: Tensor, teacher: Tensor, real: Tensor) -> Tensor:
    p, q = teacher.log_softmax(-1), student.log_softmax(-1)
    return ((p.exp() * (p - q)).sum(-1) * real).sum()


def test_divergence_and_its_gradient_equal_the_definition() -> None:
    student = torch.randn(3, 5, 7, dtype=torch.float64, requires_grad=True)
    teacher = torch.randn(3, 5, 7, dtype=torch.float64)
    real = torch.rand(3, 5) > 0.3
    total = divergence(student, teacher, real)
    expected = plain_divergence(student, teacher, real)
    (got,) = torch.autograd.grad(2.5 * total, student)
    (wanted,) = torch.autograd.grad(2.5 * expected, student)
    torch.testing.assert_close(total, expected)
    torch.testing.assert_close(got, wanted)
    assert torch.autograd.gradcheck(lambda s: divergence(s, teacher, real), student)


def test_divergence_is_forward_not_reverse() -> None:
    sure, unsure = torch.tensor([[4.0, 0.0]]), torch.tensor([[0.0, 0.0]])
    p = sure.softmax(-1)
    forward = float((p * (p.log() - unsure.log_softmax(-1))).sum())
    assert abs(float(divergence(unsure, sure, None)) - forward) < 1e-6


def test_divergence_is_in_float32_for_bfloat16_logits() -> None:
    logits = torch.randn(1, 4, 50).bfloat16()
    assert abs(float(divergence(logits, logits, None))) < 1e-5
    assert divergence(logits, logits, None).dtype == torch.float32


def test_padding_counts_in_neither_loss_nor_gradient() -> None:
    student = torch.randn(2, 4, 6, requires_grad=True)
    teacher = torch.randn(2, 4, 6)
    real = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1]]).bool()
    other = teacher.clone()
    other[~real] = float("nan")
    assert torch.equal(divergence(student, teacher, real), divergence(student, other, real))
    gap, size = squared_error(student, teacher, real)
    gap2, size2 = squared_error(student, other, real)
    assert torch.equal(gap, gap2)
    assert torch.equal(size, size2)
    (gradient,) = torch.autograd.grad(gap2 + divergence(student, other, real), student)
    assert bool((gradient[~real] == 0).all())
    assert bool((gradient[real] != 0).any())


def test_squared_error_is_relative_to_the_teacher() -> None:
    teacher = torch.randn(2, 3, 4)
    gap, size = squared_error(torch.zeros_like(teacher), teacher, None)
    torch.testing.assert_close(gap / size, torch.tensor(1.0))
