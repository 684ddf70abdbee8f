"""Selectors of decoding: labels of a few channels, and tokens that another layer noted."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from decoder_models import decoder, prompts
from mla_blocks import config, dense, moments
from test_selecting import LONG, METHODS, converted, gap, inputs, scores
from transformers import DynamicCache

from reattend import convert, load
from reattend.errors import GateError, UnsupportedCacheError
from reattend.install.kept import KeptState
from reattend.mixers.base import Context
from reattend.mixers.selecting import frame
from reattend.passes.rewrite.sparse import ToSparse
from reattend.passes.rewrite.sparse_options import SparseOptions
from reattend.patterns.pattern import HeadPattern
from reattend.patterns.selectors import Recorded


def test_labels_have_the_channels_that_agree_most() -> None:
    """On the statistics' sample, per KV head."""
    block = dense(config())
    statistics = moments(block)
    assert statistics.samples
    select = {"kind": "channels", "share": 0.25, "ratio": 0.25, "phase": "both"}
    options = SparseOptions(pattern=HeadPattern.model_validate({"select": select}))
    assert ToSparse().wants(block.config, options) == {"gram", "sample"}
    mixer = ToSparse().build(block, statistics, options).mixer
    total = torch.zeros(2, 8)
    for x in statistics.samples:
        q, k, _ = scores(block, x.double())
        total += (q * k).abs().sum(1).unflatten(0, (2, 2)).sum(1)
    expected = total.topk(2).indices.sort(-1).values
    assert torch.equal(mixer.state_dict()["selecting.0.channels_Gr"], expected)


def test_prompts_are_masked_some_queries_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    mixer = converted(dense(config()), select=METHODS["channels"][0])
    x, real = inputs(LONG)
    with torch.no_grad():
        whole = mixer(x, Context(mask=real))
        monkeypatch.setattr(frame, "MASK", 50 * 4 * LONG)
        assert gap(mixer(x, Context(mask=real)), whole, real) < 1e-12


def test_layers_read_the_tokens_that_another_noted() -> None:
    """One token at a time, padding on the left: the best 4 of the first block, and itself."""
    blocks = [dense(config()), dense(config(norm=True))]
    cache, mixers = DynamicCache(), []
    for layer, block in enumerate(blocks):
        select = Recorded(kind="recorded", at=(0,), topk=4, layer=layer)
        mixers.append(converted(block, select=select.model_dump()))
    x, real = inputs(20)
    with torch.no_grad():
        for start, end in ((0, 18), (18, 19), (19, 20)):
            got = [
                mixer(x[:, start:end], Context(mask=real[:, :end], position_BN=(
                    torch.arange(start, end)[None])), KeptState(cache, layer))
                for layer, mixer in enumerate(mixers)
            ]  # fmt: skip
            assert (
                gap(got[0], blocks[0](x, Context(mask=real))[:, start:end], real[:, start:end])
                < 1e-12
            )
        for row, pad in enumerate((0, 5)):
            s = scores(blocks[0], x[row, pad:])[2][:, -1]
            mask = torch.zeros(1, 4, 20 - pad, 20 - pad, dtype=torch.bool)
            mask[..., -1] = True
            mask[0, :, -1].scatter_(-1, s.topk(4).indices, True)
            expected = blocks[1](x[row : row + 1, pad:], Context(mask=mask))[0, -1]
            assert (got[1][row, -1] - expected).abs().max() < 1e-12
    with pytest.raises(UnsupportedCacheError, match="which chose none"):
        mixers[1](x[:, :1], Context(), KeptState(DynamicCache(), 1))


def models(select: dict[str, Any], **more: Any) -> tuple[Any, Any]:
    rule = {"sites": "*", "to": "sparse", "pattern": {"select": select}}
    original = decoder("llama", layers=3, groups=2)
    data = torch.randint(3, 97, (8, 24))
    return original, convert(original, plan={"rules": [rule]}, data=data, **more)


def test_labels_decode_alike_with_and_without_a_cache(tmp_path: Any) -> None:
    select = {"kind": "channels", "share": 0.25, "topk": 4, "phase": "both"}
    _, result = models(select, out=tmp_path / "s")
    ids, mask = prompts()
    run = {"attention_mask": mask, "max_new_tokens": 12, "do_sample": False}
    expected = result.model.generate(ids, use_cache=False, **run)
    out = result.model.generate(ids, return_dict_in_generate=True, **run)
    assert bool((out.sequences == expected).all())
    layer = out.past_key_values.layers[1]
    assert layer.memos[0].rows_BGQw.shape == (3, 2, 24, 2)  # two of eight channels of every token
    loaded = load(tmp_path / "s")
    assert bool((loaded.generate(ids, **run) == expected).all())  # its channels are in the file
    before, after = result.report.sites[0].cost.before, result.report.sites[0].cost.after
    assert after.cache_numbers_per_token == before.cache_numbers_per_token + 2 * 2
    assert [p.verdict for p in result.report.parity] == ["pass", "pass"]


@pytest.mark.parametrize(
    ("few", "every"),
    [
        pytest.param(
            {"kind": "channels", "topk": 3},
            {"kind": "channels", "topk": 99},
            marks=pytest.mark.slow,
        ),
        (
            {"kind": "recorded", "at": (1,), "topk": 2},
            {"kind": "recorded", "at": (1,), "topk": 99},
        ),
    ],
)
def test_prompts_are_dense_and_decoding_is_not(few: Any, every: Any) -> None:
    ids, mask = prompts()
    run = {"attention_mask": mask, "max_new_tokens": 12, "do_sample": False}
    original, result = models(every)
    expected = original.generate(ids, **run)
    assert bool((result.model.generate(ids, **run) == expected).all())
    _, result = models(few)
    with torch.no_grad():
        got, dense_ones = (m(ids, attention_mask=mask).logits for m in (result.model, original))
    assert (got - dense_ones)[mask.bool()].abs().max() < 1e-4
    assert not bool((result.model.generate(ids, **run) == expected).all())
    assert any("how a text is cut" in note for note in result.report.notes)
    said = [s.options["attention_density"] for s in result.report.sites]
    sparse = "1.000 in prefill, 0.001 in decoding, at most"  # 2 or 3 tokens of 4096, and itself
    whole = "1.000 in prefill, 1.000 in decoding, at most"
    assert said == ([whole, whole, sparse] if few["kind"] == "recorded" else [sparse] * 3)


@pytest.mark.slow
def test_what_is_left_out_while_decoding_is_measured_while_decoding() -> None:
    """One pass is the original; the published row is the one that went token by token."""
    model = decoder("llama", layers=2, groups=2)
    rows = torch.randint(3, 97, (16, 64))
    pattern = {"select": {"kind": "channels", "share": 0.25, "topk": 2}}
    plan = {
        "rules": [{"sites": "*", "to": "sparse", "pattern": pattern}],
        "calibrate": {"seq_len": 64},
        "verify": {"max_kl": 1e-6},
    }
    with pytest.raises(GateError, match="max_kl"):
        convert(model, plan=plan, data=rows)
    del plan["verify"]
    quality = convert(model, plan=plan, data=rows).report.quality
    assert quality is not None
    by_name = {row.name: row for row in quality.rows}
    assert by_name["converted"].kl == 0
    assert by_name["converted, token by token"].kl > 1e-6
    assert quality.last("converted") is by_name["converted, token by token"]
