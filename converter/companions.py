"""What lies beside a model's weights: generation settings, tokenizer, licence, processor."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from torch import nn

#: of the original's folder: what its licence asks for, and how its images and chats are prepared
_CARRIED = (
    "LICENSE*", "LICENCE*", "NOTICE*", "USE_POLICY*",
    "*processor_config.json", "chat_template.*",
)  # fmt: skip


def write_companions(
    folder: Path, model: nn.Module, tokenizer: Any = None, original: Path | None = None
) -> None:
    """Write them into `folder`.

    Args:
        folder: exists.
        model: its generation settings are written where it has some.
        tokenizer: saved where given.
        original: a folder whose licence and processor files are copied, if nothing of their name
            was written yet.
    """
    generation = getattr(model, "generation_config", None)
    if generation is not None and not (folder / "generation_config.json").exists():
        generation.save_pretrained(folder)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    if original is None:
        return
    for pattern in _CARRIED:
        for file in sorted(original.glob(pattern)):
            if file.is_file() and not (folder / file.name).exists():
                shutil.copyfile(file, folder / file.name)
