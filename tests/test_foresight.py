"""What a plan refuses for shapes alone, of a large checkpoint: before its weights are read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from reattend import convert, foresight, pipeline
from reattend.errors import ModelError, RefusedError

TOO_WIDE = {"rules": [{"sites": "*", "to": "mla", "kv_lora_rank": 4000}]}


def never(*given: Any, **named: Any) -> None:
    raise AssertionError("weights were read")


def test_refused_before_weights_are_read(tiny_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RefusedError) as late:
        convert(tiny_path, TOO_WIDE)
    monkeypatch.setattr(foresight, "LARGE", 1)
    monkeypatch.setattr(pipeline, "open_source", never)
    with pytest.raises(RefusedError) as early:
        convert(tiny_path, TOO_WIDE)
    assert str(early.value) == str(late.value)


def test_what_is_not_refused_is_opened(tiny_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the look from afar finds nothing: the model with its weights decides."""
    monkeypatch.setattr(foresight, "LARGE", 1)
    monkeypatch.setattr(pipeline, "open_source", never)
    with pytest.raises(AssertionError, match="weights were read"):
        convert(tiny_path, "identity")
    with pytest.raises(AssertionError, match="weights were read"):
        convert(tiny_path, {"rules": [{"sites": "nowhere", "to": "dense"}]})
    monkeypatch.undo()
    with pytest.raises(ModelError, match="no such model"):
        convert("no/such-model")
