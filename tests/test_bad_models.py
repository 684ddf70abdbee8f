"""Bad models and data through the command line, and numbers that break down on the way."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from bad_calls import FAST, Change, cut, reattend, refused, untouched
from safetensors.torch import load_file, save_file
from transformers import GPT2Config, GPT2LMHeadModel

from reattend.errors import (
    EXIT_BAD_INPUT,
    EXIT_GATE,
)


@pytest.fixture
def model(tiny_path: Path, tmp_path: Path) -> Path:
    """A copy of the tiny model that a test may damage."""
    return Path(shutil.copytree(tiny_path, tmp_path / "model"))


def edit_weights(change: Callable[[dict[str, torch.Tensor]], Any]) -> Change:
    def edit(model: Path) -> None:
        file = model / "model.safetensors"
        weights = load_file(file)
        change(weights)
        save_file(weights, file, metadata={"format": "pt"})

    return edit


def edit_config(**entries: Any) -> Change:
    def edit(model: Path) -> None:
        file = model / "config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), **entries}))

    return edit


def only_pickle(model: Path) -> None:
    (model / "model.safetensors").rename(model / "pytorch_model.bin")


def index_of_two(model: Path) -> None:
    index = {"weight_map": {"a": "model.safetensors", "b": "model-2.safetensors"}}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))


def index_of_nothing(model: Path) -> None:
    (model / "model.safetensors.index.json").write_text('{"weight_map": [1]}')


def poison(name: str, value: float) -> Change:
    return edit_weights(lambda w: w[name].view(-1)[3].fill_(value))


K = "model.layers.1.self_attn.k_proj.weight"


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        (shutil.rmtree, ("no such model folder",)),
        (lambda m: (m / "config.json").unlink(), ("no config.json",)),
        (lambda m: (m / "config.json").write_text("{"), ("config.json is not JSON",)),
        (lambda m: (m / "config.json").write_text("[]"), ("not a JSON object",)),
        (lambda m: (m / "config.json").write_text("[" * 100_000), ("config.json is not JSON",)),
        (lambda m: (m / "model.safetensors").unlink(), ("no safetensors weights",)),
        (only_pickle, ("pytorch_model.bin", "could run code")),
        (cut(0.5), ("damaged or cut short", "model.safetensors")),
        (cut(0), ("damaged or cut short", "model.safetensors")),
        (lambda m: (m / "model.safetensors").write_bytes(os.urandom(5000)), ("damaged",)),
        (
            lambda m: (m / "generation_config.json").write_text("{"),
            ("generation_config.json is not",),
        ),
        (index_of_two, ("a weight file is missing", "model-2.safetensors")),
        (index_of_nothing, ("the index of the weight files is damaged", "index.json")),
        (edit_weights(lambda w: w.pop(K)), ("does not hold every weight", K)),
        (edit_weights(lambda w: w.update({K: w[K][:3].clone()})), ("cannot be loaded",)),
        (poison(K, float("nan")), ("a weight holds NaN", K)),
        (poison(K, float("inf")), ("a weight holds infinity", K)),
        (edit_config(auto_map={"AutoModelForCausalLM": "m.M"}), ("would be executed", "trust")),
        (edit_config(quantization_config={"quant_method": "gptq"}), ("quantised",)),
        (edit_config(model_type="zebra", architectures=["ZebraForCausalLM"]), ("zebra",)),
    ],
)
def test_models(
    change: Change, parts: tuple[str, ...], model: Path, tiny_text: Path, tmp_path: Path
) -> None:
    change(model)
    out = tmp_path / "out"
    refused(reattend("convert", model, "--data", tiny_text, "--out", out), EXIT_BAD_INPUT, *parts)
    untouched(tmp_path)


def test_code_in_the_models_folder_is_not_run(model: Path, tmp_path: Path) -> None:
    mark = tmp_path / "ran"
    (model / "m.py").write_text(f"open({str(mark)!r}, 'w')\n")
    edit_config(auto_map={"AutoModelForCausalLM": "m.M", "AutoConfig": "m.C"})(model)
    refused(reattend("find", model), EXIT_BAD_INPUT, "would be executed")
    assert not mark.exists()


@pytest.mark.parametrize(
    ("name", "content", "parts"),
    [
        ("none.txt", None, ("does not exist", "none.txt")),
        ("a.txt", b"", ("empty", "0 bytes")),
        ("a.txt", b"good \xe9 bad", ("not UTF-8", "byte 5", "iconv")),
        ("a.txt", b"too short", ("too short",)),
        ("a.jsonl", b'{"txt": "a"}\n', ("`text`", "a.jsonl:1")),
        ("a.jsonl", b"{", ("not JSON", "a.jsonl:1")),
        ("a.jsonl", b"[" * 100_000, ("not JSON", "a.jsonl:1")),
        ("a.csv", b"a,b", (".csv",)),
    ],
)
def test_data(
    name: str, content: bytes | None, parts: tuple[str, ...], tiny_path: Path, tmp_path: Path
) -> None:
    data = tmp_path / name
    if content is not None:
        data.write_bytes(content)
    result = reattend("convert", tiny_path, "--data", data, "--out", tmp_path / "out")
    refused(result, EXIT_BAD_INPUT, *parts)
    untouched(tmp_path)


@pytest.mark.parametrize(
    ("content", "why"), [(None, "folder has none"), ("{broken", "own cannot be read")]
)
def test_text_without_a_tokenizer(
    content: str | None, why: str, model: Path, tiny_text: Path, tmp_path: Path
) -> None:
    for file in model.glob("tokenizer*"):
        file.unlink() if content is None else file.write_text(content)
    result = reattend("convert", model, "--data", tiny_text, "--out", tmp_path / "out")
    refused(result, EXIT_BAD_INPUT, "needs a tokenizer", why)
    untouched(tmp_path)


def test_rows_longer_than_a_table_of_positions(
    tiny_path: Path, tiny_text: Path, tmp_path: Path
) -> None:
    """The default rows have 256 tokens; a rotation goes on, a table of 64 positions does not."""
    model = tmp_path / "model"
    sizes = {"vocab_size": 40, "n_embd": 8, "n_layer": 1, "n_head": 2, "n_positions": 64}
    GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=1, eos_token_id=1)).save_pretrained(model)
    for file in tiny_path.glob("tokenizer*"):
        shutil.copy(file, model)
    command = ["convert", model, "--data", tiny_text, "--out", tmp_path / "out"]
    parts = ("longer than the model reads", "256 tokens; its config says 64", "64 or less")
    refused(reattend(*command), EXIT_BAD_INPUT, *parts)
    untouched(tmp_path)


@pytest.mark.parametrize("setting", ["calibrate.tokens=1000", "verify.max_ppl_increase=0.1"])
def test_training_and_gates_need_text(setting: str, tiny_path: Path, tmp_path: Path) -> None:
    for data in ([], ["--data", "self"]):
        result = reattend("convert", tiny_path, "--set", setting, *data, "--out", tmp_path / "out")
        refused(result, EXIT_BAD_INPUT, "real text", "--data")
        untouched(tmp_path)


def test_a_failed_gate_publishes_nothing(tiny_path: Path, tiny_text: Path, tmp_path: Path) -> None:
    command = ["convert", tiny_path, "--data", tiny_text, "--out", tmp_path / "out", *FAST]
    result = reattend(*command, "--set", "verify.max_kl=0.0")
    refused(result, EXIT_GATE, "failed verification; nothing was published", "max_kl", "limit")
    assert not (tmp_path / "out").exists()


def test_nan_while_it_trains(tiny_path: Path, tiny_text: Path, tmp_path: Path) -> None:
    command = ["convert", tiny_path, "--data", tiny_text, "--out", tmp_path / "out", *FAST]
    result = reattend(*command, "--set", "calibrate.tokens=4000", "--set", "calibrate.lr=1e30")
    refused(result, EXIT_GATE, "NaN or infinity", "stage layerwise, step", "lower calibrate.lr")
    assert not (tmp_path / "out").exists()


def test_a_model_whose_activations_overflow(model: Path, tiny_text: Path, tmp_path: Path) -> None:
    """Every weight is finite; what the first block hands on is not."""

    def grow(weights: dict[str, torch.Tensor]) -> None:
        for name, factor in (("gate", 1e3), ("up", 1e3), ("down", 1e38)):
            weights[f"model.layers.0.mlp.{name}_proj.weight"].mul_(factor)

    edit_weights(grow)(model)
    command = ["convert", model, "--data", tiny_text, "--out", tmp_path / "out", *FAST]
    refused(reattend(*command), EXIT_BAD_INPUT, "NaN or infinity")
    assert not (tmp_path / "out").exists()
