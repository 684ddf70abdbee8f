"""Equal layers are read once and what was read is carried over; unequal ones are told apart."""

from __future__ import annotations

from dataclasses import fields, is_dataclass
from typing import Any

import pytest
import torch
import zoo_models
from torch import Tensor, nn

from reattend.passes.find import sites
from reattend.search import Search


class Layer(nn.Module):
    def __init__(self, factor: float, table: Tensor) -> None:
        super().__init__()
        self.factor = factor
        self.qkv, self.out = nn.Linear(16, 48), nn.Linear(16, 16)
        self.register_buffer("table", table)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, 8)).permute(2, 0, 3, 1, 4)
        scores = q @ k.transpose(-1, -2) * self.factor
        seen = self.table[: x.shape[1], : x.shape[1]]
        probs = torch.softmax(scores.masked_fill(~seen, float("-inf")), -1)
        return x + self.out((probs @ v).transpose(1, 2).flatten(2))


class Model(nn.Module):
    def __init__(self, factors: list[float], tables: list[Tensor]) -> None:
        super().__init__()
        pairs = zip(factors, tables, strict=True)
        self.layers = nn.Sequential(*(Layer(f, t) for f, t in pairs))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


CAUSAL = torch.ones(64, 64, dtype=torch.bool).tril()
FULL = torch.ones(64, 64, dtype=torch.bool)


def read(search: Search) -> list[Any]:
    return sites.find(search.gm, search.captured.placeholders(), search.inputs_at)


def twins(factors: list[float], tables: list[Tensor]) -> list[bool]:
    inputs = {"x": torch.randn(2, 7, 16)}
    return [f.twin for f in read(Search(Model(factors, tables).eval(), inputs))]


def test_a_constant_or_a_buffer_makes_another_block() -> None:
    assert twins([0.3] * 3, [CAUSAL] * 3) == [False, True, True]
    assert twins([0.3, 0.31, 0.3], [CAUSAL.clone() for _ in range(3)]) == [False, False, True]
    assert twins([0.3] * 3, [CAUSAL, FULL, CAUSAL]) == [False, False, True]


def assert_same(a: Any, b: Any, at: str = "") -> None:
    """Equal but for `twin`, node by node."""
    assert type(a) is type(b), at
    if is_dataclass(a):
        for field in fields(a):
            if field.name != "twin":
                assert_same(getattr(a, field.name), getattr(b, field.name), f"{at}.{field.name}")
    elif isinstance(a, Tensor):
        assert torch.equal(a, b), at
    elif isinstance(a, dict):
        assert a.keys() == b.keys(), at
        for key in a:
            assert_same(a[key], b[key], f"{at}.{key}")
    elif isinstance(a, list | tuple):
        assert len(a) == len(b), at
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_same(x, y, f"{at}.{i}")
    else:
        assert a == b, at


@pytest.mark.parametrize(
    "name",
    [
        "llama",
        *(
            pytest.param(n, marks=pytest.mark.slow)
            for n in ("bert", "t5", "gemma3", "bitnet", "mpt", "cohere_norm", "hrm_text", "albert")
        ),
    ],
)
def test_what_is_carried_over_is_what_would_be_read(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    search = Search(zoo_models.build(name, None), None)
    carried = read(search)
    monkeypatch.setattr(sites, "twin", lambda *_: None)
    assert any(f.twin for f in carried) or name == "gemma3"
    assert_same(carried, read(search))


def test_equal_layers_are_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    inner = sites._read

    def counted(*args: Any) -> Any:
        calls.append(args[1])
        return inner(*args)

    monkeypatch.setattr(sites, "_read", counted)
    assert twins([0.5] * 6, [CAUSAL] * 6) == [False] + [True] * 5
    assert len(calls) == 1
