"""Streams that begin with the model's own steps: carried along, or refused with the reason."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import spelled_models as spelled
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

import reattend.selfcheck as selfcheck
from reattend import convert, find_attention
from reattend.passes.find.sites import Found
from reattend.spec import Opaque, Rotary

H, G, D = spelled.HEADS, spelled.GROUPS, spelled.HEAD


def clipped(self: Any, x: Tensor) -> Tensor:
    return self.q_proj(x).clamp(-0.7, 0.7).unflatten(-1, (H, D))


def clipped_in_place(self: Any, x: Tensor) -> Tensor:
    q = self.q_proj(x)
    q.clamp_(-0.7, 0.7)
    return q.unflatten(-1, (H, D))


def two_projections(self: Any, x: Tensor) -> Tensor:
    return (self.q_proj(x) + self.b_proj(self.a_proj(x))).unflatten(-1, (H, D))


def gain_per_head(self: Any, x: Tensor) -> Tensor:
    return F.layer_norm(self.q_proj(x).unflatten(-1, (H, D)), (D,)) * self.gain


def unit_length(self: Any, x: Tensor) -> Tensor:
    q = F.normalize(self.q_proj(x).unflatten(-1, (H, D)), dim=-1)
    return q * self.gain[:, :1].clamp(max=1.2).exp()


def squared_values(self: Any, x: Tensor) -> Tensor:
    return self.v_proj(x).unflatten(-1, (G, D)).relu().square()


def conv_before(self: Any, x: Tensor) -> Tensor:
    y = self.conv(self.q_proj(x).transpose(1, 2)).transpose(1, 2)
    return y.unflatten(-1, (H, D))


def by_position(self: Any, x: Tensor) -> Tensor:
    place = torch.arange(x.shape[1])[None, :, None]
    return (self.q_proj(x).tanh() * (1 + place)).unflatten(-1, (H, D))


def routed(self: Any, x: Tensor) -> Tensor:
    """Experts read tokens folded into the batch."""
    tokens = x.reshape(-1, x.shape[-1])
    share = self.h_proj(tokens).softmax(-1)
    q = self.q_proj(tokens) * share[:, :1] + self.g_proj(tokens) * share[:, 1:2]
    return q.view(*x.shape[:2], H, D)


QUERIES = [clipped, two_projections, gain_per_head, unit_length]


@pytest.mark.parametrize(
    "queries",
    [clipped_in_place, routed, *(pytest.param(q, marks=pytest.mark.slow) for q in QUERIES)],
)
def test_queries(queries: Callable[..., Any]) -> None:
    model = spelled.built(queries=queries)
    (site,) = find_attention(model, spelled.inputs()).sites
    assert isinstance(site.spec.q.proj, Opaque)
    assert not isinstance(site.spec.k.proj, Opaque)
    assert site.spec.q.first(Rotary) is not None  # still known: only the beginning is opaque
    assert site.spec.core.kv_heads == G
    _same(model)


def test_values_keep_their_groups() -> None:
    model = spelled.built(values=squared_values)
    (site,) = find_attention(model, spelled.inputs()).sites
    assert isinstance(site.spec.v.proj, Opaque)
    assert site.spec.core.kv_heads == G
    assert site.spec.cache_per_token == 2 * G * D
    _same(model)


def _same(model: Any) -> None:
    converted = convert(model, plan="identity", inputs=spelled.inputs()).model
    for batch, length in ((3, 7), (1, 1)):
        inputs = spelled.inputs(batch, length)
        with torch.no_grad():
            gap = converted(**inputs) - model(**inputs)
        assert float(gap.abs().max()) <= 1e-5


def test_key_heads_shared_unequally_are_kept_per_query_head() -> None:
    def core(self: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        k, v = k[:, [0, 0, 0, 2]], v[:, [0, 0, 0, 2]]
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)

    model = spelled.built(core=core)
    (site,) = find_attention(model, spelled.inputs()).sites
    assert site.spec.core.kv_heads == H
    _same(model)


@pytest.mark.parametrize("queries", [conv_before, by_position])
def test_what_mixes_tokens_needs_them_all(queries: Callable[..., Any]) -> None:
    model = spelled.built(queries=queries)
    seen = find_attention(model, spelled.inputs())
    (site,) = seen.sites
    assert site.spec.whole
    _same(model)

    def inputs_at(length: int | None, padded: bool) -> Any:
        return seen.capture.placeholders(seen.capture.probe(length, padded))

    block = Found(replace(site.spec, whole=False), site.region, site.follows_padding)
    assert not selfcheck.self_check(seen.capture.gm, block, inputs_at).reason
    assert block.spec.whole


def test_a_wrong_row_is_caught() -> None:
    seen = find_attention(spelled.built(queries=clipped), spelled.inputs())
    site = seen.sites[0]
    own = site.spec.q.proj
    assert isinstance(own, Opaque)
    turned = replace(own, rows=own.rows[1:] + own.rows[:1])
    spec = replace(site.spec, q=replace(site.spec.q, steps=(turned, *site.spec.q.steps[1:])))

    def inputs_at(length: int | None, padded: bool) -> Any:
        return seen.capture.placeholders(seen.capture.probe(length, padded))

    wrong = Found(spec, site.region, site.follows_padding)
    assert "not understood" in selfcheck.self_check(seen.capture.gm, wrong, inputs_at).reason


def test_mla_takes_queries_of_any_kind_and_names_what_it_does_not_take() -> None:
    from reattend.passes.rewrite.base import dense_cost
    from reattend.passes.rewrite.mla import ToMla
    from reattend.weights import build_dense, dense_config

    for methods, words in (({"queries": clipped}, ""), ({"values": squared_values}, "values are")):
        model = spelled.built(**methods)
        (site,) = find_attention(model, spelled.inputs()).sites
        config = dense_config(site.spec, spelled.WIDTH, 0)
        refusal = ToMla().check(config, ToMla().exact_setting(config))
        assert (refusal is None) == (not words)
        built = build_dense(site.spec, dict(model.named_parameters()).__getitem__, spelled.WIDTH, 0)
        held = sum(p.numel() for p in built.parameters())
        assert dense_cost(config).parameters == held
        assert refusal is None or words in refusal.reason
