"""KV heads merged: exact where they were turned copies, never worse than the published mean."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from decoder_models import decoder, prompts
from mla_blocks import CASES, config, dense, moments
from moh_blocks import wide
from test_moh import FULL_NORM, gap, inputs

from reattend import convert, load
from reattend.mixers.base import Context
from reattend.mixers.config import GateConfig
from reattend.passes.rewrite.gqa import GqaOptions, ToGqa
from reattend.passes.rewrite.gqa_groups import neighbours, similar
from reattend.passes.rewrite.gqa_solve import merge, merge_keys

#: heads 0 and 2 are copies of each other, and 1 and 3
COPIES = {2: 0, 3: 1}
TURNABLE = [
    n for n, c in CASES.items()
    if c.out_features and c.q.norm is None and (c.gate is None or c.gate.per_head)
]  # fmt: skip


def merged(block: Any, **options: Any) -> Any:
    made, given = ToGqa(), GqaOptions(**options)
    refusal = made.check(block.config, given)
    assert refusal is None, refusal
    needs = made.wants(block.config, given)
    return made.build(block, moments(block) if needs else None, given)


def turned_copies(block: Any) -> Any:
    """Every pair of `COPIES` up to a complex factor per frequency, and a matrix for all else."""
    core, rotary = block.config.core, block.config.rotary
    d, e, pairs = core.qk_head_dim, core.v_head_dim, rotary.pairs if rotary else 0
    for copy, source in COPIES.items():
        turn = torch.zeros(d, d, dtype=torch.float64)
        factor = torch.randn(pairs, dtype=torch.complex128)
        f = torch.arange(pairs)
        turn[f, f] = turn[f + pairs, f + pairs] = factor.real
        turn[f + pairs, f], turn[f, f + pairs] = factor.imag, -factor.imag
        turn[2 * pairs :, 2 * pairs :] = torch.randn(d - 2 * pairs, d - 2 * pairs).double()
        for module, by in ((block.k_proj, turn), (block.v_proj, torch.randn(e, e).double())):
            for tensor in (module.weight, module.bias):
                if tensor is not None:
                    rows = tensor.data.unflatten(0, (core.kv_heads, -1))
                    rows[copy] = by @ rows[source]
    return block


@pytest.mark.parametrize("name", TURNABLE)
def test_turned_copies_merge_exactly(name: str) -> None:
    """Found as such, whatever their order; only what commutes with the rotation was used."""
    block = turned_copies(dense(wide(CASES[name])))
    built = merged(block, num_key_value_heads=2)
    assert built.evidence["merged"] == "0+2, 1+3"
    x, real = inputs(9)
    with torch.no_grad():
        got, expected = (m(x, Context(mask=real)) for m in (built.mixer, block))
    assert gap(got, expected, real) <= 1e-12
    assert built.mixer.row_shapes[0][0] == 2
    made = ToGqa().outcome(block.config, GqaOptions(num_key_value_heads=2))
    assert built.mixer.config == made or name == "alibi"


def test_the_exact_setting_is_the_original() -> None:
    block = dense(wide(config()))
    assert merged(block, **ToGqa().exact_setting(block.config).model_dump()).mixer is block


def test_the_mean_is_the_published_one_and_measures_nothing() -> None:
    block = dense(wide(config(norm=True, bias=True)))
    given = {"keys": "mean", "values": "mean", "group": "neighbours"}
    assert not ToGqa().wants(block.config, GqaOptions(**given))
    mixer = merged(block, num_key_value_heads=2, **given).mixer
    for part in ("k_proj.weight", "v_proj.weight", "k_proj.bias"):
        rows = block.state_dict()[part].unflatten(0, (2, 2, 8)).mean(1).flatten(0, 1)
        assert torch.allclose(mixer.state_dict()[part], rows, atol=1e-15)
    assert torch.equal(mixer.q_proj.weight, block.q_proj.weight)


def test_no_merge_loses_less_than_the_joint_one() -> None:
    """Nor does any found by gradients: 3 heads of width 2, real, and of complex pairs."""
    torch.manual_seed(1)
    for dtype in (torch.float64, torch.complex128):
        y = torch.randn(40, 6, dtype=dtype) @ torch.randn(6, 6, dtype=dtype)
        moment = y.mT @ y.conj() / 40
        root = torch.randn(3, 2, 2, dtype=dtype)
        cost = root.mH @ root
        best = merge(moment, cost, "joint")
        each = {m: merge(moment, cost, m).lost for m in ("joint", "procrustes", "mean")}
        assert each["joint"] < each["procrustes"] < each["mean"]
        found = [best.up.clone().requires_grad_(), best.down.clone().requires_grad_()]
        for p in found:
            p.data += 0.3 * torch.randn_like(p)
        step = torch.optim.LBFGS(found, max_iter=400, line_search_fn="strong_wolfe")

        def error(found=found, y=y, cost=cost) -> Any:
            off = (y - y @ (found[0].flatten(0, 1) @ found[1]).mT).unflatten(1, (3, 2))
            return torch.einsum("nga,gab,ngb->", off.conj(), cost, off).real / 40

        def closure(step=step, error=error) -> Any:
            step.zero_grad()
            loss = error()
            loss.backward()
            return loss

        step.step(closure)
        assert best.lost == pytest.approx(float(error().detach()), rel=1e-4)


def test_keys_of_a_rotated_pair_keep_to_its_frequency() -> None:
    """The maps commute with the rotation of every position."""
    block = dense(config(4, 4, pairs=3))
    moment, cost = torch.rand(2, 32, 32, dtype=torch.float64)
    moment = moment @ moment.mT
    cost = torch.stack([c @ c.mT for c in cost.reshape(4, 8, 32)])
    made = merge_keys(block.config.rotary, moment, cost, "joint")
    angle = 0.7 * torch.tensor(block.config.rotary.inv_freq, dtype=torch.float64)
    turn = torch.eye(8, dtype=torch.float64)
    f = torch.arange(3)
    turn[f, f] = turn[f + 3, f + 3] = angle.cos()
    turn[f + 3, f], turn[f, f + 3] = angle.sin(), -angle.sin()
    for u, d in zip(made.up, made.down.unflatten(1, (4, 8)).transpose(0, 1), strict=True):
        assert torch.allclose(u @ turn, turn @ u, atol=1e-12)
        assert torch.allclose(d @ turn, turn @ d, atol=1e-12)


def test_groups_are_exchanged_until_none_helps() -> None:
    cost = torch.full((6, 6), 5.0)
    for group in ((0, 3, 4), (1, 2, 5)):
        for a in group:
            cost[a, list(group)] = 1.0
    assert similar(cost, 2) == [[0, 3, 4], [1, 2, 5]]
    assert similar(torch.ones(4, 4), 2) == neighbours(4, 2) == [[0, 1], [2, 3]]


GATED = GateConfig(act="silu", per_head=False)


@pytest.mark.parametrize(
    ("cfg", "options", "reason"),
    [
        (config(8, 4), {"num_key_value_heads": 3}, "use 1, 2, 4"),
        (config(8, 4), {"num_key_value_heads": 5}, "num_key_value_heads 5"),
        (config(4, 1), {}, "nothing would be merged"),
        (config(8, 4, norm=True), {}, "queries are normalised"),
        (config(8, 4, out=False), {"values": "mean"}, "another order of heads"),
        (config(8, 4, out=False), {"group": "neighbours"}, "turn values back"),
        (config(8, 4).model_copy(update={"gate": GATED}), {}, "every dimension"),
        (config(8, 4).model_copy(update={"v": FULL_NORM}), {}, "normalised over all heads"),
        (config(8, 4).model_copy(update={"memory_size": 24}), {}, "keys come from another"),
    ],
)
def test_what_does_not_fit_is_refused(cfg: Any, options: Any, reason: str) -> None:
    refusal = ToGqa().check(cfg, GqaOptions(**options))
    assert refusal is not None and reason in refusal.reason


def test_a_model_caches_less_and_generates(tmp_path: Any) -> None:
    """Reported, saved and loaded; decoding with a cache is checked by the conversion itself."""
    model = decoder("llama", layers=2, groups=4)
    rule = {"sites": "*", "to": "gqa", "num_key_value_heads": [0.5, 1]}
    data = torch.randint(3, 97, (8, 20))
    result = convert(model, plan={"rules": [rule]}, data=data, out=tmp_path / "m")
    told = [s.options for s in result.report.sites]
    assert [s["num_key_value_heads"] for s in told] == ["2 of 4", "1 of 4"]
    assert all(0 < float(s[f"{n}_lost"]) < 1 for s in told for n in ("keys", "values"))
    assert result.report.totals.cache_ratio == pytest.approx(3 / 8)
    ids, mask = prompts()
    run = {"attention_mask": mask, "max_new_tokens": 5, "do_sample": False}
    got = load(tmp_path / "m").generate(ids, **run)
    assert bool((got == result.model.generate(ids, use_cache=False, **run)).all())
