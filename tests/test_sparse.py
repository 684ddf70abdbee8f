"""Sparse blocks: exact where every key is seen, else the dense block under the pattern's mask."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from decoder_models import decoder
from mla_blocks import CASES, HIDDEN, config, dense
from torch import Tensor

from reattend import convert, load
from reattend.errors import ArgumentError, RefusedError
from reattend.mixers import sparse_blocks
from reattend.mixers.base import Context
from reattend.mixers.dense import DenseAttention
from reattend.mixers.kinds import build_mixer
from reattend.passes.rewrite.base import dense_cost
from reattend.passes.rewrite.sparse import ToSparse
from reattend.passes.rewrite.sparse_options import SparseOptions
from reattend.plan import Plan
from reattend.plans import preset_names

PLACED = [name for name in CASES if name not in ("alibi", "relative")]
LONG = sparse_blocks.LEAST + 41
TWO: dict[str, Any] = {"pattern": {"sinks": 3, "window": 11}, "heads_full": (1,)}


def converted(block: DenseAttention, **options: Any) -> Any:
    made, given = ToSparse(), SparseOptions(**options)
    refusal = made.check(block.config, given)
    assert refusal is None, refusal
    return made.build(block, None, given).mixer


def inputs(n: int, pads: tuple[int, ...] = (0, 5)) -> tuple[Tensor, Tensor]:
    """Hidden states and validity, padded on the left."""
    x = torch.randn(len(pads), n, HIDDEN, dtype=torch.float64)
    real = torch.arange(n)[None] >= torch.tensor(pads)[:, None]
    return x, real


def two_masks(real_BN: Tensor, window: int = 0) -> Tensor:
    """What the four query heads of `TWO` see [B, 4, N, N], spelled out by position."""
    b, n = real_BN.shape
    mask = torch.zeros(b, 4, n, n, dtype=torch.bool)
    for row in range(b):
        pad = int((~real_BN[row]).sum())
        for i in range(pad, n):
            mask[row, 2:, i, pad : i + 1] = True
            mask[row, :2, i, max(pad, i - 10) : i + 1] = True
            mask[row, :2, i, pad : min(pad + 3, i + 1)] = True
            if window:
                mask[row, :, i, : max(0, i - window + 1)] = False
        mask[row, :, torch.arange(pad), torch.arange(pad)] = True  # finite, and never compared
    return mask


def gap(a: Tensor, b: Tensor, real: Tensor) -> float:
    return float((a - b)[real].abs().max() / b[real].abs().max())


@pytest.mark.parametrize("name", PLACED)
def test_the_exact_setting_equals_the_original(name: str) -> None:
    block = dense(CASES[name])
    mixer = converted(block, **ToSparse().exact_setting(block.config).model_dump())
    x, real = inputs(20)
    ctx = Context(mask=real)
    with torch.no_grad():
        assert gap(mixer(x, ctx), block(x, ctx), real) <= 1e-12


@pytest.mark.parametrize("n", [30, LONG])
@pytest.mark.parametrize("name", [name for name in PLACED if CASES[name].core.kv_heads == 2])
def test_every_head_sees_its_own_keys(name: str, n: int) -> None:
    """Both ways to compute it, with padding: the dense block given the mask is the reference."""
    cfg = CASES[name]
    block = dense(cfg)
    mixer = converted(block, **TWO)
    x, real = inputs(n)
    with torch.no_grad():
        got = mixer(x, Context(mask=real))
        expected = block(x, Context(mask=two_masks(real, cfg.core.window)))
    assert gap(got, expected, real) <= 1e-12


def test_long_calls_read_blocks_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """The op runs for the heads with a pattern, and no score of theirs is masked."""
    seen: list[int] = []
    attend = sparse_blocks.__dict__["by_blocks"]

    def watched(q: Tensor, *rest: Any) -> Tensor | None:
        y = attend(q, *rest)
        seen.append(0 if y is None else q.shape[1])
        return y

    monkeypatch.setattr("reattend.mixers.sparse.by_blocks", watched)
    mixer = converted(dense(config()), **TWO)
    for n, expected in ((30, [0, 0]), (LONG, [2, 0])):
        seen.clear()
        x, real = inputs(n)
        mixer(x, Context(mask=real))
        assert sorted(seen, reverse=True) == expected


def test_gradients_are_those_of_the_masked_block() -> None:
    block = dense(config())
    mixer = converted(block, **TWO)
    x, real = inputs(LONG)
    grads = []
    for module, ctx in (
        (mixer, Context(mask=real)),
        (block, Context(mask=two_masks(real))),
    ):
        block.zero_grad()
        (module(x, ctx)[real] ** 2).sum().backward()
        grads.append({name: p.grad.clone() for name, p in block.named_parameters()})
    for name, g in grads[0].items():
        assert torch.allclose(g, grads[1][name], rtol=1e-9, atol=1e-9), name


@pytest.mark.parametrize("n", [30, LONG])
def test_a_mask_that_says_more_is_laid_over_the_pattern(n: int) -> None:
    """Two texts in one row: the second does not see the first."""
    block = dense(config())
    mixer = converted(block, **TWO)
    x, real = inputs(n, (0,))
    text = torch.arange(n) >= n // 2
    packed = (text[:, None] == text[None]) & torch.ones(n, n).tril().bool()
    both = two_masks(real) & packed
    with torch.no_grad():
        got = mixer(x, Context(mask=packed[None, None]))
        expected = block(x, Context(mask=both))
    assert gap(got, expected, real) <= 1e-12


def test_the_mask_of_the_block_itself_changes_nothing() -> None:
    mixer = converted(dense(config()), **TWO)
    x, real = inputs(LONG)
    causal = torch.ones(LONG, LONG).tril().bool() & real[:, None, None]
    with torch.no_grad():
        assert torch.equal(mixer(x, Context(mask=causal))[real], mixer(x, Context(mask=real))[real])


def test_a_mixer_is_rebuilt_from_its_description() -> None:
    mixer = converted(dense(config()), pattern={"window": 9, "stride": {"period": 2, "block": 4}})
    again = build_mixer(**mixer.described()).double()
    again.load_state_dict(mixer.state_dict())
    x, real = inputs(30)
    with torch.no_grad():
        assert torch.equal(again(x, Context(mask=real)), mixer(x, Context(mask=real)))
    assert len(mixer.config.classes) == 2  # the heads' strides begin at different places


REFUSED = {
    "position bias": (CASES["alibi"], {}),
    "KV head 5 is named": (config(), {"heads_full": (5,)}),
    "causal block": (config(), {"pattern": {"grid": {"shape": (4, 4), "radius": 1}}}),
    "`window 4, powers block 4` is not KV-monotone": (  # KV head 1; head 0 could forget
        config(),
        {
            "head_patterns": [
                {"kv_heads": [1], "pattern": {"window": 4, "powers": {"block": 4}}}
            ],
            "evict": True,
        },
    ),
    "no fixed pattern": (
        config().model_copy(
            update={"core": config().core.model_copy(update={"pattern": "opaque"})}
        ),
        {},
    ),
}  # fmt: skip


@pytest.mark.parametrize("reason", REFUSED)
def test_what_cannot_be_is_refused(reason: str) -> None:
    cfg, options = REFUSED[reason]
    given = SparseOptions(**{"pattern": {"window": 4}, **options})
    refusal = ToSparse().check(cfg, given)
    assert refusal is not None and reason in refusal.reason


@pytest.mark.parametrize(
    ("pattern", "longest", "hides"),
    [
        ({"window": 64}, 64, False),
        ({"window": 63}, 64, True),
        ({"window": 8, "stride": {"period": 1, "block": 4}}, 64, False),
        ({"full": True}, 64, True),
        ({"window": 8, "select": {"kind": "blocks", "block": 8, "topk": 2}}, 64, True),
    ],
)
def test_a_pattern_that_hides_nothing_in_the_longest_text_is_refused(
    pattern: dict[str, Any], longest: int, hides: bool
) -> None:
    refusal = ToSparse().check_within(config(), SparseOptions(pattern=pattern), longest)
    assert (refusal is None) == hides
    assert hides or "hides nothing" in str(refusal)


def test_the_three_densities_are_stated() -> None:
    built = ToSparse().build(dense(config()), None, SparseOptions(density_at=100, **TWO))
    found = {k: built.evidence[k] for k in ("attention_density", "kv_density", "dense_heads")}
    assert found == {"attention_density": "0.570", "kv_density": "0.570", "dense_heads": "0.500"}


def test_a_converted_model_is_saved_loaded_and_converted_again(tmp_path: Any) -> None:
    rule = {"sites": "*", "to": "sparse", "pattern": {"sinks": 2, "window": 5}}
    result = convert(
        decoder("llama", layers=2, groups=2), plan={"rules": [rule]}, out=tmp_path / "s"
    )
    ids = torch.randint(3, 97, (2, 20))
    loaded = load(tmp_path / "s")
    with torch.no_grad():
        expected = result.model(ids).logits
        assert torch.equal(loaded(ids).logits, expected)
    site = result.report.sites[0]
    assert site.exactness == "learned"
    assert result.report.totals.cache_ratio < 0.04
    assert "of the original bytes at 4,096 tokens" in result.report.to_markdown()


def test_packed_texts_are_refused_with_a_cache() -> None:
    rule = {"sites": "*", "to": "sparse", "pattern": {"sinks": 2, "window": 5}}
    model = convert(decoder("llama", layers=2, groups=2), plan={"rules": [rule]}).model
    n = 12
    text = torch.arange(n) >= 6
    packed = (text[:, None] == text[None]) & torch.ones(n, n).tril().bool()
    with pytest.raises(ArgumentError, match="hides more than padding"):
        model(torch.randint(3, 97, (1, n)), attention_mask=packed[None, None], use_cache=True)


#: presets of selectors for blocks that are not causal
BOTH_WAYS = {"biformer", "sparsed", "sparsifiner", "vmoba"}


def sparse_presets(grids: bool) -> list[str]:
    """Presets of this conversion, those over a grid or the others."""
    rules = {n: Plan.load(n).rules[0] for n in preset_names() if n not in BOTH_WAYS}
    sparse = {n: r.options.pattern.grids for n, r in rules.items() if r.to == "sparse"}
    return sorted(n for n, found in sparse.items() if bool(found) == grids)


@pytest.mark.parametrize("name", sparse_presets(grids=False))
def test_presets_fit_ordinary_blocks(name: str) -> None:
    made = ToSparse()
    options = made.for_layer(Plan.load(name).rules[0].options, 5, 12)
    selects = [p.select for p in (options.pattern, *options.candidates) if p.select]
    dense_decode = any(s.acts == "prefill" for s in selects)
    for cfg in (config(4, 4), config(8, 4, bias=True), config(window=5), config(norm=True)):
        assert made.check(cfg, options) is None
        first = made.for_layer(Plan.load(name).rules[0].options, 0, 12)
        narrow = cfg.core.window  # a block's own window may be narrower than the preset's
        assert narrow or made.check_within(cfg, first, 1 << 15) is None
        after, before = (c.flops_per_token for c in (made.cost(cfg, options), dense_cost(cfg)))
        every = min(p.reads(4096, cfg.core) for p in (options.pattern, *options.candidates)) == 4096
        assert after < before or (dense_decode and after == before) or every


def test_refusals_reach_the_caller() -> None:
    plan = {"rules": [{"sites": "*", "to": "sparse", "pattern": {"window": 4}, "heads_full": [7]}]}
    with pytest.raises(RefusedError, match="KV head 7"):
        convert(decoder("llama", layers=2, groups=2), plan=plan)
