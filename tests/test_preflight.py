"""The choice for every site before any weight moves: sites that share keys or values are one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from reattend import convert, find_attention
from reattend.errors import RefusedError
from reattend.plan import Plan
from reattend.preflight import choose, preflight

WIDTH, HEADS = 32, 4
INPUTS = {"ids": torch.arange(2 * 13).reshape(2, 13) % 50}
MLA = {"to": "mla", "kv_lora_rank": 12, "qk_rope_head_dim": 0}
FIRST_ONLY = {"rules": [{"layers": [0], **MLA}, {"sites": "*", "to": "keep"}]}


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            p(x).unflatten(-1, (HEADS, -1)).transpose(1, 2) for p in (self.q, self.k, self.v)
        )
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.o(y.transpose(1, 2).flatten(2))


class Tower(nn.Module):
    def __init__(self, shared: dict[str, str]) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(50, WIDTH), nn.Linear(WIDTH, 50)
        self.blocks = nn.ModuleList(Attention() for _ in range(3))
        for name, source in shared.items():
            layer, projection = name.split(".")
            setattr(self.blocks[int(layer)], projection, self.blocks.get_submodule(source))

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for block in self.blocks:
            x = x + block(x)
        return self.head(x)


def tower(shared: dict[str, str]) -> Tower:
    """Three blocks; `shared` names the projections that are another block's."""
    torch.manual_seed(0)
    return Tower(shared).eval()


def actions(model: nn.Module, plan: Any) -> list[str]:
    return [c.action for c in choose(find_attention(model, INPUTS), Plan.load(plan))]


@pytest.mark.parametrize(
    ("shared", "expected"),
    [
        ({}, ["converted", "kept", "kept"]),
        ({"1.k": "0.k", "1.v": "0.v"}, ["refused", "kept", "kept"]),
        ({"1.k": "0.k"}, ["refused", "kept", "kept"]),
        ({"1.v": "0.v"}, ["refused", "kept", "kept"]),
        ({"1.v": "0.k"}, ["refused", "kept", "kept"]),
        ({"1.q": "0.q", "1.o": "0.o"}, ["converted", "kept", "kept"]),
        ({"2.v": "1.v"}, ["converted", "kept", "kept"]),
    ],
    ids=["nothing", "both", "keys", "values", "a key as value", "queries", "others"],
)
def test_a_site_is_refused_with_the_one_it_shares_keys_or_values_with(
    shared: dict[str, str], expected: list[str]
) -> None:
    assert actions(tower(shared), FIRST_ONLY) == expected


def test_sharing_reaches_over_a_site_in_between() -> None:
    """0 and 1 share keys, 1 and 2 values: where 2 is kept, neither of the others can go."""
    model = tower({"1.k": "0.k", "2.v": "1.v"})
    plan = {"rules": [{"layers": [2], "to": "keep"}, {"sites": "*", **MLA}]}
    assert actions(model, plan) == ["refused", "refused", "kept"]
    with pytest.raises(RefusedError) as caught:
        preflight(find_attention(model, INPUTS), Plan.load(plan))
    told = str(caught.value)
    assert "2 of 3 sites" in told
    assert "k.weight" in told and "v.weight" in told
    assert "the plan keeps it" in told


def test_sites_that_share_everything_convert_together() -> None:
    model = tower({"1.k": "0.k", "1.v": "0.v", "2.k": "0.k", "2.v": "0.v"})
    data = [{"ids": torch.randint(0, 50, (4, 24))}]
    rule = {"sites": "*", "to": "mla", "kv_lora_rank": 32, "qk_rope_head_dim": 0}
    result = convert(model, plan={"rules": [rule]}, inputs=INPUTS, data=data)
    assert result.report.totals.converted == 3
    with torch.no_grad():
        assert (result.model(**INPUTS) - model(**INPUTS)).abs().max() <= 1e-4
