"""Other presets beside a conversion: what a conversion by each of them measures itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from reattend import convert
from reattend.errors import PlanError
from reattend.plan_sections import Verify

SMALL = {"statistics_tokens": 2048, "seq_len": 64}


def plan(preset: str, **verify: Any) -> dict[str, Any]:
    rules = [{"layers": [0], "to": "keep"}, {"sites": "*", "to": "mla", "kv_keep": 0.5}]
    if preset:
        from reattend import Plan

        rules[1] = {**Plan.load(preset).rules[0].to_dict(), "sites": "*", "kv_keep": 0.5}
    return {"rules": rules, "calibrate": SMALL, "verify": verify}


def test_a_peer_is_what_its_own_conversion_is(tiny_path: Path, tiny_text: Path) -> None:
    """CARE's, which reads statistics that the plan's own rule does not."""
    report = convert(tiny_path, plan("", peers=["care"]), data=tiny_text).report
    rows = {row.name: row for row in report.quality.rows}
    alone = convert(tiny_path, plan("care"), data=tiny_text).report.quality.last("converted")
    peer = rows["care, untrained"]
    assert peer.role == "yardstick"
    assert peer.ppl == pytest.approx(alone.ppl, rel=1e-6)
    assert peer.kl == pytest.approx(alone.kl, rel=1e-3)
    assert peer.cache_bytes_per_token == alone.cache_bytes_per_token
    assert rows["converted"].kl != pytest.approx(peer.kl, rel=0.01)
    assert "care, untrained" in report.to_markdown()


def test_a_peer_that_cannot_take_the_model_is_left_out_with_the_reason() -> None:
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=61, hidden_size=16, intermediate_size=24, num_hidden_layers=1, head_dim=8,
        num_attention_heads=2, num_key_value_heads=2,
    )  # fmt: skip
    rows = torch.randint(0, 61, (40, 16))
    chosen = {"rules": [{"sites": "*", "to": "mla", "kv_keep": 0.5}], "verify": {"peers": ["care"]},
              "calibrate": {"seq_len": 16, "statistics_tokens": 256}}  # fmt: skip
    report = convert(Qwen3ForCausalLM(config).eval(), chosen, data=rows).report
    assert not [row for row in report.quality.rows if row.role == "yardstick"]
    assert any("peer care left out" in note and "key norm" in note for note in report.notes)


def test_only_presets_of_mla_are_peers() -> None:
    with pytest.raises(PlanError, match="transmla-paper"):
        Verify.model_validate({"peers": ["s2"]})
