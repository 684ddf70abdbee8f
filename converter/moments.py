"""The statistics of a conversion: collected from the original once, kept beside the run."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from reattend.data import Dataset
from reattend.finder import FoundAttention
from reattend.install.graph import hidden_values
from reattend.preflight import Choice
from reattend.rewriting import arounds, normal_forms
from reattend.statistics import Need, SiteStatistics, collect
from reattend.workdir import Workdir, digest


def site_moments(
    model: nn.Module,
    hashes: Any,
    found: FoundAttention,
    wanted: list[Choice],
    data: Dataset,
    batch_size: int,
    work: Workdir | None,
    progress: Callable[[int], None],
    needs: Mapping[str, frozenset[Need]] | None = None,
) -> tuple[dict[str, SiteStatistics], bool]:
    """Statistics by site path, and whether an interrupted run had them already.

    Args:
        model: the original.
        hashes: of its weights; part of what stored statistics are known by.
        found: where its blocks are.
        wanted: the sites, with what each needs.
        data: rows of calibration text.
        batch_size: rows per call of the model.
        work: where statistics are kept; None keeps nothing.
        progress: called with the number of tokens seen so far.
        needs: by site, in place of what `wanted` needs.
    """
    paths = [c.site.path for c in wanted]
    needs = needs or {c.site.path: c.needs for c in wanted}
    key = digest([hashes, data.fingerprint, [[p, *sorted(needs[p])] for p in paths]])
    names = {path: f"work/statistics/{i}.safetensors" for i, path in enumerate(paths)}
    if work is not None and work.has("statistics", key):
        from safetensors.torch import load_file

        read = {p: load_file(work.path(n)) for p, n in names.items()}
        return {p: SiteStatistics.from_tensors(t) for p, t in read.items()}, True
    forms = normal_forms(model, wanted)
    regions = {c.site.path: c.site.region for c in wanted if c.site.owner == "graph"}

    def inside(batch: dict[str, Any]) -> dict[str, Any]:
        known = {k: v for k, v in batch.items() if k in found.capture.inputs}
        return hidden_values(found.capture.gm, regions, found.capture.placeholders(known))

    moments = collect(
        model,
        {c.site.path: (forms[c.site.path], c.site.binding) for c in wanted},
        data.batches(batch_size),
        needs=needs,
        inside=inside if regions else None,
        around=arounds(model, wanted),
        progress=progress,
    )
    if work is not None:
        for path, name in names.items():
            work.publish_tensors(name, moments[path].tensors())
        work.mark("statistics", key)
    return moments, False
