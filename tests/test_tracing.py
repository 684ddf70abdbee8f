"""Models that torch.export cannot follow everywhere: parts are left out, the rest is captured."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from reattend import convert, find_attention
from reattend.capture import capture
from reattend.errors import CaptureError

WIDTH, HEADS = 16, 2


class Experts(nn.Module):
    """A Python loop over the experts that some token chose."""

    def __init__(self) -> None:
        super().__init__()
        self.each = nn.ModuleList([nn.Linear(WIDTH, WIDTH) for _ in range(3)])

    def forward(self, x: Tensor, scale: float = 1.0) -> tuple[Tensor, Tensor, None]:
        flat = x.reshape(-1, WIDTH)
        chosen = flat[:, :3].argmax(-1)
        out = torch.zeros_like(flat)
        for number in chosen.unique().tolist():
            rows = (chosen == number).nonzero().flatten()
            out[rows] = self.each[number](flat[rows]) * scale
        return out.view_as(x), chosen, None


class Attention(nn.Module):
    def __init__(self, branch: bool = False) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.branch = branch

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        if self.branch and bool(x.sum() > 0):
            q = -q
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(y.transpose(1, 2).flatten(2))


class Model(nn.Module):
    def __init__(self, *branches: bool) -> None:
        super().__init__()
        self.attentions = nn.ModuleList([Attention(b) for b in branches])
        self.experts = nn.ModuleList([Experts() for _ in branches])

    def forward(self, x: Tensor) -> Tensor:
        for attention, experts in zip(self.attentions, self.experts, strict=True):
            x = x + attention(x)
            y, chosen, _ = experts(x, scale=0.5)
            x = x + y + chosen.view(x.shape[:2])[..., None]
        return x


def inputs(batch: int = 2, length: int = 7) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(3)
    return {"x": torch.randn(batch, length, WIDTH, generator=generator)}


def test_experts_are_left_out_and_attention_is_found_and_replaced() -> None:
    torch.manual_seed(0)
    model = Model(False, False).eval()
    captured = capture(model, inputs())
    assert set(captured.left_out) == {"experts.0", "experts.1"}
    assert all("data-dependent" in why.lower() for why in captured.left_out.values())
    assert "forward" not in vars(model.experts[0])
    found = find_attention(model, inputs())
    assert [s.path for s in found.sites] == ["attentions.0", "attentions.1"]
    assert all(s.verified and s.spec.core.pattern.kind == "causal" for s in found.sites)
    converted = convert(model, plan="identity", inputs=inputs()).model
    for batch, length in ((2, 7), (3, 11)):
        x = inputs(batch, length)
        with torch.no_grad():
            assert (converted(**x) - model(**x)).abs().max() <= 1e-5


def test_the_graph_runs_what_was_left_out() -> None:
    model = Model(False, False).train()
    captured = capture(model, inputs())
    assert model.experts[0].training
    with torch.no_grad():
        for length in (7, 9):
            assert torch.equal(captured.gm(**inputs(length=length)), model(**inputs(length=length)))


def test_a_core_that_cannot_be_followed_is_refused_and_the_others_are_found() -> None:
    found = find_attention(Model(True, False).eval(), inputs())
    assert [s.path for s in found.sites] == ["attentions.1"]
    (refused,) = found.refused
    assert refused.path == "attentions.0"
    assert "torch.export cannot follow attentions.0" in refused.reason


class Sized(nn.Module):
    """Experts that are told a size, which a hole cannot hand over; what holds them becomes one."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = Experts()

    def forward(self, x: Tensor) -> Tensor:
        return self.experts(x, scale=x.shape[1] * 0.5)[0]


def test_where_a_hole_cannot_be_called_the_module_around_it_is_left_out() -> None:
    model = nn.Sequential(Attention(), Sized()).eval()
    captured = capture(model, {"input": inputs()["x"]})
    assert set(captured.left_out) == {"1"}
    assert "data-dependent" in captured.left_out["1"].lower()


class Grows(nn.Module):
    """Its result has a size that no input has."""

    def forward(self, x: Tensor) -> Tensor:
        return x[x > 0]


@pytest.mark.parametrize("inside", [Grows(), None])
def test_what_cannot_be_left_out_is_an_error(inside: nn.Module | None) -> None:
    class Whole(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention, self.inside = Attention(), inside

        def forward(self, x: Tensor) -> Tensor:
            y = self.attention(x)
            picked = y[y > 0] if self.inside is None else self.inside(y)
            return y * 2 if bool(picked.sum() > 1) else y

    with pytest.raises(CaptureError, match="data-dependent"):
        capture(Whole().eval(), inputs())
