"""Linear attention of blocks that see everything: the papers' formulas by loops, exact settings."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from mla_blocks import HIDDEN, config, dense
from pydantic import ValidationError
from torch import Tensor

from reattend.mixers import top_blocks
from reattend.mixers.base import Context
from reattend.mixers.estimated import Estimated
from reattend.mixers.everywhere_config import EverywhereConfig
from reattend.mixers.kinds import build_mixer
from reattend.passes.rewrite.base import dense_cost
from reattend.passes.rewrite.linear import LinearOptions, ToLinear

WAYS: dict[str, dict[str, Any]] = {
    "linfusion": {"feature_map": "mlp", "mlp_width": 5},
    "flowformer": {"feature_map": "sigmoid", "flow": True},
    "sla": {"feature_map": "softmax", "sparse_top": 0.4, "sparse_block": 4},
    "scatterbrain": {
        "feature_map": "performer", "feature_dim": 11, "sparse_top": 0.4, "sparse_block": 4,
        "lowrank": True,
    },
    "performer": {"feature_map": "performer", "feature_dim": 11},
    "sea": {"feature_map": "performer", "feature_dim": 11, "sparse_top": 0.4, "estimate": 5},
}  # fmt: skip
EXACT: dict[str, dict[str, Any]] = {
    name: {**WAYS[name], "sparse_top": 1.0} for name in ("sla", "scatterbrain", "sea")
}


def both_ways(**more: Any) -> Any:
    block = config(**more)
    core = block.core.model_copy(update={"pattern": "full"})
    return block.model_copy(update={"core": core})


def built(block: Any, trained: bool = True, **options: Any) -> Any:
    """The mixer; `trained` shakes what starts at a fixed value."""
    made = LinearOptions(direction="bidirectional", window=0, **options)
    mixer = ToLinear().build(block, None, made).mixer
    if trained:
        torch.manual_seed(7)
        for parameter in mixer.everywhere.parameters():
            parameter.data = parameter + 0.5 * torch.randn_like(parameter)
    return mixer


def inputs(n: int, rows: int = 1) -> Tensor:
    torch.manual_seed(n)
    return torch.randn(rows, n, HIDDEN, dtype=torch.float64)


def streams(mixer: Any, x_ND: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values [H, N, d] of one row, as the block itself projects them."""
    (q, _), new = mixer.project(x_ND[None], x_ND[None], Context(), None)
    repeat = mixer.config.core.heads // mixer.config.core.kv_heads
    return q[0], *(x[0].repeat_interleave(repeat, 0) for x in new.rows)


def outputs(mixer: Any, y_HNe: Tensor) -> Tensor:
    return mixer.o_proj(y_HNe.transpose(0, 1).flatten(1))


def linfusion(mixer: Any, x_ND: Tensor) -> Tensor:
    """Queries and keys from x + f(x), then sums with ELU + 1."""
    e = mixer.everywhere
    moved = []
    for f in (e.map_q, e.map_k):
        inner = x_ND @ f.inner.weight.T + f.inner.bias
        mean, var = inner.mean(-1, keepdim=True), inner.var(-1, correction=0, keepdim=True)
        inner = (inner - mean) / (var + 1e-5).sqrt() * f.norm.weight + f.norm.bias
        inner = torch.where(inner > 0, inner, 0.01 * inner)
        moved.append(x_ND + inner @ f.outer.weight.T + f.outer.bias)
    plain = ToLinear().build(
        dense(mixer.config), None,
        LinearOptions(direction="bidirectional", window=0, feature_map="elu+1"),
    ).mixer  # fmt: skip
    plain.load_state_dict(mixer.state_dict(), strict=False)
    q = streams(plain, moved[0])[0]
    k, v = streams(plain, moved[1])[1], streams(plain, x_ND)[2]
    f_q, f_k = (torch.where(x > 0, x + 1, x.exp()) for x in (q, k))
    weight = torch.einsum("hnf,hmf->hnm", f_q, f_k)
    return weight @ v / weight.sum(-1, keepdim=True)


def flowformer(mixer: Any, x_ND: Tensor) -> Tensor:
    """Key by key and query by query, as the paper writes it."""
    q, k, v = streams(mixer, x_ND)
    heads, n, _ = q.shape
    out = torch.zeros_like(v)
    for h in range(heads):
        fq, fk = 1 / (1 + (-q[h]).exp()), 1 / (1 + (-k[h]).exp())
        into = [sum(float(fq[i] @ fk[j]) for j in range(n)) for i in range(n)]
        away = [sum(float(fk[j] @ fq[i]) for i in range(n)) for j in range(n)]
        taken = [sum(float(fq[i] @ fk[j]) / away[j] for j in range(n)) for i in range(n)]
        given = [sum(float(fk[j] @ fq[i]) / into[i] for i in range(n)) for j in range(n)]
        race = torch.tensor([min(max(g, -1.0), 1.0) for g in given], dtype=q.dtype).exp()
        race = race / race.sum() * n
        for i in range(n):
            mixed = sum(float(fq[i] @ fk[j]) / into[i] * race[j] * v[h, j] for j in range(n))
            out[h, i] = mixed / (1 + torch.exp(torch.tensor(-taken[i], dtype=q.dtype)))
    return out


def chosen(mixer: Any, q: Tensor, k: Tensor) -> Tensor:
    """Which keys each query attends to exactly, [H, N, N], from means of blocks."""
    c, n = mixer.config, q.shape[1]
    seen = torch.zeros(len(q), n, n, dtype=torch.bool)
    begins = range(0, n, c.sparse_block)
    most = -int(-len(begins) * c.sparse_top // 1)
    smooth = k - k.mean(1, keepdim=True)  # the paper subtracts the mean key
    for h in range(len(q)):
        for a in begins:
            rows = slice(a, a + c.sparse_block)
            means = [smooth[h, b : b + c.sparse_block].mean(0) for b in begins]
            scores = [float(q[h, rows].mean(0) @ mean) for mean in means]
            for p in sorted(range(len(begins)), key=lambda p: -scores[p])[:most]:
                seen[h, rows, begins[p] : begins[p] + c.sparse_block] = True
    return seen


def sla(mixer: Any, x_ND: Tensor) -> Tensor:
    q, k, v = streams(mixer, x_ND)
    scores = (q @ k.transpose(-1, -2) * mixer.config.core.scale).exp() * chosen(mixer, q, k)
    weight = torch.einsum("hnf,hmf->hnm", q.softmax(-1), k.softmax(-1))
    rest = mixer.everywhere.rest
    linear = weight @ v / weight.sum(-1, keepdim=True)
    return scores @ v / scores.sum(-1, keepdim=True) + linear @ rest.weight.T + rest.bias


def scatterbrain(mixer: Any, x_ND: Tensor) -> Tensor:
    q, k, v = streams(mixer, x_ND)
    c, w = mixer.config, mixer.everywhere.estimated.weight_Gfd
    w = w.repeat_interleave(c.core.heads // c.core.kv_heads, 0)
    a, b = (x * c.core.scale**0.5 for x in (q, k))
    f, g = ((x @ w.transpose(-1, -2) - x.square().sum(-1)[..., None] / 2).exp() for x in (a, b))
    weight = f @ g.transpose(-1, -2) / w.shape[1]
    if c.sparse_top:
        exact = (a @ b.transpose(-1, -2)).exp()
        weight = torch.where(chosen(mixer, q, k), exact, weight)
    return weight @ v / weight.sum(-1, keepdim=True)


def sea(mixer: Any, x_ND: Tensor) -> Tensor:
    """Columns by the network's own layers, then attention query by query."""
    (q, k, v), net = streams(mixer, x_ND), mixer.everywhere.estimate
    many, scale, n = mixer.config.estimate, mixer.config.core.scale, len(x_ND)
    w = net.context.weight_Gfd.repeat_interleave(len(q) // len(net.context.weight_Gfd), 0)
    a, b = (x * scale**0.5 for x in (q, k))
    f, g = ((x @ w.transpose(-1, -2) - x.square().sum(-1)[..., None] / 2).exp() for x in (a, b))
    weight = f @ g.transpose(-1, -2)
    seen = torch.cat([weight @ v / weight.sum(-1, keepdim=True), v], -1)
    inner = torch.nn.functional.gelu(net.norm(net.enter(seen)))
    rows = net.columns(inner)
    rows = rows + net.mend(net.mix(rows[None]).clamp_min(0))[0]
    gate, out = net.gate(inner), torch.zeros_like(v)
    for h in range(len(q)):
        for i in range(n):
            best = rows[h, i].argsort(descending=True)[: -int(-many * mixer.config.sparse_top // 1)]
            keys = [j for j in range(n) if j * many // n in best.tolist()]
            near = (q[h, i] @ k[h, keys].T * scale).softmax(-1) @ v[h, keys]
            out[h, i] = near + gate[h, i] * (v[h].mean(0) - near)
    return out


FORMULAS = {
    "linfusion": linfusion, "flowformer": flowformer, "sla": sla, "scatterbrain": scatterbrain,
    "performer": scatterbrain, "sea": sea,
}  # fmt: skip


@pytest.mark.parametrize("way", WAYS)
def test_outputs_are_those_of_the_papers_wherever_padding_stands(way: str) -> None:
    mixer = built(dense(both_ways()), **WAYS[way])
    x = inputs(18)
    with torch.no_grad():
        expected = outputs(mixer, FORMULAS[way](mixer, x[0]))
        got = mixer(x, Context())[0]
        assert (got - expected).abs().max() <= 1e-11 * expected.abs().max()
        padded = torch.cat([inputs(5), x, inputs(3)], 1).repeat(2, 1, 1)
        real = torch.ones(2, 26, dtype=torch.bool)
        real[0, :5] = real[0, 23:] = False
        place = (torch.arange(26) - 5)[None].expand(2, -1)
        y = mixer(padded, Context(mask=real, position_BN=place))
        assert (y[0, 5:23] - expected).abs().max() <= 1e-11 * expected.abs().max()
        whole = mixer(padded[1:], Context(position_BN=place[1:]))
        assert (y[1] - whole[0]).abs().max() <= 1e-11 * whole.abs().max()


@pytest.mark.parametrize("name", EXACT)
def test_with_all_blocks_and_nothing_trained_it_is_softmax_attention(name: str) -> None:
    block = dense(both_ways(bias=True, norm=True))
    x, real = inputs(19, 2), torch.ones(2, 19, dtype=torch.bool)
    real[1, 13:] = False
    given = LinearOptions(direction="bidirectional", window=0, **EXACT[name])
    for made in (given, ToLinear().exact_setting(block.config)):
        result = ToLinear().build(block, None, made)
        assert result.exactness == "exact"
        with torch.no_grad():
            gap = (result.mixer(x, Context(mask=real)) - block(x, Context(mask=real)))[real]
        assert gap.abs().max() <= 1e-12


def test_starts_add_nothing_and_near_all_blocks_only_rounding() -> None:
    """LinFusion starts as ELU + 1; a share that comes to all blocks subtracts what it added."""
    block, x = dense(both_ways()), inputs(19)
    with torch.no_grad():
        plain = built(block, False, feature_map="elu+1")(x, Context())
        assert torch.equal(built(block, False, **WAYS["linfusion"])(x, Context()), plain)
        nearly = built(block, False, **{**WAYS["scatterbrain"], "sparse_top": 0.9})
        assert (nearly(x, Context()) - block(x, Context())).abs().max() <= 1e-9


@pytest.mark.parametrize("n", [200, 256])
def test_long_calls_through_the_op_give_the_same_and_the_same_gradient(
    n: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    mixer = built(dense(both_ways()), **{**WAYS["sla"], "sparse_block": 32, "sparse_top": 0.3})
    x, found = inputs(n, 2), []
    for least in (n, n + 1):
        monkeypatch.setattr(top_blocks, "LEAST", least)
        mixer.zero_grad()
        y = mixer(x, Context())
        y.square().sum().backward()
        found.append((y.detach(), mixer.k_proj.weight.grad.clone()))
    for a, b in zip(*found, strict=True):
        assert (a - b).abs().max() <= 1e-10 * b.abs().max()


def test_estimates_come_closer_with_more_features() -> None:
    q, k, v = (0.2 * inputs(24, 4)[..., i : i + 8][None] for i in (0, 8, 16))
    wanted = (q @ k.transpose(-1, -2)).softmax(-1) @ v
    gaps = []
    for features in (8, 512):
        estimated = Estimated(EverywhereConfig(), 4, 8, features)
        estimated.start()
        with torch.no_grad():
            gaps.append(float((estimated(q, k, v, 1.0, None) - wanted).square().mean()))
    assert gaps[1] < 0.1 * gaps[0] < 0.1 * float(wanted.square().mean())


def test_estimated_rows_learn_which_columns_the_block_attends_to() -> None:
    """The block's own attention is the teacher, and learns nothing by it."""
    options = {**WAYS["sea"], "sparse_top": 0.25, "estimate": 8, "feature_dim": 16}
    mixer = built(dense(both_ways()), False, **options).train()
    net, x = mixer.everywhere.estimate, 0.5 * inputs(32, 4)
    optimizer = torch.optim.Adam(net.parameters(), 3e-2)
    found: list[float] = []
    for _ in range(40):
        mixer(x, Context())
        loss = net.own_loss()
        found.append(float(loss.detach()))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert found[-1] < 0.6 * found[0] and net.own_loss() is None
    with torch.no_grad():
        mixer(x, Context())
        assert net.own_loss() is None  # nothing is compared where nothing is trained
    assert mixer.q_proj.weight.grad is None


@pytest.mark.parametrize("way", WAYS)
def test_a_stored_description_builds_the_same_and_parameters_are_as_forecast(way: str) -> None:
    block = dense(both_ways())
    mixer = built(block, **WAYS[way])
    again = build_mixer(**mixer.described()).double()
    again.load_state_dict(mixer.state_dict())
    x = inputs(11)
    assert torch.equal(again(x, Context()), mixer(x, Context()))
    made = LinearOptions(direction="bidirectional", window=0, **WAYS[way])
    cost = ToLinear().cost(block.config, made)
    assert sum(p.numel() for p in mixer.parameters()) == cost.parameters
    assert cost.flops_per_token < dense_cost(block.config).flops_per_token


def test_options_that_contradict_each_other_are_named() -> None:
    for wrong, words in (
        ({"direction": "causal", "feature_map": "mlp"}, "for direction: bidirectional"),
        ({"mlp_width": 4}, "mlp_width is for"),
        ({"flow": True, "feature_map": "identity", "normalize": "none"}, "not negative"),
        ({"flow": True, "feature_map": "sigmoid", "state": "per-kv-head"}, "flow needs normalize"),
        ({"lowrank": True}, "lowrank needs sparse_top"),
        ({"feature_map": "performer", "sparse_top": 0.1}, "set lowrank: true"),
        ({"sparse_block": 32}, "sparse_block is for"),
        ({"estimate": 8}, "estimate needs sparse_top"),
    ):
        with pytest.raises(ValidationError, match=words):
            LinearOptions(**{"direction": "bidirectional", "window": 0, **wrong})
