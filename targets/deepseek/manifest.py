"""`deepseek.json`: what was written, how it was proven, and who loads it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from reattend.errors import ModelError
from reattend.targets.deepseek.loaders import Loader

MANIFEST = "deepseek.json"
SCHEMA = 1


class Frozen(BaseModel):
    """Immutable, unknown keys are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Check(Frozen):
    """The stock class against the converted model: |difference| / max(1, largest |logit|)."""

    what: Literal["weights", "checkpoint"]
    batch: int
    prefill: int
    padding: int
    steps: int
    error: float
    limit: float


class Cache(Frozen):
    """Numbers cached per token and layer: r + R, and what they were."""

    kv_lora_rank: int
    qk_rope_head_dim: int
    original: int
    converted: list[int]
    exported: int


class Manifest(Frozen):
    """`latent_norm`: `own` (the model's), or `anchored` (does nothing, to `norm_error`)."""

    schema_version: Literal[1] = 1
    model_class: str
    dtype: str
    cache: Cache
    latent_norm: Literal["own", "anchored"]
    norm_error: float
    attention_bias: bool
    rope_type: str
    padded: bool
    loaders: list[Loader]
    checks: list[Check]
    source_sha256: str
    versions: dict[str, str]


def read_manifest(folder: Path) -> Manifest:
    """The manifest of an export.

    Raises:
        ModelError: the folder has none that this version reads.
    """
    path = folder / MANIFEST
    try:
        content: Any = json.loads(path.read_text(encoding="utf-8"))
        return Manifest.model_validate(content)
    except (OSError, ValueError, ValidationError) as error:
        raise ModelError(
            "this folder is not a DeepSeek export of reattend",
            where=str(path),
            why=str(error).partition("\n")[0],
            next_step='write one with export(model, target="deepseek", out=...)',
        ) from error
