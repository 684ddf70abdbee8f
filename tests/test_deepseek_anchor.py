"""The anchored norm: for every token that can reach it, it changes the latent by less than said."""

from __future__ import annotations

import pytest
import torch

from reattend.targets.deepseek.anchor import anchor, row_bound


def stock_norm(c: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """DeepseekV3RMSNorm, float64."""
    return weight * c * (c.pow(2).mean(-1, keepdim=True) + 1e-6).rsqrt()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", [1e-4, 1.0])
def test_the_norm_passes_every_latent_unchanged(dtype: torch.dtype, size: float) -> None:
    torch.manual_seed(0)
    width, rank = 24, 9
    weight = size * torch.randn(rank, width, dtype=torch.float64)
    gain = torch.rand(width, dtype=torch.float64) + 0.5
    bound = row_bound(weight, gain)
    made = anchor(bound, rank + 1, dtype)
    # the worst token there is: the leading right singular vector, as an RMS norm would give it
    worst = torch.linalg.svd(weight * gain).Vh[0] * width**0.5 * gain
    x = torch.randn(500, width, dtype=torch.float64)
    x = torch.cat([x / x.square().mean(-1, keepdim=True).sqrt() * gain, worst[None]])
    c = x @ weight.t()
    assert float(c.norm(dim=-1).max()) <= bound * (1 + 1e-9)
    assert float(c[-1].norm()) >= bound * (1 - 1e-9)  # the bound is reached
    latent = torch.cat([c, torch.full((len(c), 1), made.value, dtype=torch.float64)], -1)
    norm = torch.full((rank + 1,), made.gain, dtype=torch.float64)
    norm[-1] = 0.0
    out = stock_norm(latent, norm)
    change = (made.correction * out[:, :rank] - c).norm(dim=-1) / c.norm(dim=-1)
    assert float(change.max()) <= made.error
    # K and its gain were chosen to round well, so that little is left for the next matrix
    assert abs(made.correction - 1) <= float(torch.finfo(dtype).eps) / 32
    assert made.error <= {torch.float32: 1e-6, torch.bfloat16: 2e-3, torch.float16: 1e-2}[dtype]
    assert float(out[:, rank].abs().max()) == 0.0
    assert float(torch.tensor(made.value).to(dtype)) == made.value  # stored as it is
