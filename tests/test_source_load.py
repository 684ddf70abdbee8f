"""Opening a model the user named: only safetensors are read, and mistakes have words."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from reattend import convert
from reattend.errors import ModelError, OutputError
from reattend.source import open_source


@pytest.fixture
def model(tiny_path: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_path, tmp_path / "model"))


@pytest.fixture
def _nothing_unpickled(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(*_: Any, **__: Any) -> None:
        raise AssertionError("torch.load was called")

    monkeypatch.setattr(torch, "load", load)


def pickle_weights(folder: Path) -> None:
    """The weights as `pytorch_model.bin` only."""
    from safetensors.torch import load_file

    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def edit(folder: Path, **changes: Any) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def cached(folder: Path, home: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The folder as the hub's local cache would hold it; returns its id."""
    from huggingface_hub import constants

    snapshot = home / "models--team--tiny" / "snapshots" / ("0" * 40)
    shutil.copytree(folder, snapshot)
    refs = home / "models--team--tiny" / "refs"
    refs.mkdir()
    (refs / "main").write_text("0" * 40)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(home))
    return "team/tiny"


@pytest.mark.usefixtures("_nothing_unpickled")
def test_pickled_weights_beside_other_safetensors_are_not_read(model: Path) -> None:
    shutil.copy(model / "model.safetensors", model / "adapter.safetensors")
    pickle_weights(model)
    with pytest.raises(ModelError, match=r"cannot be loaded[\s\S]*only safetensors are read"):
        open_source(model)


@pytest.mark.usefixtures("_nothing_unpickled")
def test_an_id_is_read_from_the_cache_and_never_from_a_pickle(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = cached(model, tmp_path / "one", monkeypatch)
    source = open_source(name)
    assert (source.name, source.folder) == ("team/tiny", None)
    assert source.tokenizer is not None
    pickle_weights(model)
    name = cached(model, tmp_path / "two", monkeypatch)
    with pytest.raises(ModelError, match="only safetensors are read"):
        open_source(name)


def test_code_of_a_cached_id_is_refused_by_its_flag(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    edit(model, auto_map={"AutoModelForCausalLM": "m.M"})
    name = cached(model, tmp_path / "cache", monkeypatch)
    with pytest.raises(ModelError, match="trust_remote_code=True"):
        open_source(name)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"hidden_size": "x"}, "cannot be loaded"),
        ({"hidden_size": 30}, "cannot be loaded"),
        ({"num_hidden_layers": -1}, "num_hidden_layers is -1"),
        ({"architectures": ["pipeline"]}, "pipeline is not a model of transformers"),
        ({"architectures": ["LlamaConfig"]}, "LlamaConfig is not a model"),
        ({"architectures": ["LlamaTokenizer"]}, "LlamaTokenizer is not a model"),
        ({"architectures": [5]}, "names no architecture"),
        ({"architectures": "LlamaForCausalLM"}, "names no architecture"),
    ],
)
def test_a_broken_config_is_the_models_fault(
    changes: dict[str, Any], words: str, model: Path
) -> None:
    edit(model, **changes)
    with pytest.raises(ModelError, match=words):
        open_source(model)


@pytest.mark.slow
def test_another_dtype_is_another_result(tiny_path: Path, tmp_path: Path) -> None:
    convert(tiny_path, plan="identity", out=tmp_path / "out")
    with pytest.raises(OutputError, match="made with another weights"):
        convert(tiny_path, plan="identity", out=tmp_path / "out", dtype="bfloat16")
    assert open_source(tiny_path).state != open_source(tiny_path, dtype="bfloat16").state
