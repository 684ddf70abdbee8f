"""Swap the chosen blocks in a copy of the model that shares every unchanged tensor."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, fx, nn

from reattend.capture import Capture
from reattend.errors import ArgumentError
from reattend.finder import AttentionSite
from reattend.inputs import is_hf
from reattend.install.adapter import Adapter, install, replace_module
from reattend.install.around import Around
from reattend.install.graph import drop_unused, replace_region
from reattend.install.stored import connect, installed
from reattend.mixers.dense import DenseAttention
from reattend.passes.rewrite.base import Built, Subject
from reattend.preflight import Choice
from reattend.sharing import replacements, share_in_place
from reattend.surround import filled
from reattend.weights import build_dense


@dataclass
class Rewritten:
    """The converted model, what was built for each site by path, and whether it is a graph."""

    model: nn.Module
    built: dict[str, Built] = field(default_factory=dict)
    graph: bool = False


def lookup(model: nn.Module) -> Callable[[str], Tensor]:
    """Parameters of a model by name, tied names included."""
    tensors: dict[str, Tensor] = dict(model.named_parameters(remove_duplicate=False))
    tensors |= dict(model.named_buffers(remove_duplicate=False))
    return lambda name: tensors[name].detach()


def normal_forms(model: nn.Module, choices: list[Choice]) -> dict[str, DenseAttention]:
    """The normal form of every site that is converted; identity gathers share storage."""
    read = lookup(model)
    forms = {}
    for site in (c.site for c in choices if c.action == "converted"):
        form = build_dense(site.spec, read, site.hidden_size, site.memory_size)
        projection = site.binding.projection if site.binding is not None else ""
        if projection and isinstance(model.get_submodule(projection), nn.Linear):
            form.outer = read(f"{projection}.weight")
        forms[site.path] = form
    return forms


def around_of(model: nn.Module, site: AttentionSite) -> Around | None:
    """The programs of a site's owner with the model's own weights.

    A weight that something outside of the owner holds too is copied: the programs are then no
    longer tied to it.
    """
    owner = model.get_submodule(site.path)
    if isinstance(owner, Adapter):  # converted before: the programs stay
        return owner.around
    if site.surrounding is None:
        return None
    tensors: dict[str, Tensor] = dict(model.named_parameters(remove_duplicate=False))
    tensors |= dict(model.named_buffers(remove_duplicate=False))
    elsewhere = {id(t) for n, t in tensors.items() if not n.startswith(f"{site.path}.")}

    def own(name: str) -> Tensor:
        tensor = tensors[name]
        if id(tensor) in elsewhere:
            return nn.Parameter(tensor.detach().clone(), tensor.requires_grad)
        elsewhere.add(id(tensor))
        return tensor

    return filled(site.surrounding, own)


def arounds(model: nn.Module, choices: list[Choice]) -> dict[str, Around]:
    """The programs of every owner that has some, by site path."""
    made = {c.site.path: around_of(model, c.site) for c in choices if c.site.owner == "module"}
    return {path: around for path, around in made.items() if around is not None}


def shared_copy(model: nn.Module, *, owned: bool = False) -> nn.Module:
    """A copy of the module tree on the same memory, copy-on-write.

    Parameters become new objects, so that training or freezing the copy's flags leaves the
    original's alone, and writing to a tensor of either model leaves the other's as it was.

    Args:
        owned: nobody else will ever see `model`; nothing need be copied on write.
    """
    return copy.deepcopy(model, dict(replacements(model, plain=owned)))


def rewrite(
    model: nn.Module,
    choices: list[Choice],
    statistics: dict[str, Any],
    *,
    capture: Capture | None = None,
    inplace: bool = False,
    owned: bool = False,
    spend: bool = False,
    progress: Callable[[Choice, int, int], None] | None = None,
) -> Rewritten:
    """Build every mixer and swap its owner.

    Args:
        model: the original.
        choices: from `preflight`.
        statistics: by site path, what the conversions asked for.
        capture: where the sites were found; needed if one has no owning module, because then
            the captured graph becomes the model.
        inplace: change `model` itself.
        owned: nobody else will ever see `model`, so nothing need be copied on write.
        spend: take every site's statistics out of `statistics` once they are used, so that new
            weights take their place in memory.
        progress: (choice, done, total) after each site.
    """
    converted = [c for c in choices if c.action == "converted"]
    graph = any(c.site.owner == "graph" for c in converted)
    if graph and (capture is None or inplace):
        raise ArgumentError(
            "a block of this model has no module of its own, so the model becomes a graph",
            next_step="set inplace=False",
        )
    if graph and capture is not None:
        target: nn.Module = capture.gm
        forms = normal_forms(model, choices)
    else:
        target = model if inplace else shared_copy(model, owned=owned)
        forms = normal_forms(target, choices)
    result = Rewritten(target, graph=graph)
    if not graph and is_hf(target):
        from reattend.targets.huggingface import keep_recording

        keep_recording(target, [c.site.path for c in converted if c.site.surrounding is not None])
    together: dict[str, Built] = {}
    for number, choice in enumerate(converted, 1):
        path = choice.site.path
        assert choice.conversion is not None
        known = statistics.pop(path, None) if spend else statistics.get(path)
        if choice.conversion.joins:
            if path not in together:
                together |= _together(converted, choice, forms, statistics, known)
            built = together.pop(path)
        else:
            built = choice.conversion.build(forms.pop(path), known, choice.options)
        del known
        if graph:
            assert capture is not None and isinstance(target, fx.GraphModule)
            opaque = choice.site.spec.core.pattern.kind == "opaque"
            new = replace_region(
                target, path, choice.site.region, built.mixer, capture.placeholders(),
                choice.site.follows_padding or opaque,
            )  # fmt: skip
            for other in (c.site.region for c in converted):  # blocks may feed each other
                other.replaced(choice.site.region.exit.node, new)
        else:
            assert choice.site.binding is not None
            owner = target.get_submodule(path)
            around = around_of(target, choice.site)
            adapter = install(owner, built.mixer, choice.site.binding, around)
            replace_module(target, path, adapter)
        result.built[path] = built
        if progress is not None:
            progress(choice, number, len(converted))
    connect(installed(target))
    if graph:
        assert isinstance(target, fx.GraphModule)
        drop_unused(target)
        if not owned:
            share_in_place(target)
        target.meta["reattend_class"] = type(model).__name__
    elif is_hf(target):
        from reattend.targets.huggingface import adopt

        adopt(target)
    return result


def _together(
    converted: list[Choice],
    first: Choice,
    forms: dict[str, DenseAttention],
    statistics: dict[str, Any],
    known: Any,
) -> dict[str, Built]:
    """The mixers of all sites that are built with one of them, by path.

    Args:
        converted: every site that changes.
        first: the one whose turn it is; `known` are its statistics, which may be out of the dict.
        forms: normal forms by path; those that are used are taken out.
        statistics: by path; the others' are left in, for their own turns.
        known: see `first`.
    """
    assert first.conversion is not None
    path = first.site.path
    seen: Any = {**statistics, path: known}
    subjects = [
        Subject(p, forms.pop(p), seen.get(p), c.options)
        for c in converted
        if (p := c.site.path) == path
        or (type(c.conversion) is type(first.conversion) and c.options.group == first.options.group)
    ]
    return first.conversion.build_together(subjects)
