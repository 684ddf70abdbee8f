"""A model that counts its tokens in Python: its attention is read from the module alone."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from reattend import convert, find_attention
from reattend.explain import explain

WIDTH, HEADS = 16, 2


class Relative(nn.Module):
    """Scores that vectors of distance add to, made outside, and a residual (Funnel)."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.r, self.o = (nn.Linear(WIDTH, WIDTH) for _ in range(5))

    def forward(self, query: Tensor, key: Tensor, beside: dict[str, Any]) -> tuple[Tensor]:
        b, n, m = query.shape[0], query.shape[1], key.shape[1]
        q, k, v = (
            f(x).unflatten(-1, (HEADS, -1)).transpose(1, 2)
            for f, x in ((self.q, query), (self.k, key), (self.v, key))
        )
        r = self.r(beside["distance"][: n + m - 1]).unflatten(-1, (HEADS, -1)).transpose(0, 1)
        moved = (q @ r.transpose(-1, -2)).reshape(b, HEADS, -1)[..., : n * (n + m - 2)]
        moved = moved.reshape(b, HEADS, n, -1)[..., :m]
        scores = q @ k.transpose(-1, -2) + moved + (1 - beside["real"][:, None, None]) * -1e9
        y = (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)
        return (query + self.o(y),)


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention, self.up = Relative(), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, distance: Tensor, real: Tensor) -> Tensor:
        (x,) = self.attention(x, x, {"distance": distance, "real": real})
        return x + self.up(x).relu()


class Counting(nn.Module):
    """The length, counted in Python, is the size of a table: torch.export writes it down.

    `several`: the layer runs twice, so no one call stands for it.
    """

    def __init__(self, several: bool = False) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Layer(), Layer()])
        self.several = several

    def forward(self, x: Tensor, real: Tensor) -> Tensor:
        places = list(range(-len(x[0]), len(x[0])))
        distance = torch.tensor(places).float()[:, None] * torch.linspace(1, 0.1, WIDTH)
        for layer in (*self.layers, *self.layers[: int(self.several)]):
            x = layer(x, distance.sin(), real)
        return x


def inputs(batch: int = 2, length: int = 7) -> dict[str, Any]:
    x = torch.randn(batch, length, WIDTH, generator=torch.Generator().manual_seed(3))
    return {"x": x, "real": torch.ones(batch, length)}


def test_a_block_of_a_model_of_one_length_is_found_at_every_length() -> None:
    torch.manual_seed(0)
    model = Counting().eval()
    found = find_attention(model, inputs())
    assert [s.path for s in found.sites] == [f"layers.{i}.attention" for i in range(2)]
    assert all(s.verified and s.capture is not None for s in found.sites)
    told = explain(found, "layers.1.attention")
    assert told.verdict == "found and proven"
    model.train()
    converted = convert(model, plan="identity", inputs=inputs()).model
    assert model.layers[0].attention.training
    for batch, length in ((2, 7), (3, 11)):
        given = inputs(batch, length)
        given["real"][0, -2:] = 0
        with torch.no_grad():
            assert float((converted.eval()(**given) - model.eval()(**given)).abs().max()) <= 1e-5


def test_a_module_that_is_called_twice_stays_refused() -> None:
    found = find_attention(Counting(several=True).eval(), inputs())
    assert [s.path for s in found.sites] == ["layers.1.attention"]
    assert {r.path for r in found.refused} == {"layers.0.attention"}
    assert "sizes of the example only" in found.refused[0].reason


def test_a_call_that_changes_otherwise_stays_refused() -> None:
    class Told(Layer):
        def forward(self, x: Tensor, distance: Tensor, real: Tensor) -> Tensor:
            beside = {"distance": distance, "real": real, "length": len(x[0])}
            return self.attention(x, x, beside)[0]

    model = Counting().eval()
    model.layers = nn.ModuleList([Told()])
    assert [r.step for r in find_attention(model, inputs()).refused] == ["lengths"]
