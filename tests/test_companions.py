"""What lies beside a model's weights: from the model, its tokenizer, and the original's folder."""

from __future__ import annotations

import json
from pathlib import Path

from decoder_models import decoder

from reattend.companions import write_companions


def test_what_was_written_is_not_replaced(tmp_path: Path) -> None:
    original, folder = tmp_path / "original", tmp_path / "folder"
    for place in (original, folder):
        place.mkdir()
    for name in ("LICENSE", "NOTICE.md", "chat_template.jinja", "video_processor_config.json"):
        (original / name).write_text("theirs")
    (original / "weights.bin").write_text("theirs")
    (folder / "chat_template.jinja").write_text("ours")
    model = decoder("llama", layers=1, groups=2)
    model.generation_config.max_new_tokens = 7
    write_companions(folder, model, None, original)
    assert {p.name: p.read_text() for p in folder.iterdir() if p.suffix != ".json"} == {
        "LICENSE": "theirs", "NOTICE.md": "theirs", "chat_template.jinja": "ours",
    }  # fmt: skip
    assert (folder / "video_processor_config.json").read_text() == "theirs"
    settings = json.loads((folder / "generation_config.json").read_text())
    assert settings["max_new_tokens"] == 7
