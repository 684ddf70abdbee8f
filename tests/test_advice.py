"""What fixed shapes keep of a model's cache."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from typer.testing import CliRunner

from reattend import Plan, find_attention
from reattend.advice import Fit, advise, loading
from reattend.cli import app
from reattend.errors import RefusedError
from reattend.preflight import preflight


def model(kv_heads: int, width: int, kind: str = "Llama", **own: Any) -> Any:
    """Two layers whose keys and values have a real model's sizes, and little else."""
    config = getattr(tf, f"{kind}Config")(
        vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=2,
        num_attention_heads=8, num_key_value_heads=kv_heads, head_dim=width, **own,
    )  # fmt: skip
    torch.manual_seed(0)
    return getattr(tf, f"{kind}ForCausalLM")(config).eval()


def fits(kv_heads: int, width: int) -> dict[str, Fit]:
    return {fit.plan: fit for fit in advise(find_attention(model(kv_heads, width)))}


def test_many_heads_save_and_few_heads_grow() -> None:
    llama3 = fits(8, 128)  # 8 x (128 + 128) = 2048 numbers
    assert llama3["mla-512-64"].takes and llama3["mla-512-64"].share == 576 / 2048
    assert llama3["mla-256-64"].share == 320 / 2048
    assert llama3["mla-512-64"].arithmetic == "512 + 64 = 576 of 8 x (128 + 128) = 2048"
    assert llama3["mla-512-64"].advice == "saves 72 %"
    assert llama3["mla-512-64"].blocks == 2
    qwen = fits(2, 128)  # 512 numbers: the shape is larger than the cache
    assert not qwen["mla-512-64"].takes and qwen["mla-512-64"].share == 1.125
    assert "grows the cache" in qwen["mla-512-64"].advice
    assert "kv_lora_rank: 448" in qwen["mla-512-64"].advice  # all there is beside R = 64
    assert qwen["mla-256-64"].takes and qwen["mla-256-64"].share == 0.625


def test_a_width_that_cannot_be_spread_says_so() -> None:
    phi = fits(8, 96)["mla-512-64"]  # 48 frequencies for 32 slots
    assert not phi.takes and "cannot be spread evenly" in phi.advice


def test_whether_the_class_can_carry_it() -> None:
    plain = model(4, 32)
    assert loading(plain, find_attention(plain)) == ""
    normed = model(4, 32, "Qwen3")
    assert "normalises queries or keys" in loading(normed, find_attention(normed))


@pytest.mark.parametrize("json_asked", [False, True])
def test_the_command(tmp_path: Path, json_asked: bool) -> None:
    model(8, 128).save_pretrained(tmp_path / "model")
    asked = ["plans", "fit", str(tmp_path / "model"), *(["--json"] if json_asked else [])]
    told = CliRunner().invoke(app, asked)
    assert told.exit_code == 0, told.output
    if json_asked:
        found = json.loads(told.stdout)
        assert {f["plan"] for f in found["fits"]} == {"deepseek", "mla-512-64", "mla-256-64"}
        assert found["deepseek"] == ""
    else:
        assert "512 + 64 = 576 of 8 x (128 + 128) = 2048" in told.output
        assert "saves 72 %" in told.output and "can carry it: yes" in told.output


def test_a_shape_that_grows_the_cache_is_refused_with_the_command_that_finds_others() -> None:
    found = find_attention(model(2, 128))  # 512 numbers
    whole = {"sites": "*", "to": "mla", "kv_lora_rank": 448, "qk_rope_head_dim": 64}
    for plan, words in (("mla-512-64", "larger than possible"), ({"rules": [whole]}, "not shrink")):
        with pytest.raises(RefusedError, match="`reattend plans fit MODEL`") as caught:
            preflight(found, Plan.load(plan))
        assert words in str(caught.value)
