"""Blocks that read more than a hidden state, and scores that the model's own steps add to."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

import reattend.selfcheck as selfcheck
from reattend import convert, find_attention
from reattend.finder import FoundAttention
from reattend.passes.find.sites import Found
from reattend.passes.rewrite.mla import ToMla
from reattend.spec import Added, Opaque
from reattend.weights import dense_config

WIDTH, HEADS, WINDOW = 32, 4, 9


class Windows(nn.Module):
    """Swin v2: cosine scores with a factor per head, a squashed table, masks of shifted windows."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.table = nn.Parameter(torch.randn(25, HEADS))
        self.logit_scale = nn.Parameter(torch.rand(HEADS, 1, 1))
        index = torch.randint(0, 25, (WINDOW, WINDOW), generator=torch.Generator().manual_seed(0))
        self.register_buffer("index", index)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """[B windows, 9, D]."""
        b, n = x.shape[0], WINDOW
        q, k, v = (f(x).view(b, n, HEADS, -1).transpose(1, 2) for f in (self.q, self.k, self.v))
        scores = F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).transpose(-1, -2)
        scores = scores * self.logit_scale.clamp(max=3.0).exp()
        bias = self.table[self.index.view(-1)].view(n, n, HEADS).permute(2, 0, 1)
        scores = scores + (16 * torch.sigmoid(bias)).unsqueeze(0)
        if mask is not None:
            windows = mask.shape[0]
            scores = scores.view(b // windows, windows, HEADS, n, n)
            scores = (scores + mask.unsqueeze(1).unsqueeze(0)).view(-1, HEADS, n, n)
        return (scores.softmax(-1) @ v).transpose(1, 2).reshape(b, n, WIDTH)


class WindowModel(nn.Module):
    def __init__(self, shifted: bool) -> None:
        super().__init__()
        self.attn, self.out, self.shifted = Windows(), nn.Linear(WIDTH, WIDTH), shifted
        mask = torch.zeros(3, WINDOW, WINDOW)
        mask[1, :4, 4:] = mask[1, 4:, :4] = -100.0
        self.register_buffer("mask", mask)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.out(self.attn(x, self.mask if self.shifted else None))


class Queries(nn.Module):
    """DETR: queries and keys know their positions, values do not."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(WIDTH, WIDTH) for _ in range(4))

    def forward(
        self, x: Tensor, place: Tensor, memory: Tensor | None = None, far: Tensor | None = None
    ) -> Tensor:
        source, where = (x, place) if memory is None else (memory, far)
        streams = (self.q(x + place), self.k(source + where), self.v(source))
        q, k, v = (t.unflatten(-1, (HEADS, -1)).transpose(1, 2) for t in streams)
        return self.o(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class QueryModel(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attn, self.norm = Queries(), nn.LayerNorm(WIDTH)
        self.place = nn.Parameter(torch.randn(1, 64, WIDTH))

    def forward(self, x: Tensor, memory: Tensor | None = None) -> Tensor:
        place = self.place[:, : x.shape[1]] * 2
        if memory is None:
            return x + self.attn(self.norm(x), place)
        return x + self.attn(self.norm(x), place, memory, self.place[:, : memory.shape[1]])


class OwnValues(nn.Module):
    """MobileBERT: values from another tensor than queries and keys."""

    def __init__(self) -> None:
        super().__init__()
        self.attn = Queries()
        self.first, self.second = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        shared = self.first(x)
        return self.attn(shared, shared * 0.5, self.second(x), shared)


class Cooled(nn.Module):
    """Queries are multiplied with a factor by position that the call brings."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(WIDTH, WIDTH) for _ in range(4))

    def forward(self, x: Tensor, factor: Tensor) -> Tensor:
        q, k, v = (
            f(x).unflatten(-1, (HEADS, -1)).transpose(1, 2) for f in (self.q, self.k, self.v)
        )
        y = F.scaled_dot_product_attention(q * factor, k, v, is_causal=True)
        return self.o(y.transpose(1, 2).flatten(2))


class CooledModel(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attn = Cooled()

    def forward(self, x: Tensor) -> Tensor:
        place = torch.arange(x.shape[1], device=x.device)
        return x + self.attn(x, (1 + 0.1 * (1 + place).log())[None, None, :, None])


class Zeroed(nn.Module):
    """Tokens that are not real are zeroed before the keys; no mask says that all are."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(WIDTH, WIDTH) for _ in range(4))

    def forward(self, x: Tensor, real: Tensor | None = None) -> Tensor:
        keys = x if real is None else x * real[:, :, None]
        q, k, v = (
            f(t).unflatten(-1, (HEADS, -1)).transpose(1, 2)
            for f, t in ((self.q, x), (self.k, keys.clamp(-1, 1)), (self.v, x))
        )
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.o(y.transpose(1, 2).flatten(2))


class ZeroedModel(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attn = Zeroed()

    def forward(self, x: Tensor, real: Tensor | None = None) -> Tensor:
        return x + self.attn(x, real)


def randn(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


CASES: dict[str, tuple[Callable[[], nn.Module], list[dict[str, Tensor]]]] = {
    "windows": (lambda: WindowModel(False), [{"x": randn(6, 9, 32)}, {"x": randn(3, 9, 32)}]),
    "shifted": (lambda: WindowModel(True), [{"x": randn(6, 9, 32)}, {"x": randn(3, 9, 32)}]),
    "detr": (QueryModel, [{"x": randn(2, 11, 32)}, {"x": randn(3, 7, 32)}]),
    "detr cross": (
        QueryModel,
        [
            {"x": randn(2, 11, 32), "memory": randn(2, 13, 32)},
            {"x": randn(3, 7, 32), "memory": randn(3, 5, 32)},
        ],
    ),
    "cooled": (CooledModel, [{"x": randn(2, 11, 32)}, {"x": randn(3, 7, 32)}]),
    "own values": (OwnValues, [{"x": randn(2, 11, 32)}, {"x": randn(3, 7, 32)}]),
}


def found(case: str) -> tuple[nn.Module, list[dict[str, Tensor]], FoundAttention]:
    make, inputs = CASES[case]
    torch.manual_seed(4)
    model = make().eval()
    return model, inputs, find_attention(model, inputs[0])


@pytest.mark.daily
@pytest.mark.parametrize("case", CASES)
def test_identity_at_two_shapes(case: str) -> None:
    model, inputs, seen = found(case)
    (site,) = seen.sites
    assert site.owner == "module"
    converted = convert(model, plan="identity", inputs=inputs[0]).model
    for given in inputs:
        with torch.no_grad():
            gap = converted(**given) - model(**given)
        assert float(gap.abs().max()) <= 1e-5


def test_what_was_read() -> None:
    spec = found("shifted")[2].sites[0].spec
    assert isinstance(spec.core.bias, Added)
    assert spec.kind == "self"
    assert isinstance(spec.q.proj, Opaque)  # unit length, and the factor per head
    spec = found("detr cross")[2].sites[0].spec
    assert spec.kind == "cross"
    assert [isinstance(s.proj, Opaque) for s in (spec.q, spec.k, spec.v)] == [True, True, False]


def test_a_factor_that_the_call_brings_is_read_from_it() -> None:
    site = found("cooled")[2].sites[0]
    assert isinstance(site.spec.q.proj, Opaque)
    assert site.binding is not None
    assert site.binding.extras == (("factor",),)
    assert not site.spec.whole  # the factor knows the position, the block does not


def test_an_argument_left_out_means_what_the_original_makes_of_it() -> None:
    torch.manual_seed(4)
    model = ZeroedModel().eval()
    x, real = randn(2, 11, 32), torch.ones(2, 11)
    real[0, :4] = 0
    seen = find_attention(model, {"x": x, "real": real})
    (site,) = seen.sites
    assert site.binding is not None
    assert site.binding.extras_spare == ("float32",)
    converted = convert(model, plan="identity", inputs={"x": x, "real": real}).model
    for given in ({"x": x, "real": real}, {"x": randn(3, 7, 32)}):
        with torch.no_grad():
            gap = converted(**given) - model(**given)
        assert float(gap.abs().max()) <= 1e-5


@pytest.mark.parametrize("case", ["shifted", "detr"])
def test_mla_refuses_by_name(case: str) -> None:
    _, _, seen = found(case)
    config = dense_config(seen.sites[0].spec, WIDTH, 0)
    refusal = ToMla().check(config, ToMla().exact_setting(config))
    assert refusal is not None
    assert "the model's own steps" in refusal.reason


def fifteen(spec: Any) -> Any:
    """Another factor where 16 stands in the program."""
    added = spec.core.bias
    steps = [
        s.model_copy(update={"args": tuple(15 if a == 16 else a for a in s.args)})
        for s in added.program.steps
    ]
    assert steps != list(added.program.steps)
    program = added.program.model_copy(update={"steps": tuple(steps)})
    return replace(spec, core=replace(spec.core, bias=replace(added, program=program)))


def keys_of_queries(spec: Any) -> Any:
    return replace(spec, k=replace(spec.k, steps=spec.q.steps))


@pytest.mark.parametrize(("case", "change"), [("shifted", fifteen), ("detr", keys_of_queries)])
def test_mutations_are_caught(case: str, change: Callable[[Any], Any]) -> None:
    _, _, seen = found(case)
    site = seen.sites[0]

    def inputs_at(length: int | None, padded: bool) -> Any:
        return seen.capture.placeholders(seen.capture.probe(length, padded))

    wrong = Found(change(site.spec), site.region, site.follows_padding)
    assert "not understood" in selfcheck.self_check(seen.capture.gm, wrong, inputs_at).reason
