"""What stands between a core and its projection: gates, norms, and what is refused."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import spelled_models as spelled
import torch
from torch import Tensor

import reattend.selfcheck as selfcheck
from reattend import convert, find_attention
from reattend.finder import FoundAttention
from reattend.mixers.base import Context
from reattend.mixers.kinds import build_mixer
from reattend.passes.find.sites import Found
from reattend.spec import Gate, Joined
from reattend.weights import build_dense

H, D = spelled.HEADS, spelled.HEAD


def per_dimension(self: Any, y: Tensor, x: Tensor) -> Tensor:
    return y.flatten(2) * torch.sigmoid(self.g_proj(x))


def per_head(self: Any, y: Tensor, x: Tensor) -> Tensor:
    return (torch.nn.functional.silu(self.h_proj(x))[..., None] * y).flatten(2)


def before_the_transpose(self: Any, y: Tensor, x: Tensor) -> Tensor:
    gate = self.g_proj(x).unflatten(-1, (D, H)).permute(0, 1, 3, 2)
    return (y * gate.tanh()).flatten(2)


def norm_then_gate(self: Any, y: Tensor, x: Tensor) -> Tensor:
    return self.norm(y.flatten(2)) * torch.sigmoid(self.g_proj(x))


def twice_the_gate(self: Any, y: Tensor, x: Tensor) -> Tensor:
    return y.flatten(2) * (2 * torch.sigmoid(1.7 * self.g_proj(x)))


def clipped(self: Any, y: Tensor, x: Tensor) -> Tensor:
    return y.flatten(2).clamp(-0.5, 0.5) * torch.sigmoid(self.g_proj(x))


def of_itself(self: Any, y: Tensor, x: Tensor) -> Tensor:
    return y.flatten(2) * torch.sigmoid(y.flatten(2))


def conv_beside(self: Any, y: Tensor, x: Tensor) -> Tensor:
    return y.flatten(2) + self.conv(x.transpose(1, 2)).transpose(1, 2)


def gain_by_position(self: Any, y: Tensor, x: Tensor) -> Tensor:
    return y.flatten(2) * (1 + torch.arange(x.shape[1], dtype=x.dtype))[:, None]


def found(join: Callable[..., Any]) -> tuple[Any, FoundAttention]:
    model = spelled.built(joined=join)
    return model, find_attention(model, spelled.inputs())


GATES = {per_dimension: ("sigmoid", False), per_head: ("silu", True)}
GATES[before_the_transpose] = ("tanh", False)


@pytest.mark.parametrize(
    "join",
    [
        per_dimension,
        norm_then_gate,
        *(pytest.param(j, marks=pytest.mark.slow) for j in (per_head, before_the_transpose)),
        *(pytest.param(j, marks=pytest.mark.slow) for j in (of_itself, twice_the_gate, clipped)),
    ],
)
def test_the_block_is_carried_with_its_join(join: Callable[..., Any]) -> None:
    model, seen = found(join)
    (site,) = seen.sites
    assert site.owner == "module"
    if join in GATES:
        assert isinstance(site.spec.join, Gate)
        assert (site.spec.join.act, site.spec.join.per_head) == GATES[join]
    else:
        assert isinstance(site.spec.join, Joined)
    inputs = spelled.inputs(3, 7)
    converted = convert(model, plan="identity", inputs=spelled.inputs()).model
    with torch.no_grad():
        gap = converted(**inputs) - model(**inputs)
    assert float(gap.abs().max()) <= 1e-5


@pytest.mark.parametrize("join", [conv_beside, gain_by_position])
def test_what_mixes_tokens_needs_them_all(join: Callable[..., Any]) -> None:
    model, seen = found(join)
    (site,) = seen.sites
    assert site.spec.whole
    converted = convert(model, plan="identity", inputs=spelled.inputs()).model
    with torch.no_grad():
        gap = converted(**spelled.inputs(3, 7)) - model(**spelled.inputs(3, 7))
    assert float(gap.abs().max()) <= 1e-5

    def inputs_at(length: int | None, padded: bool) -> Any:
        return seen.capture.placeholders(seen.capture.probe(length, padded))

    block = Found(replace(site.spec, whole=False), site.region, site.follows_padding)
    assert not selfcheck.self_check(seen.capture.gm, block, inputs_at).reason
    assert block.spec.whole


def folded(self: Any, x: Tensor) -> Tensor:
    """The joined heads fold into the batch, half by half, before they meet a weight."""
    q, k, v = (t.transpose(1, 2) for t in (self.queries(x), self.keys(x), self.values(x)))
    k, v = (t.repeat(1, spelled.HEADS // spelled.GROUPS, 1, 1) for t in (k, v))  # 0 1 0 1
    half = spelled.HEADS * spelled.HEAD // 2
    y = self.core(q, k, v).transpose(1, 2).reshape(-1, half)
    y = torch.nn.functional.linear(y, self.o_proj.weight[:, :half])
    return y.view(*x.shape[:2], 2, -1).sum(2)


def test_what_reads_the_joined_heads_in_another_shape_follows_the_block() -> None:
    model = spelled.built(forward=folded)
    (site,) = find_attention(model, spelled.inputs()).sites
    assert site.spec.out is None
    assert site.spec.core.kv_head_of == (0, 1, 0, 1)  # heads leave as the model orders them
    inputs = spelled.inputs(3, 7)
    converted = convert(model, plan="identity", inputs=spelled.inputs()).model
    with torch.no_grad():
        gap = converted(**inputs) - model(**inputs)
    assert float(gap.abs().max()) <= 1e-5


@pytest.mark.parametrize("join", [per_dimension, norm_then_gate])
def test_the_description_and_its_weights_build_it_again(join: Callable[..., Any]) -> None:
    model, seen = found(join)
    site = seen.sites[0]
    weights = dict(model.named_parameters())
    mixer = build_dense(site.spec, lambda n: weights[n].detach(), spelled.WIDTH, 0)
    described = mixer.described()
    again = build_mixer(described["kind"], described["config"])
    again.load_state_dict(mixer.state_dict())
    x = spelled.inputs()["x"]
    turn = (torch.rand(1, 11, D // 2), torch.rand(1, 11, D // 2))
    with torch.no_grad():
        torch.testing.assert_close(
            again(x, Context(rotation=turn)), mixer(x, Context(rotation=turn)), rtol=0, atol=0
        )


MUTATIONS: dict[str, Callable[[Any], Any]] = {
    "no gate": lambda spec: replace(spec, join=None),
    "activation": lambda spec: replace(spec, join=replace(spec.join, act="tanh")),
    "rows": lambda spec: replace(
        spec, join=replace(spec.join, rows=spec.join.rows[1:] + spec.join.rows[:1])
    ),
    "bias": lambda spec: replace(spec, join=replace(spec.join, bias=None)),
}


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_every_mutation_is_caught(mutation: str) -> None:
    _, seen = found(per_dimension)
    site = seen.sites[0]

    def inputs_at(length: int | None, padded: bool) -> Any:
        return seen.capture.placeholders(seen.capture.probe(length, padded))

    wrong = Found(MUTATIONS[mutation](site.spec), site.region, site.follows_padding)
    proof = selfcheck.self_check(seen.capture.gm, wrong, inputs_at)
    assert "not understood" in proof.reason
