"""A block that torch.export saw at one size only, of a model that takes others, is refused."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from reattend import convert, find_attention
from reattend.errors import NothingFoundError
from reattend.search import Search


class Block(nn.Module):
    """Attention with a norm inside, whose residual counts tokens in Python.

    `frozen`: by the length of the example, which torch.export writes into the graph.
    """

    def __init__(self, frozen: str) -> None:
        super().__init__()
        self.frozen = frozen
        self.norm = nn.LayerNorm(16)
        self.qkv, self.out = nn.Linear(16, 48), nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        n = int(x.shape[1]) if self.frozen else x.shape[1]
        q, k, v = self.qkv(self.norm(x)).unflatten(-1, (3, 2, 8)).permute(2, 0, 3, 1, 4)
        y = nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2)
        x = x + self.out(y.reshape(x.shape[0], -1, 16))
        return x.reshape(x.shape[0], n, 16) if self.frozen == "shape" else x * n


class Model(nn.Module):
    def __init__(self, frozen: str) -> None:
        super().__init__()
        self.layer, self.head = Block(frozen), nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layer(x))


INPUTS = {"x": torch.randn(2, 7, 16, generator=torch.Generator().manual_seed(0))}


@pytest.mark.parametrize(
    ("frozen", "said"), [("shape", "it fails (shape"), ("factor", "it differs by")]
)
def test_sizes_written_into_the_graph_are_seen_before_anything_changes(
    frozen: str, said: str
) -> None:
    model = Model(frozen).eval()
    (refused,) = find_attention(model, INPUTS).refused
    assert refused.path == "layer"
    assert said in refused.reason
    with pytest.raises(NothingFoundError, match="sizes of the example only"):
        convert(model, plan="identity", inputs=INPUTS)


def test_a_block_that_takes_any_length_is_found() -> None:
    found = find_attention(Model("").eval(), INPUTS)
    assert [s.path for s in found.sites] == ["layer"]
    assert found.sites[0].surrounding is not None


class Turns(nn.Module):
    """Attention that from 16 tokens on, or below 5, does something else, unseen in its graph."""

    def __init__(self, other: str) -> None:
        super().__init__()
        self.other = other
        self.qkv, self.out = nn.Linear(16, 48), nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, 8)).permute(2, 0, 3, 1, 4)
        if (self.other == "far" and x.shape[1] >= 16) or (self.other == "near" and x.shape[1] < 5):
            k = k.flip(2)
        if self.other == "fails" and x.shape[1] >= 16:
            raise RuntimeError("too long")
        y = nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2)
        return self.out(y.flatten(2))


class Holds(nn.Module):
    """A module that carries the block."""

    def __init__(self, other: str) -> None:
        super().__init__()
        self.layer, self.head = Turns(other), nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layer(x) + x)


@pytest.mark.parametrize("model", [Holds, Turns])  # the second: only the graph could carry it
@pytest.mark.parametrize(
    ("other", "told"),
    [
        ("far", "up to 15 tokens only: at 22 tokens it differs by"),
        ("near", "from 5 tokens on only: at 4 tokens it differs by"),
        ("fails", ""),
    ],
)
def test_what_happens_from_some_length_on_is_looked_at(
    model: type[nn.Module], other: str, told: str
) -> None:
    found = find_attention(model(other).eval(), INPUTS)
    assert len(found.sites) == (told == "")
    if told:
        (refused,) = found.refused
        assert told in refused.reason and refused.step == "lengths"


def test_texts_longer_than_the_positions_of_a_model_only_count_where_its_graph_stays() -> None:
    model = Turns("far").eval()
    model.config = SimpleNamespace(get_text_config=lambda: model.text)
    ends = []
    search = Search(model, INPUTS)
    for whole, positions in ((False, 15), (True, 15), (True, 16)):
        model.text = SimpleNamespace(max_position_embeddings=positions)
        search.whole, search._ends = whole, None
        ends.append(search.graph_ends()[-60:])
    assert ends[1] == "" and all("it differs by" in told for told in (ends[0], ends[2]))


class Pair(nn.Module):
    """Text and image tokens attend together and part again; nothing reads the text of the last."""

    def __init__(self) -> None:
        super().__init__()
        self.layers, self.head = nn.ModuleList([Joint(), Joint()]), nn.Linear(16, 5)

    def forward(self, text: Tensor, image: Tensor) -> Tensor:
        for layer in self.layers:
            text, image = layer(text, image)
        return self.head(image)


class Joint(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.block = Block("")

    def forward(self, text: Tensor, image: Tensor) -> Any:
        n = text.shape[1]
        x = torch.cat([text, image], 1)
        q, k, v = self.block.qkv(x).unflatten(-1, (3, 2, 8)).permute(2, 0, 3, 1, 4)
        y = nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2)
        x = x + self.block.out(y.flatten(2))
        return x[:, :n], x[:, n:]


def test_a_result_that_nothing_reads_is_no_part_of_the_comparison() -> None:
    generator = torch.Generator().manual_seed(1)
    inputs = {
        "text": torch.randn(2, 5, 16, generator=generator),
        "image": torch.randn(2, 11, 16, generator=generator),
    }
    model = Pair().eval()
    result = convert(model, plan="identity", inputs=inputs)
    assert result.report.totals.converted == 2
    assert all(s.error is not None for s in result.report.sites)
    other = {"text": inputs["text"][:, :3], "image": inputs["image"][:, :9]}
    for given in (inputs, other):
        with torch.no_grad():
            assert float((result.model(**given) - model(**given)).abs().max()) <= 1e-5
