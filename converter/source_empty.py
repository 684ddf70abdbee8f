"""A model from its config alone, to look at: weights on the meta device, nothing read or made."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from reattend.errors import ModelError
from reattend.hollow import empty
from reattend.source_load import read_architecture


def has_weights(folder: Path) -> bool:
    """Whether a model folder holds weight files of any kind."""
    kinds = ("*.safetensors", "*.bin", "*.pt", "*.safetensors.index.json")
    return any(next(folder.glob(kind), None) is not None for kind in kinds)


def readable(model: Any, trust_remote_code: bool = False) -> nn.Module:
    """A model to look at: a module as it is, a folder or id opened, without weights if it has none.

    Raises:
        ModelError: missing folder or config, damaged weights, remote code, quantised weights, NaN.
        ArgumentError: not a model, a folder or an id.
    """
    if isinstance(model, nn.Module):
        return model
    if isinstance(model, str | Path):
        folder = Path(model)
        if (folder / "config.json").is_file() and not has_weights(folder):
            return open_empty(str(model), trust_remote_code)
    from reattend.source import open_source

    return open_source(model, trust_remote_code=trust_remote_code).model


def open_empty(given: str, trust_remote_code: bool = False) -> nn.Module:
    """The model that the `config.json` of a folder (or of an id on this machine) describes.

    Raises:
        ModelError: no config, remote code that was not asked for, or no model can be made of it.
    """
    architecture = read_architecture(given, trust_remote_code)
    trust = {"trust_remote_code": True} if trust_remote_code else {}
    try:
        import transformers

        config = transformers.AutoConfig.from_pretrained(given, local_files_only=True, **trust)
        made: Any = getattr(transformers, architecture or "", transformers.AutoModelForCausalLM)
        return empty(made, config)
    except Exception as problem:  # a config can make any part of transformers fail
        first = (str(problem).strip().splitlines() or [""])[0]
        raise ModelError(
            "no model can be made of this config",
            where=given,
            why=f"{type(problem).__name__}: {first}",
            next_step="check config.json: `architectures` names a class of transformers",
        ) from problem
