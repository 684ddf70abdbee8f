"""Blocks of 16-bit models are bound to their owners by value, bit for bit, however deep."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
import transformers as tf
import zoo_models
from torch import Tensor, nn

from reattend import convert, find_attention
from reattend.capture import capture, watch
from reattend.install import binding
from reattend.passes.find.sites import Found, find
from reattend.passes.normalize import normalize


def _t5(layers: int) -> Any:
    return tf.T5ForConditionalGeneration(
        tf.T5Config(
            vocab_size=97, d_model=32, d_kv=8, d_ff=48, num_layers=layers, num_heads=4,
            decoder_start_token_id=0, pad_token_id=0, eos_token_id=None,
        )
    )  # fmt: skip


def _llama(layers: int) -> Any:
    config = tf.LlamaConfig(**{**zoo_models.DECODER, "num_hidden_layers": layers})
    return tf.LlamaForCausalLM(config)


def _alive(model: Any, dtype: torch.dtype) -> Any:
    zoo_models.liven(model)
    model.set_attn_implementation("sdpa")
    return model.to(dtype).eval()


CASES = [
    pytest.param(_t5, 4, torch.bfloat16, 12),
    pytest.param(_t5, 4, torch.float16, 12, marks=pytest.mark.slow),
    pytest.param(_llama, 12, torch.bfloat16, 12),
]


@pytest.mark.parametrize(("make", "layers", "dtype", "sites"), CASES)
def test_sixteen_bits_bind_without_slack(
    make: Any, layers: int, dtype: torch.dtype, sites: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(binding, "rounding", lambda _value: 0.0)
    found = find_attention(_alive(make(layers), dtype))
    assert not found.refused
    assert len(found.sites) == sites
    for site in found.sites:
        assert site.binding is not None
        assert site.binding.hidden == ("hidden_states",)
        assert (site.binding.memory is not None) == (site.spec.kind == "cross")
        assert (site.binding.cos is not None) == (make is _llama)


def test_normal_forms_alone_drift_apart() -> None:
    """What the graph as captured is for: without it, twelve 16-bit layers cannot be matched."""
    model = _alive(_llama(12), torch.bfloat16)
    captured = capture(model)
    normalize(captured.gm)

    def inputs_at(length: int | None, padded: bool) -> Any:
        return captured.placeholders(captured.probe(length, padded))

    last = find(captured.gm, captured.placeholders(), inputs_at)[-1]
    assert isinstance(last, Found)
    path = "model.layers.11.self_attn"
    call = watch(model, {path}, captured.inputs)[path]
    value = captured.values([last.region.exit.node], captured.inputs)[last.region.exit.node]
    assert binding.same(call.output[0], value) == 0
    captured.exact = None
    value = captured.values([last.region.exit.node], captured.inputs)[last.region.exit.node]
    assert binding.same(call.output[0], value) > 0.03


@pytest.mark.slow
def test_a_sixteen_bit_encoder_decoder_is_converted() -> None:
    model = _alive(_t5(2), torch.bfloat16)
    result = convert(model, plan="identity")
    assert result.report.totals.converted == 6
    ids = torch.randint(3, 97, (2, 13), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        given = {"input_ids": ids, "decoder_input_ids": ids[:, :7]}
        expected, got = model(**given).logits, result.model(**given).logits
    assert (got - expected).float().norm() <= 0.03 * expected.float().norm()


def test_half_precision_masks_are_compared_by_what_they_add() -> None:
    """-65504 hides; it must not set the scale that a bias of order one is compared with."""
    hidden = torch.ones(5, 5).triu(1).bool()
    bias = torch.randn(5, 5).half()
    mask = bias.masked_fill(hidden, torch.finfo(torch.float16).min)
    plain = torch.zeros(5, 5).half().masked_fill(hidden, torch.finfo(torch.float16).min)
    assert binding.match({"plain": plain}, mask) is None
    assert binding.match({"plain": plain, "biased": mask.clone()}, mask) == ("biased",)


class Scan(nn.Module):
    """A linear attention that fills its result row by row, in place."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        out, state = torch.zeros_like(x), torch.zeros_like(x[:, 0])
        for i in range(3):
            state = torch.sigmoid(self.gate(x[:, i])) * state + x[:, i]
            out[:, i] = state
        out[:, 3:].add_(x[:, 3:])
        return x + out


class Hybrid(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scan, self.attend = Scan(), Attend()

    def forward(self, x: Tensor) -> Tensor:
        return self.attend(self.scan(x))


class Attend(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(16, 48), nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, 8)).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(y.transpose(1, 2).flatten(2))


def test_what_is_written_in_place_before_a_block_is_known() -> None:
    torch.manual_seed(0)
    found = find_attention(Hybrid().eval(), {"x": torch.randn(2, 7, 16)})
    assert [(s.path, s.owner, s.verified) for s in found.sites] == [("attend", "module", True)]
