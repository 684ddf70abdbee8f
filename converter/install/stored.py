"""What a checkpoint stores about its converted sites, and how they are put back."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from reattend.errors import ModelError
from reattend.install.adapter import Adapter, install, replace_module
from reattend.install.around import Around
from reattend.install.binding import Binding
from reattend.install.graph import GraphSite
from reattend.mixers.base import build_mixer

FORMAT = 1


def check_format(stored: Mapping[str, Any], where: str) -> None:
    """Refuse a checkpoint that a newer reattend wrote.

    Raises:
        ModelError: its format number is above ours.
    """
    if int(stored.get("format", 0)) > FORMAT:
        raise ModelError(
            f"this checkpoint has format {stored['format']}; this reattend reads up to {FORMAT}",
            where=where,
            next_step="pip install -U reattend",
        )


def describe(model: nn.Module) -> list[dict[str, Any]]:
    """Every installed mixer, as a checkpoint stores it."""
    sites = []
    for path, module in model.named_modules():
        if isinstance(module, Adapter):
            binding = module.binding.model_dump(mode="json")
            if module.binding.around is None:
                del binding["around"]
            if not module.binding.absent:
                del binding["absent"]
            sites.append({"path": path, "binding": binding, **module.mixer.described()})
        elif isinstance(module, GraphSite):
            sites.append({"path": module.path, "binding": None, **module.mixer.described()})
    return sites


def install_empty(model: nn.Module, sites: list[dict[str, Any]]) -> None:
    """Put empty mixers where `sites` say; weights come from the checkpoint."""
    prefix = getattr(model, "base_model_prefix", "")
    for site in sites:
        path = local_path(model, site["path"], prefix)
        if path is None:
            continue
        mixer = build_mixer(site["kind"], site["config"])
        binding = Binding.model_validate(site["binding"])
        around = None if binding.around is None else Around(binding.around)
        replace_module(model, path, install(model.get_submodule(path), mixer, binding, around))


def local_path(model: nn.Module, path: str, prefix: str) -> str | None:
    """A site's path seen from a headless (or headed) variant of the model; None if absent."""
    for candidate in (path, path.removeprefix(f"{prefix}."), f"{prefix}.{path}"):
        try:
            model.get_submodule(candidate)
        except AttributeError:
            continue
        return candidate
    return None
