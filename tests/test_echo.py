"""Layers that attend where an earlier one did: exact where both attend alike; a smaller cache."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from decoder_models import decoder, prompts
from mla_blocks import GrowingState, config, dense, moments
from torch import Tensor
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from reattend import convert, load
from reattend.errors import ArgumentError
from reattend.install.spans import SpanCache
from reattend.install.stored import connect
from reattend.mixers.base import Context
from reattend.parts import kept_heads
from reattend.passes.rewrite import echo
from reattend.passes.rewrite.base import Subject
from reattend.passes.rewrite.echo import EchoOptions, ToEcho, choose, unlike
from reattend.passes.rewrite.echo_maps import Match, assigned, matched, overlaps

RULE = {"sites": "*", "to": "echo"}
ORDER = (1, 0), (3, 2, 0, 1)


def twins(cfg: Any) -> tuple[Any, Any]:
    """A block, and one of the same queries and keys, heads in another order, and other values."""
    leader = dense(cfg)
    other = kept_heads(leader, *ORDER)
    for module in (other.v_proj, other.o_proj):
        for parameter in module.parameters():
            parameter.data = torch.randn_like(parameter)
    return leader, other


@pytest.mark.parametrize("cfg", [config(bias=True), config(norm=True, window=5, v_width=6)])
def test_who_attends_alike_follows_exactly(cfg: Any) -> None:
    """The match of heads is found, and one pass and a cache give the original's output."""
    leader, other = twins(cfg)
    x = torch.randn(2, 9, cfg.hidden_size, dtype=torch.float64)
    maps = []
    for block in (leader, other):
        (q, *_), (k, _) = block.project(x, x, Context(), None)
        scores = q @ k.repeat_interleave(2, 1).mT * cfg.core.scale
        maps.append(scores.softmax(-1))
    match = matched(overlaps(*maps), cfg.core)
    assert match.alike == pytest.approx(1.0)
    paths = ("a", "b")
    leads = EchoOptions(size=2, leads=1)
    follows = EchoOptions(
        size=2, place=1, leads=0, leader="a", groups=match.groups, heads=match.heads
    )
    built = ToEcho().build_together([
        Subject("a", leader, moments(leader), leads), Subject("b", other, moments(other), follows)
    ])  # fmt: skip
    mixers = {path: b.mixer for path, b in built.items()}
    connect(mixers)
    assert [b.exactness for b in built.values()] == ["exact", "learned"]
    with torch.no_grad():
        expected = [block(x, Context()) for block in (leader, other)]
        got = [mixers[path](x, Context()) for path in paths]
        states, parts = {path: GrowingState() for path in paths}, []
        for piece in x.split((5, 1, 3), 1):
            parts.append([mixers[path](piece, Context(), states[path]) for path in paths])
    cached = [torch.cat(some, 1) for some in zip(*parts, strict=True)]
    for y, step, wanted in zip(got, cached, expected, strict=True):
        assert float((y - wanted).abs().max() / wanted.abs().max()) <= 1e-12
        assert float((step - wanted).abs().max() / wanted.abs().max()) <= 1e-12
    kept = [t.shape[1] * t.shape[3] for t in states["b"].rows or ()]
    assert sum(kept) == ToEcho().cost(cfg, follows).cache == cfg.core.kv_heads * cfg.core.v_head_dim
    numbers = sum(p.numel() for p in mixers["b"].parameters())
    assert ToEcho().cost(cfg, follows).parameters == numbers - sum(
        p.numel() for n, p in mixers["b"].named_parameters() if "norm" in n
    )


def test_a_follower_alone_is_an_error() -> None:
    mixer = (
        ToEcho()
        .build(
            dense(config()),
            None,
            EchoOptions(leads=0, leader="a", groups=(0, 1), heads=(0, 1, 2, 3)),
        )
        .mixer
    )
    with pytest.raises(ArgumentError, match="was run without it"):
        mixer(torch.zeros(1, 3, 24, dtype=torch.float64), Context())


def test_nobody_follows_at_the_exact_setting() -> None:
    block = dense(config())
    options = ToEcho().exact_setting(block.config)
    assert not ToEcho().undecided(options)
    assert ToEcho().build(block, None, options).mixer is block


def test_many_heads_are_matched_greedily() -> None:
    worth = torch.rand(9, 9)
    worth[torch.arange(9), torch.randperm(9)] += 2
    total, order = assigned(worth)
    assert order == worth.argmax(1).tolist()
    assert total == pytest.approx(float(worth.max(1).values.sum()))


def test_the_most_alike_pairs_come_first() -> None:
    """Nobody follows a follower, the ends stay, and windows follow windows only."""
    full, window = config(), config(window=5)
    alike = {(0, 1): 0.85, (1, 2): 0.9, (0, 2): 0.4, (2, 3): 0.7, (1, 3): 0.8}

    def found(leader: int, follower: int) -> Match:
        return Match(alike.get((leader, follower), 0.1), (), ())

    assert {f: leader for f, (leader, _) in choose([full] * 5, found, 2).items()} == {2: 1, 3: 1}
    assert {f: leader for f, (leader, _) in choose([full] * 4, found, 2).items()} == {1: 0, 2: 0}
    mixed = [full, window, full, window, full]
    assert {f: leader for f, (leader, _) in choose(mixed, found, 2).items()} == {3: 1, 2: 0}
    halved = full.model_copy(update={"core": full.core.model_copy(update={"scale": 0.5})})
    assert (unlike(full, halved), unlike(full, full)) == ("scale", None)


@pytest.mark.parametrize(
    ("cfg", "options", "reason"),
    [
        (config(out=False), {}, "no output projection"),
        (config().model_copy(update={"memory_size": 8}), {}, "another stream"),
    ],
)
def test_blocks_that_cannot_take_part_are_refused(cfg: Any, options: Any, reason: str) -> None:
    refusal = ToEcho().check(cfg, EchoOptions(**options))
    assert refusal is not None and reason in refusal.reason


def _noted(into: list[Match], found: dict[int, tuple[int, Match]]) -> Any:
    into.append(found[1][1])
    return found


def reference(model: Any, options: Match, ids: Tensor) -> Tensor:
    """The original with the attention of layer 1 taken from layer 0, by transformers' own parts."""
    leader, follower = (model.model.layers[i].self_attn for i in (0, 1))
    each, seen = follower.head_dim, SimpleNamespace()

    def note(module: Any, args: Any, kwargs: Any) -> None:
        seen.x = kwargs["hidden_states"]

    def attend(hidden_states: Tensor, position_embeddings: Any, **_: Any) -> tuple[Tensor, None]:
        q, k, v = (
            p(x).unflatten(-1, (-1, each)).transpose(1, 2)
            for p, x in ((leader.q_proj, seen.x), (leader.k_proj, seen.x),
                         (follower.v_proj, hidden_states))
        )  # fmt: skip
        q, k = apply_rotary_pos_emb(q, k, *position_embeddings)
        v = v[:, list(options.groups)]
        y = torch.nn.functional.scaled_dot_product_attention(
            q, k, v, is_causal=True, enable_gqa=True
        )
        back = torch.empty_like(y)
        back[:, list(options.heads)] = y
        return follower.o_proj(back.transpose(1, 2).flatten(2)), None

    leader.register_forward_pre_hook(note, with_kwargs=True)
    follower.forward = attend
    with torch.no_grad():
        found: Tensor = model(ids).logits
    return found


def test_a_model_follows_and_caches_less(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against the original with the same layers' attention swapped; saved, loaded, decoded."""
    chosen: list[Match] = []
    monkeypatch.setattr(echo, "choose", lambda *a: _noted(chosen, choose(*a)))
    model = decoder("llama", layers=3, groups=2)
    data, (ids, mask) = torch.randint(3, 97, (12, 20)), prompts()
    rules = [{**RULE, "followers": 1}]
    result = convert(model, plan={"rules": rules}, data=data, out=tmp_path / "m")
    told = [s.options for s in result.report.sites]
    assert [("leads" in t, "follows" in t) for t in told] == [(1, 0), (0, 1), (0, 0)]
    assert result.report.totals.cache_ratio == pytest.approx(5 / 6)
    loaded = load(tmp_path / "m")
    with torch.no_grad():
        out = loaded(ids, attention_mask=mask, use_cache=True)
        assert torch.equal(out.logits, result.model(ids, attention_mask=mask).logits)
    kept = [layer.keys.numel() + layer.values.numel() for layer in out.past_key_values.layers]
    assert kept == [2 * kept[1], kept[1], 2 * kept[1]]
    run = {"attention_mask": mask, "max_new_tokens": 5, "do_sample": False, "num_beams": 2}
    got = loaded.generate(ids, **run)
    assert bool((got == loaded.generate(ids, use_cache=False, **run)).all())
    fixed = SpanCache(loaded.config, 32, mask)
    one = {**run, "num_beams": 1}
    got = loaded.generate(ids, past_key_values=fixed, **one)
    assert bool((got == loaded.generate(ids, use_cache=False, **one)).all())
    mixer = loaded.model.layers[1].self_attn.mixer
    assert not any(n.startswith(("q_proj", "k_proj")) for n, _ in mixer.named_parameters())
    assert mixer.relay.held is None

    with torch.no_grad():
        plain, own = result.model(ids).logits, model(ids).logits
    torch.testing.assert_close(plain, reference(model, chosen[0], ids), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(plain, own, rtol=1e-2, atol=1e-2)


def test_in_onnx_a_follower_keeps_values_alone(tmp_path: Any) -> None:
    """It reads its leader's keys, so neither is an operator that keeps them to itself."""
    pytest.importorskip("onnxruntime")
    from reattend.targets.onnx import Session, export_onnx

    model, data = decoder("llama", layers=3, groups=2), torch.randint(3, 97, (12, 20))
    made: Any = convert(model, plan={"rules": [{**RULE, "followers": 1}]}, data=data).model
    file = export_onnx(made, tmp_path / "out", flavour="ort")
    assert file.max_error <= 1e-5
    names = [state.input for state in file.manifest.states]
    assert names == [f"state.{n}" for n in ("0.key", "0.value", "1.value", "2.key", "2.value")]
    own = "ai.reattend::Attention"
    layers = file.manifest.layers
    assert [x.form for x in layers] == [own, own, "com.microsoft::GroupQueryAttention"]
    assert "keeps no keys" in layers[1].saves
    ids, mask = prompts()
    run = {"max_new_tokens": 6, "do_sample": False}
    expected = made.generate(ids, attention_mask=mask, use_cache=False, **run)
    got = Session(file.path).generate(ids.numpy(), mask.numpy(), max_new_tokens=6)
    assert bool((torch.from_numpy(got) == expected).all())


def test_both_stages_train_leaders_and_followers() -> None:
    model, data = decoder("llama", layers=3, groups=2), torch.randint(3, 97, (12, 20))
    trained = {"tokens": 600, "seq_len": 20, "batch_size": 4}
    plan = {"rules": [{**RULE, "followers": 1}], "calibrate": trained}
    layers = convert(model, plan=plan, data=data).model.model.layers
    for layer, name in ((0, "q_proj"), (1, "v_proj")):
        before = model.model.layers[layer].self_attn.get_submodule(name).weight
        after = layers[layer].self_attn.mixer.get_submodule(name).weight
        assert not torch.equal(before.sort(0).values, after.sort(0).values)


def test_too_many_followers_are_refused() -> None:
    members = [(str(i), config(), EchoOptions(followers=1)) for i in range(2)]
    assert "0 can follow" in ToEcho().join(members)[0].reason
    members = [(str(i), config(), EchoOptions(followers=0.1)) for i in range(4)]
    assert "of 4 layers is none" in ToEcho().join(members)[0].reason
