"""Other presets beside a conversion: what a conversion by each of them measures itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from reattend import Plan, convert
from reattend.errors import PlanError
from reattend.plan_sections import Verify

SMALL = {"statistics_tokens": 2048, "seq_len": 64}


def plan(preset: str, **verify: Any) -> dict[str, Any]:
    rules = [{"layers": [0], "to": "keep"}, {"sites": "*", "to": "mla", "kv_keep": 0.5}]
    if preset:
        rules[1] = {**Plan.load(preset).rules[0].to_dict(), "sites": "*", "kv_keep": 0.5}
    return {"rules": rules, "calibrate": SMALL, "verify": verify}


def test_a_peer_is_what_its_own_conversion_is(tiny_path: Path, tiny_text: Path) -> None:
    """CARE's, which reads statistics that the plan's own rule does not."""
    report = convert(tiny_path, plan("", peers=["care"]), data=tiny_text).report
    rows = {row.name: row for row in report.quality.rows}
    asked = {"peers": ["mha2mla", "care"], "peer_keep": [0.5, 0.25], "peer_pairs": [0.5]}
    quality = convert(tiny_path, plan("care", **asked), data=tiny_text).report.quality
    alone = quality.last("converted")
    peer = rows["care, untrained"]
    assert peer.role == "yardstick"
    assert peer.ppl == pytest.approx(alone.ppl, rel=1e-6)
    assert peer.kl == pytest.approx(alone.kl, rel=1e-3)
    assert peer.cache_bytes_per_token == alone.cache_bytes_per_token
    assert rows["converted"].kl != pytest.approx(peer.kl, rel=0.01)
    assert "care, untrained" in report.to_markdown()
    table = {row.name.removesuffix(", untrained"): row for row in quality.rows}
    sizes = ("50 %", "25 %", "0.5 of the pairs")
    assert list(table)[2:] == [f"{p} at {size}" for size in sizes for p in asked["peers"]]
    assert table["care at 50 %"].ppl == pytest.approx(alone.ppl, rel=1e-6)
    whole, half, quarter, pairs = (
        table[name].cache_bytes_per_token
        for name in ("original", "care at 50 %", "mha2mla at 25 %", "care at 0.5 of the pairs")
    )
    assert whole - half == 2 * (half - quarter)  # the first layer stays
    assert half < pairs
    assert table["care at 0.5 of the pairs"].kl < table["care at 25 %"].kl


def test_a_peer_that_cannot_take_the_model_is_left_out_with_the_reason() -> None:
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=61, hidden_size=16, intermediate_size=24, num_hidden_layers=1, head_dim=8,
        num_attention_heads=4, num_key_value_heads=4,
    )  # fmt: skip
    rows = torch.randint(0, 61, (40, 16))
    chosen = {"rules": [{"sites": "*", "to": "mla", "kv_keep": 0.5}],
              "verify": {"peers": ["x-ecomla", "care"], "peer_pairs": [0.5]},
              "calibrate": {"seq_len": 16, "statistics_tokens": 256}}  # fmt: skip
    report = convert(Qwen3ForCausalLM(config).eval(), chosen, data=rows).report
    peers = [row.name for row in report.quality.rows if row.role == "yardstick"]
    assert peers == ["care at 0.5 of the pairs, untrained"]
    assert any("x-ecomla at 0.5" in note and "at most 8" in note for note in report.notes)


def test_only_presets_of_mla_are_peers() -> None:
    with pytest.raises(PlanError, match="transmla-paper"):
        Verify.model_validate({"peers": ["s2"]})
