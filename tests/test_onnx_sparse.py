"""Models with sparse heads in ONNX: torch's logits, states that do not grow, what is refused."""

from __future__ import annotations

from math import ceil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from onnx_tiny import VOCABULARY, sequences, torch_logits
from transformers import LlamaConfig, LlamaForCausalLM

from reattend import convert
from reattend.errors import RefusedError
from reattend.mixers.sparse_config import HeadClass
from reattend.patterns.pattern import HeadPattern

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

from onnx.reference import ReferenceEvaluator  # noqa: E402

from reattend.targets.onnx import Artifact, Session, export_onnx  # noqa: E402
from reattend.targets.onnx.buffers import StateSpec  # noqa: E402
from reattend.targets.onnx.forecast import foresee  # noqa: E402
from reattend.targets.onnx.sparse_layout import sparse_form  # noqa: E402

#: layer 0: two classes of sparse heads beside latent ones; layer 1: a class for every kind of state
PLAN: dict[str, Any] = {
    "rules": [
        {
            "layers": [0], "heads": [0, 2], "to": "sparse", "pattern": {"sinks": 2, "window": 5},
            "head_patterns": [
                {"kv_heads": [1], "pattern": {"sinks": 1, "window": 3, "powers": {"block": 2}}},
            ],
        },
        {"layers": [0], "to": "mla", "kv_lora_rank": 10, "qk_rope_head_dim": 4},
        {
            "sites": "*", "to": "sparse", "pattern": {"window": 6}, "heads_full": [3],
            "head_patterns": [
                {"kv_heads": [0], "pattern": {"sinks": 1, "window": 3, "window_slope": 0.3}},
                {"kv_heads": [2], "pattern": {"window": 3, "stride": {"period": 2, "block": 3}}},
            ],
        },
    ]
}  # fmt: skip
OPS = [
    "SparseAttention", "PatternAttention", "LatentAttention",
    "KeptAttention", "SparseAttention", "KeptAttention", "Attention",
]  # fmt: skip
#: a padded prompt, 32 steps (every ring turns), chunks longer and shorter than the windows
PIECES = (7, *[1] * 32, 17, 1, 3)


def build(plan: Any, layers: int = 2, kv_heads: int = 4) -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=layers,
        num_attention_heads=2 * kv_heads, num_key_value_heads=kv_heads, head_dim=8,
        max_position_embeddings=256,
        bos_token_id=1, eos_token_id=2, pad_token_id=0, initializer_range=0.3,
    )  # fmt: skip
    text = [torch.randint(0, VOCABULARY, (4, 32))]
    return convert(LlamaForCausalLM(config).eval(), plan=plan, data=text).model


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Artifact]:
    torch.set_num_threads(1)
    model = build(PLAN)
    return model, export_onnx(model, tmp_path_factory.mktemp("onnx") / "out")


def error_over(model: Any, feed: Any) -> float:
    """The largest difference from torch without a cache when the pieces are fed in turn."""
    ids, mask = sequences(2, sum(PIECES), padding=3)
    expected = torch_logits(model, ids, mask)
    assert np.abs(expected).max() > 1
    got, at = [], 0
    for n in PIECES:
        got.append(feed(ids[:, at : at + n].numpy(), mask[:, : at + n].numpy()))
        at += n
    return float(np.abs(np.concatenate(got, 1) - expected)[mask.bool().numpy()].max())


def in_session(session: Session) -> Any:
    def feed(ids: np.ndarray, mask: np.ndarray) -> np.ndarray:
        if ids.shape == mask.shape:
            return session.prefill(ids, mask)
        return session.step(ids)

    return feed


def test_a_prompt_single_steps_and_chunks_equal_torch(made: Any) -> None:
    model, artifact = made
    assert error_over(model, in_session(Session(artifact.path, threads=1))) <= 1e-4


def in_reference(artifact: Artifact) -> Any:
    """onnx's own evaluator runs the same file, states passed on by hand."""
    evaluator, states = ReferenceEvaluator(str(artifact.model)), {}
    for s in artifact.manifest.states:
        sizes = StateSpec(s.input, s.output, tuple(s.shape)).sizes(2, sum(PIECES))
        states[s.input] = np.zeros(sizes, np.float32)
    names = ["logits", *(s.output for s in artifact.manifest.states)]

    def feed(ids: np.ndarray, mask: np.ndarray) -> np.ndarray:
        position = np.maximum(mask.cumsum(1) - 1, 0)[:, -ids.shape[1] :]
        given = {"input_ids": ids, "attention_mask": mask, "position_ids": position}
        logits, *written = evaluator.run(names, given | states)
        states.update(zip(states, written, strict=True))
        return logits

    return feed


def test_reference_evaluator_gives_the_same(made: Any) -> None:
    assert error_over(made[0], in_reference(made[1])) <= 1e-4


@pytest.mark.parametrize("prefill_chunk", [512, 4])
def test_generate_equals_torch_greedy_over_several_windows(made: Any, prefill_chunk: int) -> None:
    model, artifact = made
    ids, mask = sequences(3, 13, padding=7)
    run = {"max_new_tokens": 30, "do_sample": False, "eos_token_id": None}
    expected = model.generate(ids, attention_mask=mask, use_cache=False, **run)
    session = Session(artifact.path, threads=1, prefill_chunk=prefill_chunk)
    got = session.generate(ids.numpy(), mask.numpy(), max_new_tokens=30, eos_token_id=[])
    np.testing.assert_array_equal(got, expected.numpy())


def test_one_node_per_class_of_heads_and_what_the_manifest_says(made: Any) -> None:
    model, artifact = made
    proto = onnx.load(artifact.model, load_external_data=False)
    assert [n.op_type for n in proto.graph.node if n.domain == "ai.reattend"] == OPS
    assert sorted(f.name for f in proto.functions) == sorted(set(OPS))
    manifest = artifact.manifest
    assert [(e.layer, e.op) for e in manifest.layers] == [
        (int(i > 2), op) for i, op in enumerate(OPS)
    ]
    saves = [e.saves for e in manifest.layers]
    assert "7 rows of a sequence" in saves[0] and "6 rows of a sequence" in saves[4]
    assert "not KV-monotone" in saves[1]
    assert "rows that stay (1) and a window (3 + 3/10 of a sequence)" in saves[3]
    assert "rows that stay (1/2 of a sequence) and a window (3)" in saves[5]
    assert manifest.layers[3].pattern == "sinks 1, window 3, window_slope 0.3"
    fixed = {s.input: (s.shape, s.capacity) for s in manifest.states if s.capacity}
    assert fixed["state.0.0.key"] == (["B", 1, 7, 8], 7)
    assert fixed["state.1.1.value"] == (["B", 1, 6, 8], 6)
    assert fixed["state.1.0.kept_key"] == (["B", 1, 2, 8], 2)
    assert fixed["state.1.2.key"] == (["B", 1, 3, 8], 3)
    assert len(fixed) == 8
    shapes = {s.input: (s.shape, s.ring) for s in manifest.states}
    assert shapes["state.1.0.value"] == (["B", 1, "3C/10+3", 8], True)
    assert shapes["state.1.2.kept_value"] == (["B", 1, "3C/6+1", 8], False)
    assert manifest.cache_bytes_fixed == 4 * 16 * (7 + 6 + 3 + 2 + 3 + 1)
    # of layer 1 three tenths, a half, and what sees everything
    assert manifest.cache_bytes_per_token == ceil(4 * (16 + 10 + 4 + 16 * (0.3 + 0.5 + 1)))
    # the check at export was longer than any ring
    assert max(c.prefill for c in manifest.checks) >= 2 * 7
    # masks are made in the graph: the file holds weights (those of MLA also as products)
    held = sum(int(np.prod(i.dims)) for i in proto.graph.initializer)
    assert held <= sum(p.numel() for p in model.parameters()) + 1024


def test_a_longer_text_moves_no_state_of_bounded_size(made: Any) -> None:
    session = Session(made[1].path, threads=1)
    ids, _ = sequences(2, 9, padding=0)
    session.prefill(ids.numpy())
    fixed = [i for i, s in enumerate(made[1].manifest.states) if s.capacity]
    before, held = session.states.pointers(), session.states.bytes()
    session.step(ids.numpy())
    after = session.states.pointers()
    assert [before[i] == after[i] for i in range(len(before))] == [
        i in fixed for i in range(len(before))
    ]
    fixed_bytes = 2 * made[1].manifest.cache_bytes_fixed
    each = 2 * made[1].manifest.cache_bytes_per_token
    assert (session.states.bytes() - fixed_bytes) / 256 == pytest.approx(each, rel=0.02)
    assert (held - fixed_bytes) / 9 == pytest.approx(each, rel=0.2)  # rows come in blocks


def test_what_no_node_knows_is_refused_by_name_also_before_a_conversion(made: Any) -> None:
    class Chosen(HeadPattern):
        top_keys: int = 0

    adapter = made[0].model.layers[1].self_attn
    config, pattern = adapter.mixer.config, Chosen(sinks=1, top_keys=4)
    with pytest.raises(RefusedError, match=r"pattern\.top_keys") as caught:
        sparse_form("here", config, HeadClass(kv_heads=(0,), pattern=pattern))
    assert caught.value.exit_code == 3
    core = config.core.model_copy(update={"pattern": "full"})
    with pytest.raises(RefusedError, match="not causal"):
        sparse_form("here", config.model_copy(update={"core": core}), config.classes[0])
    classes = (HeadClass(kv_heads=(0, 1, 2, 3), pattern=pattern),)
    with_sinks = config.core.model_copy(update={"sinks": True})
    for change, words in (
        ({"classes": classes}, "top_keys"),
        ({"core": with_sinks}, "logit sinks"),
    ):
        outcome = config.model_copy(update=change)
        choice = SimpleNamespace(
            conversion=SimpleNamespace(outcome=lambda *_, made=outcome: made),
            options=1, config=None, site=SimpleNamespace(path="here", binding=adapter.binding),
        )  # fmt: skip
        with pytest.raises(RefusedError, match=words):
            foresee([choice])
    window = next(c for c in config.classes if c.pattern == HeadPattern(window=6))
    assert sparse_form("here", config, window).rows == 6
    own = config.core.model_copy(update={"pattern": "sliding", "window": 4})
    assert sparse_form("here", config.model_copy(update={"core": own}), window).rows == 4
    kept = sparse_form("here", config.model_copy(update={"evict": False}), window)
    assert (kept.op, kept.rows) == ("PatternAttention", 0)
    assert "evict: false" in kept.saves


@pytest.mark.slow
@pytest.mark.parametrize("flavour", ["ort", "custom"])
def test_other_flavours(
    made: Any, flavour: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Full heads take the flavour's operator, sparse nodes keep their bodies and say why."""
    from onnx_library import built

    from reattend.targets.onnx import library

    if flavour == "custom":
        monkeypatch.setattr(library, "BUILT", built())
    model = made[0]
    artifact = export_onnx(model, tmp_path / "out", flavour=flavour)
    assert error_over(model, in_session(Session(artifact.path, threads=1))) <= 1e-4
    layers = artifact.manifest.layers
    assert [e.op for e in layers] == OPS
    if flavour == "ort":
        assert [bool(e.reason) for e in layers] == [op != "Attention" for op in OPS]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gemma2", "mistral"])
def test_blocks_with_a_window_of_their_own(name: str, tmp_path: Path) -> None:
    """Sinks behind the block's window are hidden; softcap; float16."""
    from decoder_models import decoder

    rule = {"sites": "*", "to": "sparse", "pattern": {"sinks": 2, "window": 6}}
    model = convert(decoder(name, layers=1, groups=2), plan={"rules": [rule]}).model
    artifact = export_onnx(model, tmp_path / "out")
    assert {s.capacity for s in artifact.manifest.states} == {2 + 6}
    assert error_over(model, in_session(Session(artifact.path, threads=1))) <= 1e-4
    if name == "gemma2":
        assert export_onnx(model, tmp_path / "half", dtype="float16").max_error <= 3e-2


@pytest.mark.slow
@pytest.mark.parametrize("plan", ["a-shape", "s2", "power"])
def test_presets(plan: str, tmp_path: Path) -> None:
    """The export itself compares logits with torch's, beyond the longest ring."""
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=1,
        num_attention_heads=4, num_key_value_heads=2, head_dim=8, max_position_embeddings=4096,
        initializer_range=0.3,
    )  # fmt: skip
    model: Any = convert(LlamaForCausalLM(config).eval(), plan=plan).model
    artifact = export_onnx(model, tmp_path / "out")
    session = Session(artifact.path, threads=1)
    ids, mask = sequences(2, 1200, padding=5)
    got = [session.prefill(ids[:, :-2].numpy(), mask[:, :-2].numpy())]
    got += [session.step(ids[:, i : i + 1].numpy()) for i in (1198, 1199)]
    expected = torch_logits(model, ids, mask)
    assert np.abs(np.concatenate(got, 1) - expected)[mask.bool().numpy()].max() <= 1e-4
