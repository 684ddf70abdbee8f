"""What one block adds to a run, beside what the stages as a whole take."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from reattend import predict as predict_module
from reattend import predict_site
from reattend.finder import FoundAttention, find_attention
from reattend.plan import Plan
from reattend.predict import Prediction, predict
from reattend.preflight import choose
from reattend.probe import Probe
from reattend.rates import speed

MLA = {"to": "mla", "kv_lora_rank": 16, "qk_rope_head_dim": 8}
SETTINGS = {"statistics_tokens": 4096, "tokens": 0, "batch_size": 4, "seq_len": 64}


@pytest.fixture(scope="module")
def found() -> FoundAttention:
    config = LlamaConfig(
        hidden_size=64, intermediate_size=96, num_attention_heads=4, num_key_value_heads=2,
        num_hidden_layers=3, vocab_size=128, max_position_embeddings=64,
    )  # fmt: skip
    return find_attention(LlamaForCausalLM(config).eval())


def told(found: FoundAttention, *rules: dict[str, Any]) -> Prediction:
    plan = Plan.load({"rules": list(rules), "calibrate": SETTINGS})
    choices = choose(found, plan)
    return predict(found.capture.model, choices, plan, found.capture.inputs, rows=80)


def test_a_block_alone_adds_what_is_said_of_it(found: FoundAttention) -> None:
    """To the model as it is, in the stage where it needs most."""
    nothing = told(found, {"sites": "*", "to": "dense"})
    first = told(found, {"layers": [0], **MLA}, {"sites": "*", "to": "keep"})
    assert [s.peak_bytes > 0 for s in first.sites] == [True, False, False]
    assert [s.seconds > 0 for s in first.sites] == [True, False, False]
    grown = {name: first.peaks[name] - nothing.peaks[name] for name in first.peaks}
    running = grown["statistics"] - first.sites[0].peak_bytes  # the model's own pass
    logits, activations = 4 * 128 * 4, 3 * 4 * 64 * 96 * 4
    assert running == logits + activations


def test_blocks_share_out_what_a_stage_takes(
    found: FoundAttention, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their seconds add up; the rest of a stage is the model's passes, the same for any number."""
    assert speed(torch.float32) > 1e6
    monkeypatch.setattr(predict_site, "speed", lambda dtype: 1e6)
    monkeypatch.setattr(predict_module, "probe", lambda *given: Probe(23, 1e-5, 10.0))
    one = told(found, {"layers": [0], **MLA}, {"sites": "*", "to": "keep"})
    three = told(found, {"sites": "*", **MLA})
    own = one.sites[0].seconds
    assert sum(s.seconds for s in three.sites) == pytest.approx(3 * own)
    assert three.seconds - one.seconds == pytest.approx(2 * own, rel=0.01)
