"""A model that asks for values while it runs: the attention inside is read from its own module."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from reattend import convert, find_attention

WIDTH, HEADS = 16, 2


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(WIDTH, WIDTH) for _ in range(4))

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        q, k, v = (
            f(x).unflatten(-1, (HEADS, -1)).transpose(1, 2) for f in (self.q, self.k, self.v)
        )
        y = nn.functional.scaled_dot_product_attention(q, k, v, mask, is_causal=mask is None)
        return self.o(y.transpose(1, 2).flatten(2))


class Cutting(nn.Module):
    """Drops the tokens behind the last one that counts, and hides others only if there are any."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = Attention()

    def forward(self, x: Tensor, real: Tensor) -> Tensor:
        last = int((x[..., 0] > 0).any(0).nonzero().max()) + 1
        mask = None
        if not bool(real.all()):
            seen = torch.ones(last, last, dtype=torch.bool).tril()
            mask = seen & (real[:, None, None, :last] == 1)
        y = self.attention(x[:, :last], mask)
        return torch.cat([y, x[:, last:]], 1)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cutting, self.up = Cutting(), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, real: Tensor) -> Tensor:
        return x + self.up(self.cutting(x, real))


def inputs(batch: int = 2, length: int = 7) -> dict[str, Any]:
    x = torch.randn(batch, length, WIDTH, generator=torch.Generator().manual_seed(3))
    return {"x": x, "real": torch.ones(batch, length)}


def test_attention_in_a_module_that_cannot_be_followed() -> None:
    torch.manual_seed(0)
    model = Model().eval()
    found = find_attention(model, inputs())
    assert list(found.capture.left_out) == ["cutting"]
    assert [(s.path, s.verified) for s in found.sites] == [("cutting.attention", True)]
    assert not found.refused
    assert found.sites[0].spec.core.pattern.unmasked == "causal"
    converted = convert(model, plan="identity", inputs=inputs()).model
    assert type(converted.cutting.attention).__name__ == "Adapter"
    for padded in (0, 2):
        given = inputs(3, 11)
        given["real"][0, 11 - padded :] = 0
        with torch.no_grad():
            assert float((converted(**given) - model(**given)).abs().max()) <= 1e-5
