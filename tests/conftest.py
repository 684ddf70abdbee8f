"""Shared fixtures: one torch thread per worker, the shipped trained model, tiny models."""

from __future__ import annotations

import gc
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Remembering what a stand-in computed pays from tens of layers on; two layers lose a quarter by it.
os.environ.setdefault("TORCH_FAKE_TENSOR_DISPATCH_CACHE", "0")

sys.path.insert(0, str(Path(__file__).parent))  # for the helpers beside the tests

ROOT = Path(__file__).resolve().parent.parent
SHIPPED = ROOT / "examples" / "models" / "pycode-gqa"


@pytest.hookimpl(tryfirst=True)  # before `-m` chooses
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Of a test marked `daily` the first case is for every day; the others are slow.

    What is marked `early` comes first, so that no worker waits for it at the end.
    """
    items.sort(key=lambda item: item.get_closest_marker("early") is None)
    seen = set()
    for item in items:
        if item.get_closest_marker("daily"):
            test = item.nodeid.partition("[")[0]
            if test in seen:
                item.add_marker(pytest.mark.slow)
            seen.add(test)


def pytest_collection_finish() -> None:
    """Take torch, transformers and the tests out of the collector's sight: they stay anyway."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    import torch

    torch.set_num_threads(1)
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _ctrl_c_is_heard() -> Iterator[None]:
    """A background job inherits an ignored SIGINT, which Python and its children leave ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(scope="session")
def shipped_path() -> Path:
    """Folder of the trained model in the repository."""
    return SHIPPED


@pytest.fixture
def shipped(shipped_path: Path) -> Any:
    """The trained model, float32, fresh for every test."""
    import torch
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(shipped_path, dtype=torch.float32).eval()


TEXT = "".join(
    f"{a} and {b} make {a + b}; " for a in range(3, 40, 2) for b in range(1, 30, 3) if a != b
)


def save_tiny(folder: Path, **config: Any) -> Path:
    """A two-layer Llama with a tokenizer of characters, saved to `folder`."""
    import torch
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    characters = ["<unk>", "<s>", *sorted(set(TEXT))]
    inner = Tokenizer(models.WordLevel({c: i for i, c in enumerate(characters)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner, unk_token="<unk>", bos_token="<s>", eos_token="<s>"
    )
    torch.manual_seed(0)
    sizes: dict[str, Any] = {
        "vocab_size": len(characters), "hidden_size": 32, "intermediate_size": 48,
        "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
        "max_position_embeddings": 512, "bos_token_id": 1, "eos_token_id": 1,
    }  # fmt: skip
    LlamaForCausalLM(LlamaConfig(**{**sizes, **config})).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a tiny random Llama with a tokenizer; not to be changed."""
    return save_tiny(tmp_path_factory.mktemp("tiny") / "model")


@pytest.fixture(scope="session")
def tiny_text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text file its tokenizer covers."""
    file = tmp_path_factory.mktemp("text") / "text.txt"
    file.write_text(TEXT, encoding="utf-8")
    return file
