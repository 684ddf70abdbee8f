"""Probing masks: patterns, and the relative position bias behind an additive mask."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

from reattend.inputs import resized
from reattend.passes.find.masks import FoundMask, classify, read_mask
from reattend.passes.find.reasons import NotUnderstood
from reattend.spec import Alibi

HEADS = 4
Bucket = Callable[[Tensor, Tensor], Tensor]


class Masked(nn.Module):
    """The last lines before a core: a table read by bucket, hidden where `seen` is false."""

    def __init__(self, bucket: Bucket, rows: int, seen: str, change: str = "") -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(rows, HEADS))
        self.other = nn.Parameter(torch.randn(rows, HEADS))
        self.linear = nn.Linear(8, HEADS)
        self.register_buffer("slopes", torch.linspace(0.1, 1, HEADS)[:, None, None])
        self.bucket, self.seen, self.change = bucket, seen, change

    def forward(self, valid: Tensor) -> Tensor:
        n = valid.shape[1]
        i, j = torch.arange(n)[:, None], torch.arange(n)[None, :]
        table = self.table
        if self.change == "two tables":
            table = table + self.other
        elif self.change == "scaled":
            table = 2.0 * table
        elif self.change == "squashed":
            table = table.tanh()
        elif self.change == "heads turned round":
            table = table.flip(1)
        bias = table[self.bucket(i, j)].permute(2, 0, 1)[None]
        if self.change == "slopes only":
            bias = (self.slopes * (j - i))[None]
        elif self.change == "slopes of keys":
            bias = (self.slopes * (j + 7))[None] + i.sin()[None, None]
        elif self.change == "curved":
            bias = (self.slopes * (j - i) ** 2)[None]
        elif self.change == "slopes too":
            bias = bias + self.slopes * (j - i)
        elif self.change == "from hidden states":
            hidden = valid[..., None].float().expand(-1, -1, 8)
            bias = self.linear(hidden).transpose(1, 2)[:, :, None, :] + bias
        seen = j <= i if self.seen == "causal" else torch.ones(n, n, dtype=torch.bool)
        if self.seen == "sliding":
            seen = (j <= i) & (j > i - 5)
        seen = seen[None, None] & (valid != 0)[:, None, None, :]
        return torch.where(seen, bias, torch.finfo(bias.dtype).min)


def probe(module: nn.Module, dtype: torch.dtype = torch.float32) -> FoundMask:
    """Export, and read the module's result as the mask of a core."""
    inputs = {"valid": torch.ones(2, 11, dtype=torch.long)}
    shapes = {"valid": dict.fromkeys((0, 1), torch.export.Dim.AUTO)}
    program = torch.export.export(
        module.to(dtype).eval(), (), inputs, dynamic_shapes=shapes, strict=False
    )
    gm: Any = program.module()
    (output,) = [n for n in gm.graph.nodes if n.op == "output"]
    (mask,) = output.args[0]

    def inputs_at(length: int | None, padded: bool) -> dict[fx.Node, Any]:
        values = dict(inputs) if length is None else resized(inputs, 11, length)
        if padded:
            values["valid"] = values["valid"].clone()
            values["valid"][0, :3] = 0
        (place,) = [n for n in gm.graph.nodes if n.op == "placeholder"]
        return {place: values["valid"]}

    return read_mask(gm, mask, False, inputs_at)


def clipped(far: int) -> Bucket:
    return lambda i, j: (j - i).clamp(-far, far) + far


def test_every_distance_gets_its_row() -> None:
    found = probe(Masked(clipped(3), 7, "full"))
    assert found.bias is not None
    assert found.pattern.kind == "full"
    assert found.follows_padding
    assert (found.bias.weight, found.bias.rows) == ("table", 7)
    assert found.bias.buckets == (0, 1, 2, 3, 4, 5, 6)


def test_hidden_distances_take_the_row_of_distance_zero() -> None:
    found = probe(Masked(clipped(3), 7, "causal"))
    assert found.bias is not None
    assert found.pattern.kind == "causal"
    assert found.bias.buckets == (0, 1, 2, 3, 3, 3, 3)


def test_a_window_needs_no_saturation() -> None:
    found = probe(Masked(clipped(600), 1201, "sliding"))
    assert found.bias is not None
    assert (found.pattern.kind, found.pattern.window) == ("sliding", 5)
    assert found.bias.buckets == (596, 597, 598, 599, 600, 600, 600, 600, 600)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_more_rows_than_a_short_float_counts(dtype: torch.dtype) -> None:
    found = probe(Masked(clipped(150), 301, "full"), dtype)
    assert found.bias is not None
    assert found.bias.buckets == tuple(range(301))


def test_a_table_of_zeros_is_still_a_table() -> None:
    module = Masked(clipped(2), 5, "full")
    module.table.data.zero_()
    found = probe(module)
    assert found.bias is not None
    assert found.bias.buckets == (0, 1, 2, 3, 4)


REFUSED = {
    "products of positions": (lambda i, j: (i * j).clamp(max=6), "", "distance"),
    "differs far away": (clipped(600), "", "still changes 520 tokens away"),
    "two tables": (clipped(3), "two tables", "2 parameters"),
    "scaled": (clipped(3), "scaled", "computed from its table"),
    "squashed": (clipped(3), "squashed", "computed from its table"),
    "heads turned round": (clipped(3), "heads turned round", "column h"),
    "curved": (clipped(3), "curved", "not linear in key position"),
    "slopes too": (clipped(3), "slopes too", "a constant beside"),
    "from hidden states": (clipped(3), "from hidden states", "hidden states"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_other_biases_are_refused_for_their_own_reason(case: str) -> None:
    bucket, change, reason = REFUSED[case]
    with pytest.raises(NotUnderstood, match=reason):
        probe(Masked(bucket, 1201, "full", change))


@pytest.mark.parametrize("change", ["slopes only", "slopes of keys"])
@pytest.mark.parametrize("seen", ["full", "causal", "sliding"])
def test_alibi_is_its_slopes(change: str, seen: str) -> None:
    found = probe(Masked(clipped(3), 5, seen, change))
    assert isinstance(found.bias, Alibi)
    expected = torch.linspace(0.1, 1, HEADS).double()
    torch.testing.assert_close(torch.tensor(found.bias.slopes).double(), expected)
    assert found.pattern.kind == seen


def test_a_mask_without_bias_has_none() -> None:
    class Plain(nn.Module):
        def forward(self, valid: Tensor) -> Tensor:
            n = valid.shape[1]
            seen = torch.ones(n, n, dtype=torch.bool).tril()[None, None]
            return torch.where(seen & (valid != 0)[:, None, None, :], 0.0, -3.4e38)

    found = probe(Plain())
    assert found.bias is None
    assert found.pattern.kind == "causal"


def test_patterns() -> None:
    i, j = torch.arange(23)[:, None], torch.arange(23)[None, :]
    causal = j <= i
    assert classify(causal | True).kind == "full"
    assert classify(causal).kind == "causal"
    sliding = classify(causal & (j > i - 8))
    assert (sliding.kind, sliding.window) == ("sliding", 8)
    chunked = classify(causal & (i // 6 == j // 6))
    assert (chunked.kind, chunked.chunk) == ("chunked", 6)
    assert classify(causal & ((i - j) % 2 == 0)).kind == "opaque"
