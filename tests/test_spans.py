"""SpanCache: `generate` reaches the ops, and gives what it gives with transformers' own cache."""

from __future__ import annotations

from functools import cache
from typing import Any
from unittest import mock

import pytest
import torch
from test_adapter import converted

from reattend.errors import ArgumentError
from reattend.install.spans import SpanCache, SpanState
from reattend.install.stock import StockState
from reattend.mixers.latent import LatentAttention

NEW = 12
made = cache(converted)


def prompts() -> dict[str, torch.Tensor]:
    """Two rows, the second with three tokens of padding on the left."""
    ids = torch.randint(3, 97, (2, 9), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[1, :3], ids[1, :3] = 0, 0
    return {"input_ids": ids, "attention_mask": mask}


def decode(model: Any, batch: dict[str, Any], **options: Any) -> Any:
    return model.generate(
        **batch, max_new_tokens=NEW, do_sample=False, output_logits=True,
        return_dict_in_generate=True, **options,
    )  # fmt: skip


@pytest.mark.daily
@pytest.mark.parametrize(
    ("which", "to", "beams"),
    [
        ("all", "mla", {}),
        ("middle", "mla", {}),
        ("all", "dense", {}),
        ("all", "mla", {"num_beams": 2, "num_return_sequences": 2}),
    ],
)
def test_generates_what_a_dynamic_cache_generates(which: str, to: str, beams: Any) -> None:
    model, batch = made("llama", which, to), prompts()
    want = decode(model, batch, **beams)
    spans = SpanCache(model.config, 9 + NEW, batch["attention_mask"])
    with mock.patch.object(SpanState, "span", autospec=True, side_effect=SpanState.span) as span:
        got = decode(model, batch, past_key_values=spans, **beams)
        calls = [call.args[0].layer_idx for call in span.call_args_list]
    assert torch.equal(got.sequences, want.sequences)
    for a, b in zip(got.logits, want.logits, strict=True):
        assert (a - b).abs().max() <= 2e-4 * b.abs().max()
    assert set(calls) == ({0, 1, 2} if which == "all" else {1})
    assert len(calls) == len(set(calls)) * NEW


def test_only_the_first_call_rebuilds_keys_and_values() -> None:
    model, batch = made("llama", "all"), prompts()
    spans = SpanCache(model.config, 9 + NEW, batch["attention_mask"])
    real = LatentAttention._prefill
    with mock.patch.object(LatentAttention, "_prefill", autospec=True, side_effect=real) as first:
        decode(model, batch, past_key_values=spans)
    assert first.call_count == 3


def test_without_padding_no_mask_is_needed() -> None:
    model, batch = made("llama", "all"), prompts()
    batch = {"input_ids": batch["input_ids"][:1]}
    got = decode(model, batch, past_key_values=SpanCache(model.config, 9 + NEW))
    assert torch.equal(got.sequences, decode(model, batch).sequences)


def test_padding_is_not_seen() -> None:
    """The padded row alone, without its padding, continues the same way: the test of `start`."""
    model, batch = made("llama", "all"), prompts()
    spans = SpanCache(model.config, 9 + NEW, batch["attention_mask"])
    got = decode(model, batch, past_key_values=spans).sequences[1, 9:]
    alone = decode(model, {"input_ids": batch["input_ids"][1:, 3:]}).sequences[0, 6:]
    assert torch.equal(got, alone)


def test_a_sliding_window_layer_keeps_transformers_cache() -> None:
    model, batch = made("mistral", "all"), prompts()
    spans = SpanCache(model.config, 9 + NEW, batch["attention_mask"])
    assert type(spans.reattend_state(0)) is StockState
    got = decode(model, batch, past_key_values=spans)
    assert torch.equal(got.sequences, decode(model, batch).sequences)


def test_padding_elsewhere_is_refused() -> None:
    model = made("llama", "first")
    mask = torch.tensor([[1, 1, 0], [1, 1, 1]])
    with pytest.raises(ArgumentError, match="padding on the left"):
        SpanCache(model.config, 8, mask)
    with pytest.raises(ArgumentError, match="padding on the left"):
        SpanCache(model.config, 8, torch.ones(2, 1, 3, 3))
