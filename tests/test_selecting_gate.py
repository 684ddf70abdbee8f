"""The trained gate: exact where it covers everything, a naive mask, its target, caches."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from decoder_models import decoder, prompts
from mla_blocks import CASES, HIDDEN, config, dense
from pydantic import ValidationError
from test_selecting import BOTH_WAYS, LONG, gap, inputs, scores
from torch import Tensor

from reattend import convert, load
from reattend.errors import DataError
from reattend.mixers.base import Context
from reattend.mixers.dense import DenseAttention
from reattend.mixers.kinds import build_mixer
from reattend.mixers.scores import own_pattern
from reattend.mixers.selecting.base import Asked
from reattend.mixers.sparse_config import HeadClass
from reattend.passes.rewrite.sparse import ToSparse
from reattend.passes.rewrite.sparse_baseline import BEHIND, compared, lines, stated
from reattend.passes.rewrite.sparse_gate import lesson as lesson_of
from reattend.passes.rewrite.sparse_options import SparseOptions
from reattend.passes.rewrite.sparse_view import viewed
from reattend.statistics import SiteStatistics


def options(steps: int = 30, **select: Any) -> SparseOptions:
    given = {"kind": "gate", "gate_dim": 16, **select}
    return SparseOptions.model_validate(
        {"pattern": {"select": given}, "finder": "gate", "steps": steps}
    )


def untrained(dense_block: DenseAttention, **select: Any) -> Any:
    """With weights at random."""
    mixer = ToSparse().build(dense_block, None, options(**select)).mixer
    for p in mixer.selecting.parameters():
        p.data = torch.randn_like(p)
    return mixer


def statistics(
    block: DenseAttention, rows: int = 8, tokens: int = 60, common: float = 0.0
) -> SiteStatistics:
    """Rows at random, all tokens moved by `common` x one vector."""
    found = SiteStatistics.empty(block, {"texts"})
    generator = torch.Generator().manual_seed(4)
    x = torch.randn(rows, tokens, HIDDEN, dtype=torch.float64, generator=generator)
    x = x + common * torch.randn(HIDDEN, dtype=torch.float64, generator=generator)
    with torch.no_grad():
        found.add(block, x, None, torch.ones(rows, tokens))
    return found


@pytest.mark.parametrize("budget", [{"topk": 99}, {"ratio": 1.0}, {"threshold": 0.0}, {"topp": 1}])
def test_a_budget_that_covers_everything_is_the_original(budget: dict[str, Any]) -> None:
    for name in ("gqa", "softcap", "window", "sinks"):
        block = dense(CASES[name])
        for size, n in ((7, 30), (64, LONG)):
            mixer = untrained(block, block=size, **budget)
            x, real = inputs(n)
            with torch.no_grad():
                assert gap(mixer(x, Context(mask=real)), block(x, Context(mask=real)), real) < 1e-12


def chosen(block: DenseAttention, mixer: Any, x: Tensor, size: int, topk: int) -> Tensor:
    """Block by block in Python: every query's own block and the best of those before it."""
    q, k, _ = scores(block, x)
    n, method = len(x), mixer.selecting["0"]
    seen = torch.zeros(4, n, n, dtype=torch.bool)
    for g in range(2):
        query = torch.cat([q[2 * g], q[2 * g + 1]], -1) @ method.query_GJw[g]
        for i in range(n):
            own, found = i // size, {}
            for b in range(own):
                part = k[2 * g, b * size : (b + 1) * size]
                known = torch.cat([part.max(0).values, part.min(0).values, part.mean(0)])
                found[b] = float(query[i] @ (known @ method.key_Gdw[g]))
            for b in (own, *sorted(found, key=lambda b: -found[b])[: topk - 1]):
                seen[2 * g : 2 * g + 2, i, b * size : min((b + 1) * size, i + 1)] = True
    return seen


@pytest.mark.parametrize(("size", "window"), [(5, 0), (64, 0), (5, 3)])
def test_what_is_chosen_equals_a_naive_mask(size: int, window: int) -> None:
    block = dense(config())
    mixer = untrained(block, block=size, topk=2)
    if window:
        both = SparseOptions.model_validate(
            {"pattern": {"window": window, "select": options(block=size, topk=2).pattern.select},
             "finder": "gate"}
        )  # fmt: skip
        other = ToSparse().build(block, None, both).mixer
        other.load_state_dict(mixer.state_dict())
        mixer = other
    for n in (30, LONG):
        x, real = inputs(n, (0, 7))
        near = torch.ones(n, n).tril().triu(1 - window if window else 0).bool()
        mask = torch.eye(n, dtype=torch.bool).expand(2, 4, n, n).clone()
        with torch.no_grad():
            for row, pad in enumerate((0, 7)):
                found = chosen(block, mixer, x[row, pad:], size, 2)
                mask[row, :, pad:, pad:] = found | near[pad:, pad:]
            at = (real.cumsum(-1) - 1).clamp_min(0)  # a gate reads rotated keys
            got = mixer(x, Context(mask=real, position_BN=at))
            assert gap(got, block(x, Context(mask=mask)), real) < 1e-12


@pytest.mark.parametrize("budget", [{"topk": 2}, {"threshold": 0.3}, {"topp": 0.6}])
def test_later_tokens_change_nothing(budget: dict[str, Any]) -> None:
    """Not even by their own, incomplete block."""
    mixer = untrained(dense(config()), block=16, **budget)
    x, _ = inputs(LONG, (0,))
    changed = x.clone()
    changed[:, 130:] = torch.randn_like(x[:, 130:])
    with torch.no_grad():
        a, b = mixer(x, Context()), mixer(changed, Context())
    assert (a - b)[:, :130].abs().max() < 1e-12 < (a - b)[:, 130:].abs().max()


def test_it_starts_as_routing_by_mean_keys() -> None:
    block = dense(config(4, 4))
    routing = {"pattern": {"select": {"kind": "blocks", "block": 5, "topk": 3}}}
    other = ToSparse().build(block, None, SparseOptions.model_validate(routing)).mixer
    mixer = ToSparse().build(block, None, options(block=5, topk=3)).mixer
    x, real = inputs(40)
    with torch.no_grad():
        assert gap(mixer(x, Context(mask=real)), other(x, Context(mask=real)), real) < 1e-12


@pytest.mark.parametrize("name", ["gqa", "softcap", "window", "sinks"])
def test_what_is_taught_is_the_largest_probability_of_each_block(name: str) -> None:
    block = dense(CASES[name])
    mixer = ToSparse().build(block, None, options(block=2, topk=2)).mixer
    x = torch.randn(11, HIDDEN, dtype=torch.float64)
    lesson = lesson_of(mixer, x, (0, 1), mixer.selecting["0"])
    assert lesson is not None
    with torch.no_grad():
        s, core = scores(block, x)[2], block.config.core
        s = torch.tanh(s / core.softcap) * core.softcap if core.softcap else s
        i, j = torch.arange(11)[:, None], torch.arange(11)
        s = s.masked_fill(~own_pattern(core, i, j), float("-inf")).exp()
        more = block.sinks.exp().view(4, 1, 1) if block.sinks is not None else 0.0
        p = (s / (s.sum(-1, keepdim=True) + more)).unflatten(0, (2, 2)).amax(1)
    row = 0
    for at in range(11):
        visible = [b for b in range(at // 2) if not core.window or 2 * b + 1 > at - core.window]
        if len(visible) < 2:
            continue
        best = torch.zeros(2, 5, dtype=torch.float64)
        for b in visible:
            best[:, b] = p[:, at, 2 * b : 2 * b + 2].amax(-1)
        expected = best / best.sum(-1, keepdim=True)
        assert (lesson.target_GNQ[:, row] - expected).abs().max() < 1e-12
        assert lesson.ranked_NQ[row].nonzero()[:, 0].tolist() == visible
        row += 1
    assert row == lesson.target_GNQ.shape[1] == lesson.q_1HNd.shape[2]


def test_training_brings_the_gate_nearer_and_is_repeatable() -> None:
    block = dense(config())
    asked = options(block=4, topk=2, steps=150)
    assert ToSparse().wants(block.config, asked) == {"gram", "texts"}
    built = ToSparse().build(block, statistics(block), asked)
    before, _, after = built.evidence["gate_kl"].split()[:3]
    assert float(after) < 0.97 * float(before)
    assert built.evidence["gate_kl"].endswith("on 1 rows not trained on")
    again = ToSparse().build(block, statistics(block), asked).mixer.state_dict()
    assert all(torch.equal(t, again[name]) for name, t in built.mixer.state_dict().items())
    counted = sum(p.numel() for p in built.mixer.parameters())
    assert counted == ToSparse().cost(block.config, asked).parameters
    assert built.evidence["gate_parameters"] == 2 * 16 * 8 * (2 + 3)
    loaded = build_mixer(**built.mixer.described()).double()
    loaded.load_state_dict(built.mixer.state_dict())
    x, real = inputs(30)
    with torch.no_grad():
        assert torch.equal(loaded(x, Context(mask=real)), built.mixer(x, Context(mask=real)))


def test_what_was_trained_is_compared_with_vertical_slash_heads_that_read_as_much() -> None:
    """Counted by the block's own probabilities and both masks, in the open."""
    block = dense(config())
    texts = statistics(block, tokens=40).samples
    mixer = untrained(block, block=4, topk=2)
    for p in mixer.selecting.parameters():
        p.data = torch.zeros_like(p)  # no gate could know less
    method = mixer.selecting["0"]
    sides = compared(mixer, texts[-1:], mixer.config.classes[0], method)
    assert sides is not None
    view = viewed(mixer, texts[-1], (0, 1))
    p = torch.cat([p for _, _, p in view.probabilities()])
    size = next(
        n for n in range(1, 41) if masked(view, lines(n)).sum() >= masked(view, method).sum()
    )
    for kept, one in zip(sides, (method, lines(size)), strict=True):
        read = masked(view, one)
        assert kept.keys == pytest.approx(float(read.sum()) / (4 * 40 * 41 / 2))
        assert kept.attention == pytest.approx(float((p * read).sum() / p.sum()))
    ours, theirs = sides
    assert theirs.keys >= ours.keys
    assert BEHIND in stated(ours, theirs._replace(attention=ours.attention))
    assert BEHIND not in stated(ours, theirs._replace(attention=ours.attention - 1e-6))


def test_what_is_compared_has_the_terms_beside_the_gate_and_leaves_something_out() -> None:
    block = dense(config())
    texts = statistics(block, tokens=40).samples[-1:]
    mixer = untrained(block, block=4, topk=2)
    (heads,), method = mixer.config.classes, mixer.selecting["0"]
    sinks = HeadClass(
        kv_heads=(0, 1), pattern=heads.pattern.model_copy(update={"sinks": 4, "window": 9})
    )
    few, more = (compared(mixer, texts, c, method) for c in (heads, sinks))
    assert few is not None and more is not None and more[0].keys > few[0].keys + 0.1
    whole = HeadClass(kv_heads=(0, 1), pattern=heads.pattern.model_copy(update={"window": 40}))
    every = compared(mixer, texts, whole, method)
    assert every is not None and every[0].keys == 1.0
    told = stated(*every)
    assert BEHIND not in told and told["attention_kept"].startswith("not compared")


def masked(view: Any, method: Any) -> Tensor:
    asked = Asked(view.q_HNd[None], view.k_GNd[None], view.core)
    i, j = asked.positions()
    return (method.choose(asked).mask()[0] | (i == j)) & (j <= i)


def test_a_converted_model_decodes_alike_with_and_without_a_cache(tmp_path: Any) -> None:
    select = {"kind": "gate", "block": 4, "gate_dim": 8, "topk": 2}
    rule = {"sites": "*", "to": "sparse", "pattern": {"select": select}}
    rule |= {"finder": "gate", "steps": 20}
    plan = {"rules": [rule], "calibrate": {"seq_len": 24}}
    data = torch.randint(3, 97, (8, 24), generator=torch.Generator().manual_seed(3))
    original = decoder("llama", layers=2, groups=2)
    result = convert(original, plan=plan, data=data, out=tmp_path / "s")
    ids, mask = prompts()
    run = {"attention_mask": mask, "max_new_tokens": 12, "do_sample": False}
    expected = result.model.generate(ids, use_cache=False, **run)
    out = result.model.generate(ids, return_dict_in_generate=True, **run)
    assert bool((out.sequences == expected).all())
    assert out.past_key_values.layers[1].memos[0].rows_BGQw.shape == (3, 2, 6, 8)
    assert bool((load(tmp_path / "s").generate(ids, **run) == expected).all())
    assert not bool((original.generate(ids, **run) == expected).all())
    site = result.report.sites[0]
    assert (
        site.options["gate_parameters"] == 2 * 8 * 8 * (2 + 3) and "->" in site.options["gate_kl"]
    )
    assert site.cost.after.parameters == site.cost.before.parameters + 640
    behind = [s.options.get(BEHIND) for s in result.report.sites]
    assert all(
        "untrained vertical-slash: 0." in s.options["attention_kept"] for s in result.report.sites
    )
    told = "does not beat untrained vertical-slash, reading as many" in result.report.to_markdown()
    assert told == any(behind)
    for entry in result.report.sites:  # one way or the other, the report says which
        entry.options[BEHIND] = "untrained vertical-slash"
    assert "In 2 of 2 blocks what was trained" in result.report.to_markdown()
    assert [p.verdict for p in result.report.parity] == ["pass", "pass"]


def test_rows_without_a_choice_are_refused() -> None:
    block = dense(config())
    with pytest.raises(DataError, match=r"too short to train"):
        ToSparse().build(block, statistics(block, 2), options(block=40, topk=2))


def test_what_cannot_be_is_refused() -> None:
    refusal = ToSparse().check(BOTH_WAYS, options(topk=2))
    assert refusal is not None and "gate needs a causal block" in refusal.reason
    select = {"select": {"kind": "gate", "topk": 2}}
    for given in (
        {"pattern": select},
        {"pattern": {"window": 4}, "finder": "gate"},
        {"candidates": [{"window": 4}, select], "kv_density": 0.5},
    ):
        with pytest.raises(ValidationError, match="go together"):
            SparseOptions.model_validate(given)
    with pytest.raises(ValidationError, match="not to be chosen"):
        SparseOptions.model_validate({"pattern": select, "keep_full": 0.5, "finder": "gate"})
