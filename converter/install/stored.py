"""What a checkpoint stores about its converted sites, and how they are put back."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError
from torch import nn

from reattend.errors import ModelError
from reattend.install.adapter import Adapter, install, replace_module
from reattend.install.around import Around
from reattend.install.binding import Binding
from reattend.install.graph import GraphSite
from reattend.mixers.base import Mixer
from reattend.mixers.kinds import build_mixer

FORMAT = 1


def check_format(stored: Mapping[str, Any], where: str) -> None:
    """Refuse a checkpoint that a newer reattend wrote, or whose sites are not described.

    Raises:
        ModelError: its format is above ours or no number, or a site lacks a part.
    """
    number = stored.get("format")
    if not isinstance(number, int) or isinstance(number, bool) or number < 1:
        raise ModelError(
            "this checkpoint has no format number",
            where=where,
            why=f"`format` must be a whole number from 1 to {FORMAT}, got {number!r}",
            next_step="copy or download the folder again, or convert the model again",
        )
    if number > FORMAT:
        raise ModelError(
            f"this checkpoint has format {number}; this reattend reads up to {FORMAT}",
            where=where,
            next_step="pip install -U reattend",
        )
    sites = stored.get("sites")
    parts = {"path", "kind", "config", "binding"}
    if not isinstance(sites, list) or not all(
        isinstance(s, Mapping) and parts <= s.keys() for s in sites
    ):
        raise _unreadable(where, f"every entry of `sites` must have {', '.join(sorted(parts))}")


def describe(model: nn.Module) -> list[dict[str, Any]]:
    """Every installed mixer, as a checkpoint stores it."""
    sites = []
    for path, module in model.named_modules():
        if isinstance(module, Adapter):
            binding = module.binding.model_dump(mode="json")
            if module.binding.around is None:
                del binding["around"]
            for younger in ("absent", "projection"):
                if not binding[younger]:
                    del binding[younger]
            sites.append({"path": path, "binding": binding, **module.mixer.described()})
        elif isinstance(module, GraphSite):
            sites.append({"path": module.path, "binding": None, **module.mixer.described()})
    return sites


def install_empty(model: nn.Module, sites: list[dict[str, Any]]) -> None:
    """Put empty mixers where `sites` say; weights come from the checkpoint."""
    prefix = getattr(model, "base_model_prefix", "")
    mixers: dict[str, Mixer] = {}
    for site in sites:
        path = local_path(model, site["path"], prefix)
        if path is None:
            continue
        try:
            mixer = build_mixer(site["kind"], site["config"])
            binding = Binding.model_validate(site["binding"])
        except ValidationError as problem:
            said = [f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in problem.errors()]
            raise _unreadable(site["path"], "; ".join(said[:3])) from problem
        mixers[site["path"]] = mixer
        around = None if binding.around is None else Around(binding.around)
        replace_module(model, path, install(model.get_submodule(path), mixer, binding, around))
    connect(mixers)


def connect(mixers: Mapping[str, Mixer]) -> None:
    """Let the blocks that read others find them.

    Args:
        mixers: of a model, by the path that checkpoints give its site.

    Raises:
        ModelError: one of them is not there.
    """
    for path, mixer in mixers.items():
        if not mixer.reads:
            continue
        if mixer.reads not in mixers:
            raise ModelError(
                "a converted block reads another one, which is not there",
                where=path,
                why=f"it needs the block at {mixer.reads}",
                next_step="load the whole model, or convert the blocks of its group together",
            )
        mixer.connect(mixers[mixer.reads])


def installed(model: nn.Module) -> dict[str, Mixer]:
    """Every mixer in place, by its site's path."""
    found: dict[str, Mixer] = {}
    for path, module in model.named_modules():
        if isinstance(module, Adapter):
            found[path] = module.mixer
        elif isinstance(module, GraphSite):
            found[module.path] = module.mixer
    return found


def _unreadable(where: str, why: str) -> ModelError:
    return ModelError(
        "what this checkpoint says about its converted blocks cannot be read",
        where=where,
        why=why,
        next_step="copy or download the folder again, or convert the model again",
    )


def local_path(model: nn.Module, path: str, prefix: str) -> str | None:
    """A site's path seen from a headless (or headed) variant of the model; None if absent."""
    for candidate in (path, path.removeprefix(f"{prefix}."), f"{prefix}.{path}"):
        try:
            model.get_submodule(candidate)
        except AttributeError:
            continue
        return candidate
    return None
