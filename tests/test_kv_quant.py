"""The quantised KV cache: bytes really held, error bounds, transformers' contract."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig

from reattend.errors import ArgumentError, MissingExtraError
from reattend.verify.kv_quant import MinMaxLayer, Packed, new_quantised_cache


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("length", [16, 7])
def test_error_is_half_a_step_and_bytes_are_counted(bits: int, length: int) -> None:
    tensor = torch.randn(2, 3, length, 32) * 5 + 1
    packed = Packed(tensor, bits)
    back = packed.dequantise()
    assert back.shape == tensor.shape
    step = (tensor.amax((-2, -1)) - tensor.amin((-2, -1))).max() / (2**bits - 1)
    assert (back - tensor).abs().max() <= 0.5 * step + 0.02  # 0.02: float16 scale and zero point
    groups = 2 * 3 * -(-length * 32 // 64)
    assert packed.nbytes == groups * (64 * bits // 8 + 4)


def test_rows_of_a_batch_do_not_share_groups() -> None:
    tensor = torch.randn(2, 1, 3, 32)
    louder = tensor.clone()
    louder[1] *= 100
    assert torch.equal(Packed(tensor, 4).dequantise()[0], Packed(louder, 4).dequantise()[0])


def test_constant_and_huge_groups() -> None:
    flat = torch.full((1, 1, 2, 32), 0.75)
    assert torch.equal(Packed(flat, 4).dequantise(), flat)
    with pytest.raises(ArgumentError, match="float16"):
        Packed(torch.full((1, 1, 2, 32), 1e6), 4)


def test_layer_keeps_the_newest_tokens_exact_until_the_flush() -> None:
    layer = MinMaxLayer(nbits=2, residual_length=4)
    parts = [torch.randn(1, 1, n, 32) for n in (4, 2, 1, 1, 1)]
    exact_tail = (4, 2, 3, 4, 1)  # what `update` returns unquantised at the end
    for index, part in enumerate(parts):
        keys, values = layer.update(part, part)
        seen = torch.cat(parts[: index + 1], dim=2)
        tail = exact_tail[index]
        assert keys.shape == seen.shape
        assert torch.equal(keys[:, :, -tail:], seen[:, :, -tail:])
        if seen.shape[2] > tail:
            assert not torch.equal(keys[:, :, :-tail], seen[:, :, :-tail])
        assert layer.get_seq_length() == seen.shape[2]


def test_eight_bits_generate_like_full_precision() -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=64, intermediate_size=32, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1,
    )  # fmt: skip
    model: Any = LlamaForCausalLM(config).eval()
    ids = torch.randint(3, 64, (2, 9))
    make = new_quantised_cache(config, bits=8, residual=4)
    logits = []
    for cache in (None, make()):
        first = model(ids[:, :6], past_key_values=cache, use_cache=True)
        logits.append(model(ids[:, 6:], past_key_values=first.past_key_values).logits)
    gap = (logits[0] - logits[1]).abs().max()
    assert 0 < gap < 0.01
    assert make() is not make()


def test_refusals() -> None:
    config = LlamaConfig(num_hidden_layers=1)
    for options in ({"bits": 3}, {"bits": 4, "backend": "zip"}):
        with pytest.raises(ArgumentError, match="No such"):
            new_quantised_cache(config, residual=4, **options)  # type: ignore[arg-type]
    with pytest.raises(ArgumentError, match="full attention"):
        new_quantised_cache(MistralConfig(sliding_window=8), bits=4, residual=4)


@pytest.mark.parametrize(("backend", "package"), [("hqq", "hqq"), ("quanto", "optimum-quanto")])
def test_missing_backend_is_named(monkeypatch: Any, backend: str, package: str) -> None:
    monkeypatch.setattr(f"transformers.cache_utils.is_{package.replace('-', '_')}_available", bool)
    with pytest.raises(MissingExtraError, match=f"pip install {package}"):
        new_quantised_cache(LlamaConfig(), bits=4, residual=4, backend=backend)
