"""The long story of a block, and the table, at 80 columns."""

from __future__ import annotations

from io import StringIO
from typing import Any

import pytest
import torch
from rich.console import Console
from test_overlooked import Model as Halves
from test_sizecheck import INPUTS, Model
from torch import Tensor, fx, nn

from reattend import find_attention
from reattend.cli_find import as_data, nothing_found
from reattend.errors import ArgumentError
from reattend.explain import explain
from reattend.find_story import show_story
from reattend.find_table import show_found
from reattend.found import STEPS, FoundAttention, RefusedSite
from reattend.missed import located_at
from reattend.passes.find.sites import Missed


class Bare(nn.Module):
    """Values are the tokens themselves: no layer makes them."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.out = nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 16)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        both = torch.cat([x, y], 1)
        streams = self.q(both), self.k(both), both
        q, k, v = (t.unflatten(-1, (2, 8)).transpose(1, 2) for t in streams)
        out = nn.functional.scaled_dot_product_attention(q, k, v)
        return self.out(out.transpose(1, 2).flatten(2))


class Outer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.block = Bare()

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.block(x, y)


def printed(width: int, show: Any) -> str:
    out = Console(width=width, file=StringIO())
    show(out)
    text: str = out.file.getvalue()  # type: ignore[attr-defined]
    assert max(map(len, text.splitlines())) <= width
    return text


@pytest.fixture(scope="module")
def refused() -> FoundAttention:
    return find_attention(Outer().eval(), {"x": INPUTS["x"], "y": INPUTS["x"][:, :5] * 2})


def test_a_refusal_names_the_step_the_node_and_the_nearest_form(refused: FoundAttention) -> None:
    (site,) = refused.refused
    assert site.step == "read"
    assert site.node in {n.name for n in refused.capture.gm.graph.nodes}
    assert site.nearest.startswith("softmax attention with 2 heads of width 8, and ")
    told = explain(refused, "block")
    assert told.passed == ["normalise"]
    assert told.parts["q"] == "block.q.weight (2 x 8, bias)"
    assert told.parts["v"].startswith("not understood")
    assert told.parts["mask"] == "full"
    assert "attention" in [r.call for r in told.rows]
    text = printed(80, lambda out: show_story(told, out))
    for part in ("✓ normalise", "✗ read", "Nearest understood form", "Subgraph", "[B N + L 16]"):
        assert part in text


def test_the_proof_shows_the_first_difference() -> None:
    found = find_attention(Model("").eval(), INPUTS)
    (site,) = found.sites
    assert explain(found, "layer").numbers.first is None  # type: ignore[union-attr]
    from dataclasses import replace

    site.spec = replace(site.spec, core=replace(site.spec.core, scale=site.spec.core.scale * 1.001))
    numbers = explain(found, "layer").numbers
    assert numbers is not None
    assert numbers.first is not None
    assert numbers.first[0] == 0
    assert numbers.expected != numbers.got
    assert numbers.error is not None
    assert numbers.error > 1e-5


def test_what_only_a_run_shows_is_explained_too() -> None:
    found = find_attention(Halves().eval(), {"x": torch.randn(2, 7, 16)})
    told = explain(found, "layers.1")
    assert told.failed in STEPS
    assert "not known as attention" in told.verdict
    text = printed(80, lambda out: show_found(found, out))
    assert "0 found, 2 not understood" in text
    error = nothing_found("m.py:make", found)
    assert "reattend find m.py:make --why" in error.next_step
    assert (error.why or "").startswith("layers.0 and 1 more: ")


def test_a_word_that_is_also_a_node_names_none() -> None:
    graph = fx.Graph()
    q, k = graph.placeholder("to"), graph.placeholder("cat_2")
    core = graph.call_function(torch.matmul, (q, k))
    core.meta["val"] = torch.empty(1, 2, 3, 4)
    reason = "it holds up to 3 tokens; no projection behind cat_2"
    for step, node in (("read", "cat_2"), ("lengths", core.name)):
        assert located_at(RefusedSite("", reason), step, Missed(core, reason)).node == node


def test_sizes_of_the_example_are_a_step_of_their_own() -> None:
    found = find_attention(Model("shape").eval(), INPUTS)
    assert [r.step for r in found.refused] == ["lengths"]
    told = explain(found, "layer")
    assert told.passed == ["normalise", "read", "new", "own", "prove"]
    assert told.nearest.startswith("self-attention, 2 heads, width 8")
    (data,) = as_data(found)["refused"]
    assert set(data) == {"path", "reason", "step", "node", "nearest", "latent", "verified"}


def test_an_unknown_path_names_the_nearest(refused: FoundAttention) -> None:
    with pytest.raises(ArgumentError, match="did you mean 'block'"):
        explain(refused, "blocks")


def test_the_table_fits_80_columns_and_says_more_where_there_is_room() -> None:
    found = find_attention(Model("").eval(), INPUTS)
    narrow = printed(80, lambda out: show_found(found, out))
    for part in ("Block", "2/2×8", "full", "1 with q/k/v/o bias", "1 found, 0 not understood"):
        assert part in narrow
    wide = printed(160, lambda out: show_found(found, out))
    assert "Also" in wide
    assert "1 with" not in wide
