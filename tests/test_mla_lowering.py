"""Every option of `mla` runs where it is lowered to: in ONNX, and through the ops of `kernels/`.

What each option computes is tested in torch (tests/test_mla*.py); here the torch model is the
reference, with padding, a prompt in one piece and then token by token.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from onnx_tiny import MLA, VOCABULARY, sequences, tiny, torch_logits
from transformers import Qwen2Config, Qwen2ForCausalLM, Qwen3Config, Qwen3ForCausalLM

from reattend import convert
from reattend.install.spans import SpanCache
from reattend.mixers.latent import LatentAttention

pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

from reattend.targets.onnx import Session, export_onnx  # noqa: E402

#: per-layer sizes and a free rotary table, one kept slot in the second layer
UNEQUAL = {"to": "mla", "kv_lora_rank": [10, 7], "qk_rope_head_dim": [6, 2]}
PAPER = {
    "mixing": "real", "rope_select": "per-frequency", "phase": "one", "rope_table": "strided",
    "latent": "pca", "center": False,
}  # fmt: skip
#: options that do not exclude each other share a layer: what an export takes grows with the layers
OPTIONS: dict[str, dict[str, Any]] = {
    "unequal layers": UNEQUAL,
    "auto sizes, derived ratio": {
        "to": "mla", "kv_keep": 0.5, "kv_lora_rank": "auto", "qk_rope_head_dim": "auto",
        "balance": "derived",
    },
    "energy, strided": {
        "to": "mla", "kv_keep": 0.5, "kv_lora_rank": "auto", "qk_rope_head_dim": 4,
        "allocate": "energy", "rope_select": "per-frequency", "rope_table": "strided",
    },
    "as published, folded, low-rank queries": {**MLA, **PAPER, "q_lora_rank": 12},
    "complex, one phase, latent norm": {
        **MLA, "mixing": "complex", "phase": "one", "latent_norm": "rms",
    },
    "per-head, care": {
        **MLA, "mixing": "none", "rope_select": "per-head", "latent": "care", "center": False,
    },
    "mean-key, svd": {
        **MLA, "mixing": "none", "rope_select": "mean-key", "phase": "one", "latent": "svd",
    },
    "all rotated": {"to": "mla", "kv_lora_rank": 16, "qk_rope_head_dim": 16, "fold": 1},
    "nothing rotated": {"to": "mla", "kv_lora_rank": 12, "qk_rope_head_dim": 0},
}  # fmt: skip


def random_biases(model: Any) -> Any:
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.5)
    return model.eval()


def qwen(config: Any, model: Any) -> Any:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "head_dim": 8}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.3}
    return random_biases(
        model(config(vocab_size=VOCABULARY, max_position_embeddings=256, **sizes, **heads))
    )


def converted(model: Any, *rules: dict[str, Any]) -> Any:
    order = torch.Generator().manual_seed(2)
    text = [torch.randint(0, VOCABULARY, (4, 32), generator=order)]
    return convert(model, plan={"rules": list(rules)}, data=text).model


def shapes(model: Any) -> list[tuple[int, int]]:
    mixers = [m.config for m in model.modules() if isinstance(m, LatentAttention)]
    return [(c.kv_lora_rank, c.qk_rope_head_dim) for c in mixers]


def runs_everywhere(model: Any, out: Path) -> None:
    """ONNX and the ops of `kernels/` give torch's logits."""
    torch.manual_seed(1)
    ids, mask = sequences(2, 9, padding=2)
    expected, real = torch_logits(model, ids, mask), mask.bool().numpy()
    scale = np.abs(expected[real]).max()

    session = Session(export_onnx(model, out).path, threads=1)
    first = session.prefill(ids[:, :6].numpy(), mask[:, :6].numpy())
    steps = [session.step(ids[:, i : i + 1].numpy()) for i in range(6, 9)]
    got = np.concatenate([first, *steps], 1)
    assert np.abs(got - expected)[real].max() <= 1e-5 * scale

    cache, parts = SpanCache(model.config, 9, mask[:, :6]), []
    position = (mask.cumsum(-1) - 1).clamp_min(0)
    with torch.no_grad():
        for begin, end in ((0, 6), (6, 7), (7, 8), (8, 9)):
            out_ = model(
                input_ids=ids[:, begin:end], attention_mask=mask[:, :end],
                position_ids=position[:, begin:end], past_key_values=cache, use_cache=True,
            )  # fmt: skip
            parts.append(out_.logits.numpy())
    assert np.abs(np.concatenate(parts, 1) - expected)[real].max() <= 1e-5 * scale


def test_layers_of_unequal_sizes_with_free_tables(tmp_path: Path) -> None:
    model = converted(tiny(), {"sites": "*", **UNEQUAL})
    assert shapes(model) == [(10, 6), (7, 2)]
    runs_everywhere(model, tmp_path / "out")


@pytest.mark.slow
def test_every_option(tmp_path: Path) -> None:
    """One model with a layer of each."""
    each = [options for options in OPTIONS.values() if options is not UNEQUAL]
    rules = [{"layers": [layer], **options} for layer, options in enumerate(each)]
    model = converted(tiny(num_hidden_layers=len(each)), *rules)
    assert len(shapes(model)) == len(each)
    runs_everywhere(model, tmp_path / "out")


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["biases", "norms"])
def test_biases_and_norms_of_queries_and_keys(kind: str, tmp_path: Path) -> None:
    chosen = (
        (Qwen2Config, Qwen2ForCausalLM) if kind == "biases" else (Qwen3Config, Qwen3ForCausalLM)
    )
    runs_everywhere(converted(qwen(*chosen), {"sites": "*", **MLA}), tmp_path / "out")


def test_no_option_is_left_out() -> None:
    """A new option, or a new value of one, has to be lowered here too."""
    from typing import get_args

    from reattend.passes.rewrite.mla_options import MlaOptions

    tried = {(key, str(v)) for options in OPTIONS.values() for key, v in options.items()}
    for name, field in MlaOptions.model_fields.items():
        values = [v for v in get_args(field.annotation) if isinstance(v, str)]
        wanted = [str(v) for v in values if v not in (field.default, "none")]
        missing = [v for v in wanted if (name, v) not in tried]
        assert not missing, f"{name}: {missing}"
        assert values or name in {*UNEQUAL, "kv_keep", "center", "shrinkage", "q_lora_rank",
                                  "allow_growth", "fold", "balance"}, name  # fmt: skip
