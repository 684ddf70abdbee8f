"""Data loading: packing, bounds, fingerprints and every error."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

from reattend.data import Dataset, load_data
from reattend.errors import DataError

MODEL = Path(__file__).parents[1] / "examples/models/pycode-gqa"
TEXT = "def add(a, b):\n    return a + b\n\n"


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(MODEL)


def test_text_file_is_packed_without_losing_tokens(tokenizer: Any, tmp_path: Path) -> None:
    file = tmp_path / "code.txt"
    file.write_text(TEXT * 50)
    whole = tokenizer(TEXT * 50, add_special_tokens=False)["input_ids"]
    data = load_data(file, tokenizer, seq_len=16)
    rows = len(whole) // 16
    assert data.packed[0].flatten().tolist() == whole[: rows * 16]
    assert (data.rows, data.tokens) == (rows, rows * 16)
    assert str(tmp_path) not in data.description
    shapes = [batch["input_ids"].shape for batch in data.batches(4)]
    assert shapes[0] == (4, 16)
    assert sum(shape[0] for shape in shapes) == rows


def test_tokens_bounds_what_is_read(tokenizer: Any, tmp_path: Path) -> None:
    drawn = 0

    def endless() -> Iterator[str]:
        nonlocal drawn
        while True:
            drawn += 1
            yield TEXT

    per_text = len(tokenizer(TEXT)["input_ids"])
    data = load_data(endless(), tokenizer, seq_len=8, tokens=100)
    assert data.tokens == 96
    assert drawn <= 96 // per_text + 1
    with pytest.raises(DataError, match="bound"):
        load_data(endless(), tokenizer, seq_len=8)


def test_large_file_is_read_in_pieces(tokenizer: Any, tmp_path: Path, monkeypatch: Any) -> None:
    file = tmp_path / "code.txt"
    file.write_text("é = 1\n" * 400)
    once = load_data(file, tokenizer, seq_len=32)
    monkeypatch.setattr("reattend.data_text.BLOCK_BYTES", 37)  # cuts inside letters and lines
    assert load_data(file, tokenizer, seq_len=32).fingerprint == once.fingerprint


def test_folder_is_sorted_and_documents_are_separated(tokenizer: Any, tmp_path: Path) -> None:
    (tmp_path / "b.txt").write_text("second " * 20)
    (tmp_path / "a.jsonl").write_text('{"text": "first first first"}\n\n{"text": "more"}\n')
    (tmp_path / "c.md").write_text("not read")
    ids = load_data(tmp_path, tokenizer, seq_len=2).packed[0].flatten().tolist()
    parts: list[int] = []
    for text in ("first first first", "more", "second " * 20):
        parts += [*([tokenizer.eos_token_id] if parts else []), *tokenizer(text)["input_ids"]]
    assert ids == parts[: len(ids)]
    assert len(parts) - len(ids) < 2


def test_messages_go_through_the_chat_template(tokenizer: Any, tmp_path: Path) -> None:
    file = tmp_path / "chat.jsonl"
    file.write_text(json.dumps({"messages": [{"role": "user", "content": "hello " * 9}]}))
    with pytest.raises(DataError, match=r"(?s)chat template.*chat\.jsonl:1"):
        load_data(file, tokenizer, seq_len=4)
    other = AutoTokenizer.from_pretrained(MODEL)
    other.chat_template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    ids = load_data(file, other, seq_len=4).packed[0].flatten().tolist()
    assert other.decode(ids).startswith("<user>hello hello")


def test_fingerprint_follows_the_tokens(tokenizer: Any) -> None:
    texts = [TEXT * 20]
    first = load_data(texts, tokenizer, seq_len=16)
    assert load_data(texts, tokenizer, seq_len=16, seed=9).fingerprint == first.fingerprint
    assert load_data(texts, tokenizer, seq_len=8).fingerprint != first.fingerprint
    ids = first.packed[0].clone()
    ids[0, 0] += 1
    assert load_data(ids, seq_len=16).fingerprint != first.fingerprint


def test_epochs_shuffle_by_seed_and_keep_every_row() -> None:
    rows = torch.arange(40).view(10, 4)

    def order(seed: int, epoch: int | None) -> list[int]:
        data = load_data(rows, seq_len=4, seed=seed)
        return [int(r[0]) // 4 for b in data.batches(3, epoch=epoch) for r in b["input_ids"]]

    assert order(0, None) == list(range(10))
    assert order(0, 1) == order(0, 1) != order(0, 2)
    assert order(1, 1) != order(0, 1)
    assert sorted(order(0, 1)) == list(range(10))


def test_tensor_rows_are_cut_and_padded_without_counting_padding() -> None:
    ids = torch.tensor([[0, 0, 1, 2, 3, 4, 5], [6, 7, 8, 9, 10, 11, 12]])
    mask = torch.tensor([[0, 0, 1, 1, 1, 1, 1], [1] * 7])
    data = load_data({"input_ids": ids, "attention_mask": mask}, seq_len=3)
    got, got_mask = data.packed
    assert got.tolist() == [[1, 2, 3], [4, 5, 0], [6, 7, 8], [9, 10, 11]]  # [12] predicts nothing
    assert got_mask.sum(-1).tolist() == [3, 2, 3, 3]
    assert data.tokens == 11


def test_other_inputs_pass_through() -> None:
    batches = [{"pixel_values": torch.randn(3, 2, 4, 4)} for _ in range(5)]
    data = load_data(iter(batches), seq_len=8, tokens=8)
    assert [len(b["pixel_values"]) for b in data.batches(2)] == [2, 1] * 3  # 9 rows reach 8
    assert torch.equal(next(data.batches(3))["pixel_values"], batches[0]["pixel_values"])
    with pytest.raises(DataError, match="rows of token ids"):
        _ = data.packed


def test_take_spreads_over_the_source() -> None:
    data = load_data(torch.arange(400).view(100, 4), seq_len=4)
    assert (data.take(4).packed[0][:, 0] // 4).tolist() == [0, 25, 50, 75]
    assert data.take(1000) is data


@pytest.mark.parametrize(
    ("name", "content", "pattern"),
    [
        ("gone.txt", None, "does not exist"),
        ("a.txt", b"", "empty"),
        ("a.jsonl", b"\n\n", "empty"),
        ("a.csv", b"x", r"\.csv are not read"),
        ("a.txt", b"abc\ndef\xff", "byte 7"),
        ("a.txt", b"\xef\xbb\xbfab\xff", "byte 5"),
        ("a.jsonl", b'{"text": "a"}\n{"text": "\xff"}\n', "byte 24"),
        ("a.jsonl", b'{"text": "a"}\n{"body": "b"}\n', r"a\.jsonl:2"),
        ("a.jsonl", b'{"text": "a"}\n\n{"text": 5}\n', r"a\.jsonl:3"),
        ("a.jsonl", b"{'text'}\n", "not JSON"),
        ("a.txt", b"short", r"seq_len=64: \d+ are missing"),
    ],
)
def test_bad_files(
    tokenizer: Any, tmp_path: Path, name: str, content: bytes | None, pattern: str
) -> None:
    file = tmp_path / name
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(DataError, match=pattern) as caught:
        load_data(file, tokenizer, seq_len=64)
    assert caught.value.exit_code == 2


@pytest.mark.parametrize(
    ("source", "options", "pattern"),
    [
        (["text " * 99], {}, "needs a tokenizer"),
        ([], {}, "empty"),
        (5, {}, "int is not understood"),
        ([torch.rand(2, 8)], {}, "integers"),
        ([torch.full((2, 8), -1)], {}, "integers"),
        ([torch.ones(2, 8, dtype=torch.long), "x"], {}, "item 2"),
        (torch.ones(2, 8, dtype=torch.long), {"tokens": 5}, "tokens=5 < seq_len=8"),
        ("some text, not a path " * 50, {}, "does not exist"),
    ],
)
def test_bad_sources(source: Any, options: dict[str, int], pattern: str) -> None:
    with pytest.raises(DataError, match=pattern):
        load_data(source, None, seq_len=8, **options)


def test_empty_folder_and_ready_dataset(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no .txt or .jsonl"):
        load_data(tmp_path, None, seq_len=8)
    data = Dataset([{"input_ids": torch.ones(1, 8, dtype=torch.long)}], description="d")
    assert load_data(data, seq_len=4) is data
