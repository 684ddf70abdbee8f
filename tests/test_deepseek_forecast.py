"""What no DeepSeek class can carry is refused before anything is computed or written."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import decoder_models
import pytest
import torch
import transformers as tf
import zoo_models

from reattend import convert, export
from reattend.errors import EXIT_REFUSED, ArgumentError, RefusedError
from reattend.events import Event
from reattend.targets.deepseek.forecast import config_obstacles
from reattend.targets.deepseek.shape import parse_pad

STRIDED = {"sites": "*", "to": "mla", "kv_lora_rank": 8, "qk_rope_head_dim": 8,
           "rope_select": "per-frequency", "rope_table": "strided"}  # fmt: skip
FREE = {"sites": "*", "to": "mla", "kv_lora_rank": 8, "qk_rope_head_dim": 8}
DATA = torch.randint(3, 97, (12, 24), generator=torch.Generator().manual_seed(1))
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
LONG = {"rope_type": "longrope", "rope_theta": 1e4, "factor": 1.0, "short_factor": [1.0] * 4,
        "long_factor": [2.0] * 4, "original_max_position_embeddings": 64}  # fmt: skip


def llama(**own: Any) -> Any:
    return tf.LlamaForCausalLM(tf.LlamaConfig(**zoo_models.DECODER, **own)).eval()


def gemma2() -> Any:
    return decoder_models.decoder("gemma2", 2, 2)


def olmo2() -> Any:
    fields = {k: v for k, v in zoo_models.DECODER.items() if k != "head_dim"}
    return tf.Olmo2ForCausalLM(tf.Olmo2Config(**fields)).eval()


def gpt2() -> Any:
    return zoo_models.build("gpt2")


#: name -> (model, rules, what the refusal says, what it advises)
CASES: dict[str, tuple[Callable[[], Any], list[dict[str, Any]], list[str], str]] = {
    "window": (
        lambda: zoo_models.build("mistral"), [STRIDED], ["sliding (window 8)"], "leave `deepseek`",
    ),
    "softcap": (gemma2, [STRIDED], ["capped at 50", "sliding (window 8)"], "leave `deepseek`"),
    "norms of queries": (
        lambda: zoo_models.build("qwen3"), [STRIDED], ["normalises queries or keys"], "leave",
    ),
    "free table": (llama, [FREE], ["from statistics"], "rope_table: strided"),
    "one budget": (
        llama, [{"sites": "*", "to": "mla", "kv_keep": 0.5, "kv_lora_rank": "auto"}],
        ["from statistics"], "kv_lora_rank: <number>",
    ),
    "a rank per layer": (
        llama, [{**STRIDED, "kv_lora_rank": [8, 6]}], ["kv_lora_rank differs", "6, 8"], "--pad max",
    ),
    "a layer that stays": (
        llama, [{**STRIDED, "layers": [0]}], ["unmatched"], 'the plan "deepseek"',
    ),
    "dense layers": (llama, [{"sites": "*", "to": "dense"}], ["becomes dense"], "deepseek"),
    "nothing rotated": (
        llama, [{**STRIDED, "qk_rope_head_dim": 0}], ["nothing of it is rotated"],
        "qk_rope_head_dim: 2",
    ),
    "biases in the MLP": (lambda: llama(mlp_bias=True), [STRIDED], ["have biases"], "deepseek-v2"),
    "norms after": (
        olmo2, [{**STRIDED, "rope_select": "global", "rope_table": "free"}], ["normalises"],
        "leave",
    ),
    "another family": (
        gpt2, [{"sites": "*", "to": "mla", "kv_keep": 0.5, "rope_select": "per-frequency"}],
        ["no layer rotates anything"], "no DeepSeek form",
    ),
}  # fmt: skip


@pytest.mark.daily
@pytest.mark.parametrize("name", CASES)
def test_it_is_said_before_anything_is_computed(name: str, tmp_path: Path) -> None:
    build, rules, reasons, step = CASES[name]
    torch.manual_seed(0)
    events: list[Event] = []
    with pytest.raises(RefusedError) as refusal:
        convert(
            build(), {"rules": rules, "targets": ["deepseek"]}, data=DATA, out=tmp_path / "out",
            on_event=events.append,
        )  # fmt: skip
    assert refusal.value.exit_code == EXIT_REFUSED
    for reason in reasons:
        assert reason in refusal.value.where
    assert step in refusal.value.next_step
    assert "vLLM with r + R = 576" in refusal.value.why
    assert not {"statistics", "rewrite"} & {e.stage for e in events}
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("build", "why"),
    [
        (lambda: tf.CohereForCausalLM(tf.CohereConfig(**zoo_models.DECODER)), "attention"),
        (
            lambda: tf.GPTNeoXForCausalLM(
                tf.GPTNeoXConfig(
                    vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
                    num_attention_heads=4, attention_bias=False, use_parallel_residual=False,
                )
            ),
            "RMS norm",
        ),
    ],
    ids=["parallel residual", "layer norms"],
)  # fmt: skip
def test_what_the_layers_around_attention_are(
    build: Callable[[], Any], why: str, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    plan = {"rules": [STRIDED], "targets": ["deepseek"]}
    with pytest.raises(RefusedError, match=why):
        convert(build().eval(), plan, data=DATA, out=tmp_path / "out")


@pytest.mark.parametrize(
    ("rope", "words"),
    [(DYNAMIC, "dynamic"), (LONG, "two tables"), ({**LONG, "long_factor": [1.0] * 4}, "")],
)
def test_a_table_that_changes_with_the_length(rope: dict[str, Any], words: str) -> None:
    found = config_obstacles(llama(rope_parameters=rope))
    assert [words in item.why for item in found] == ([True] if words else [])


def test_an_export_refuses_what_a_plan_would_have(tmp_path: Path) -> None:
    torch.manual_seed(0)
    rule = {**FREE, "qk_rope_head_dim": [8, 6]}
    model = convert(llama(), {"rules": [rule]}, data=DATA).model
    with pytest.raises(RefusedError) as refusal:
        export(model, "deepseek", out=tmp_path / "out")
    assert "rotated frequencies differ from layer to layer" in refusal.value.where
    assert "pad='max'" in refusal.value.next_step
    assert list(tmp_path.iterdir()) == []


def test_mlp_biases_are_carried_by_v2(tmp_path: Path) -> None:
    torch.manual_seed(0)
    original = llama(mlp_bias=True)
    for name, parameter in original.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.3)
    model = convert(original, {"rules": [STRIDED]}, data=DATA).model
    with pytest.raises(RefusedError, match="DeepseekV3 has none"):
        export(model, "deepseek", out=tmp_path / "out")
    assert export(model, "deepseek-v2", out=tmp_path / "out").max_error <= 1e-5


@pytest.mark.parametrize("pad", ["large", "512", "512+63", "-1+64"])
def test_padding_has_two_forms(pad: str) -> None:
    with pytest.raises(ArgumentError, match="not understood"):
        parse_pad(pad)


def test_unknown_targets_and_padding_elsewhere(tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match="deepseek-v2"):
        export(llama(), "deepsek", out=tmp_path / "out")
    with pytest.raises(ArgumentError, match="pad is for"):
        export(llama(), "onnx", out=tmp_path / "out", pad="max")
