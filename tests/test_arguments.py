"""What is passed wrongly to the public calls is one clear error, before anything is opened."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from decoder_models import decoder

from reattend import Plan, Report, convert, export, find_attention, load
from reattend.errors import ReattendError

ROWS = [torch.full((2, 40), 500)]
MLA = {"rules": [{"sites": "*", "to": "mla", "kv_lora_rank": 8, "qk_rope_head_dim": 4}]}
MODEL = Path(__file__).parent.parent / "examples" / "models" / "pycode-gqa"

WRONG: dict[str, tuple[Callable[[Any], Any], str]] = {
    "folder None": (lambda m: load(None), "folder must be the path"),
    "folder 5": (lambda m: load(5), "folder must be the path"),
    "export 5": (lambda m: export(5, out="x"), "model must be the path"),
    "export out": (lambda m: export(m, out=None), "out must be the path"),
    "find None": (lambda m: find_attention(None), "not a model: NoneType"),
    "find id": (lambda m: find_attention("some/model"), "no such model on this machine"),
    "convert id": (lambda m: convert("some/model"), "hf download some/model"),
    "find list": (lambda m: find_attention(m, inputs=[1]), "inputs must be a dict"),
    "seed": (lambda m: convert(m, seed=-1), "whole number from 0"),
    "large seed": (lambda m: convert(m, seed=2**80), "whole number from 0"),
    "seed text": (lambda m: convert(m, seed="a"), "whole number from 0"),
    "out": (lambda m: convert(m, out=5), "out must be the path"),
    "on_event": (lambda m: convert(m, on_event=5), "on_event must be a function"),
    "ids": (lambda m: convert(m, plan=MLA, data=ROWS), r"largest is 500; .* 97 rows"),
    "tokenizer": (
        lambda m: convert(m, plan=MLA, data=["ab"] * 9, tokenizer=5), "Not a tokenizer: int",
    ),
    "flag": (lambda m: convert(m, overwrite="no"), "overwrite must be True or False"),
    "trust": (lambda m: convert("x", trust_remote_code="no"), "trust_remote_code must be True or"),
    "batch": (
        lambda m: convert(m, plan=MLA, data=[{"foo": torch.ones(2, 9)}]), "on a batch of the data",
    ),
    "export dtype": (lambda m: export(m, out="x", dtype=3), "not a dtype: int"),
    "export tokenizer": (lambda m: export(m, out="x", tokenizer="x"), "not a tokenizer: str"),
    "report None": (lambda m: Report.load(None), "source must be the path"),
    "settings": (lambda m: Plan.load("transmla").with_set("a=1"), "settings must be a list"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_wrong_arguments_are_named(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    call, words = WRONG[name]
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ReattendError, match=words) as caught:
        call(decoder("llama", layers=1, groups=2))
    assert caught.value.exit_code == 2


@pytest.mark.slow
def test_a_folder_is_looked_at_with_and_without_weights(tmp_path: Path) -> None:
    found = find_attention(MODEL)
    assert found.sites and all(site.verified for site in found.sites)
    shutil.copy(MODEL / "config.json", tmp_path)
    empty = find_attention(str(tmp_path))
    assert [s.path for s in empty.sites] == [s.path for s in found.sites]
    assert not any(site.verified for site in empty.sites)
