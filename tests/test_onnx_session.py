"""Running an export: greedy generation equals torch's, and states stay where they are."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from reattend import convert
from reattend.errors import ArgumentError, MissingExtraError, ModelError

pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

from reattend.targets.onnx import Session, export_onnx  # noqa: E402
from reattend.targets.onnx.manifest import SCHEMA  # noqa: E402


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    torch.manual_seed(0)
    torch.set_num_threads(1)
    config = LlamaConfig(
        vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=8, max_position_embeddings=256,
        bos_token_id=1, eos_token_id=2, pad_token_id=0, initializer_range=0.3,
    )  # fmt: skip
    rule = {"sites": "*", "to": "mla", "kv_lora_rank": 10, "qk_rope_head_dim": 4}
    data = [torch.randint(0, 97, (4, 32))]
    model: Any = convert(LlamaForCausalLM(config).eval(), plan={"rules": [rule]}, data=data).model
    return model, export_onnx(model, tmp_path_factory.mktemp("onnx") / "out").path


@pytest.fixture
def session(made: tuple[Any, Path]) -> Session:
    return Session(made[1], threads=1)


def prompt(batch: int = 2, length: int = 7, padding: int = 3) -> tuple[np.ndarray, np.ndarray]:
    ids = np.random.default_rng(0).integers(3, 97, (batch, length))
    mask = np.ones_like(ids)
    mask[0, :padding] = 0
    return ids, mask


def test_generate_equals_torch_greedy(made: tuple[Any, Path], session: Session) -> None:
    ids, mask = prompt()
    expected = made[0].generate(
        torch.from_numpy(ids), attention_mask=torch.from_numpy(mask), max_new_tokens=40,
        do_sample=False, eos_token_id=None,
    )  # fmt: skip
    got = session.generate(ids, mask, max_new_tokens=40, eos_token_id=[])
    np.testing.assert_array_equal(got, expected.numpy())


def test_rows_that_ended_are_padded(session: Session) -> None:
    ids, mask = prompt()
    free = session.generate(ids, mask, max_new_tokens=12, eos_token_id=[])
    end = int(free[0, 7 + 2])
    got = session.generate(ids, mask, max_new_tokens=12, eos_token_id=end)
    for row, whole in zip(got, free, strict=True):
        new, expected = row[7:], whole[7:]
        stop = int(np.argmax(expected == end)) if (expected == end).any() else len(expected) - 1
        np.testing.assert_array_equal(new[: stop + 1], expected[: len(new)][: stop + 1])
        assert (new[stop + 1 :] == 0).all()


def test_states_are_written_in_place(session: Session) -> None:
    ids, mask = prompt()
    session.prefill(ids, mask, reserve=20)
    before, held = session.states.pointers(), session.states.bytes()
    rows = session.states.values[0].numpy().copy()
    for _ in range(20):
        session.step(np.array([[5], [6]]))
    assert session.states.pointers() == before
    assert session.states.bytes() == held == 2 * 2 * (10 + 4) * 4 * 27
    after = session.states.values[0].numpy()
    np.testing.assert_array_equal(after[:, :7], rows[:, :7])  # what was there stays
    assert (rows[:, 7:] == 0).all()
    assert (np.abs(after[:, 7:]).max(-1) > 0).all()  # every step wrote its row, in this buffer


def test_capacity_grows_when_it_must(made: tuple[Any, Path]) -> None:
    ids, mask = prompt()
    tokens = np.random.default_rng(1).integers(3, 97, (2, 9))
    roomy, tight = (Session(made[1], capacity=c, threads=1) for c in (64, None))
    for session in (roomy, tight):
        session.prefill(ids, mask)
    assert tight.states.capacity == 7
    wide = [roomy.step(tokens[:, i : i + 1]) for i in range(9)]
    narrow = [tight.step(tokens[:, i : i + 1]) for i in range(9)]
    assert (roomy.states.capacity, tight.states.capacity) == (64, 256)
    assert np.abs(np.concatenate(wide, 1) - np.concatenate(narrow, 1)).max() <= 1e-5


def test_long_prompts_in_pieces_are_the_same(made: tuple[Any, Path]) -> None:
    ids, mask = prompt(length=23)
    whole = Session(made[1], threads=1).logits(ids, mask)
    pieces = Session(made[1], threads=1, prefill_chunk=5).logits(ids, mask)
    assert np.abs(whole - pieces)[mask.astype(bool)].max() <= 1e-5


def test_a_new_batch_forgets_the_last(session: Session) -> None:
    ids, mask = prompt()
    first = session.logits(ids, mask)
    session.generate(ids[::-1].copy(), max_new_tokens=9)
    np.testing.assert_allclose(session.logits(ids, mask), first, atol=1e-5)


@pytest.mark.parametrize(
    ("ids", "mask", "words"),
    [
        ([[3, 4, 5]], [[1, 1, 0]], "on the left"),
        ([[3, 4, 5]], [[1, 0, 1]], "on the left"),
        ([[3, 4, 5]], [[1, 1]], "its shape"),
        ([3, 4], None, "whole numbers"),
        ([[0.5]], None, "whole numbers"),
    ],
)
def test_wrong_arguments(session: Session, ids: Any, mask: Any, words: str) -> None:
    with pytest.raises(ArgumentError, match=words):
        session.logits(ids, mask)


def test_a_step_needs_its_batch(session: Session) -> None:
    with pytest.raises(ArgumentError, match="prefill"):
        session.step([[5]])
    session.prefill(prompt()[0])
    with pytest.raises(ArgumentError, match="2 rows"):
        session.step([[5]])


def test_without_onnxruntime_the_extra_is_named(
    made: tuple[Any, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(MissingExtraError, match=r"reattend\[onnx\]") as caught:
        Session(made[1])
    assert caught.value.exit_code == 5


def test_a_provider_that_does_not_start_is_an_error(made: tuple[Any, Path]) -> None:
    with pytest.raises(MissingExtraError, match="CUDAExecutionProvider"):
        Session(made[1], providers=["CUDAExecutionProvider", "CPUExecutionProvider"])


def test_other_folders_and_newer_manifests(made: tuple[Any, Path], tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="not an ONNX export"):
        Session(tmp_path)
    shutil.copytree(made[1], tmp_path / "copy")
    path = tmp_path / "copy" / "manifest.json"
    content = json.loads(path.read_text())
    path.write_text(json.dumps(content | {"schema_version": SCHEMA + 1}))
    with pytest.raises(ModelError, match=f"version {SCHEMA + 1}"):
        Session(tmp_path / "copy")
    del content["states"]
    path.write_text(json.dumps(content))
    with pytest.raises(ModelError, match="damaged"):
        Session(tmp_path / "copy")
