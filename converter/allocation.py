"""Options that wait for statistics: hand sites that share them to their conversion together."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from reattend.at_once import vocabulary_of, without_logits
from reattend.calibrate.stage import finite_or_raise
from reattend.data import Dataset
from reattend.host import beside, device_of
from reattend.install.adapter import install, replace_module
from reattend.mixers.base import Mixer
from reattend.passes.rewrite.base import Measure, Subject
from reattend.preflight import Choice
from reattend.rewriting import normal_forms, shared_copy
from reattend.running import evaluation
from reattend.statistics import SiteStatistics

#: Rows a divergence is measured on, and the most bytes of outputs kept for it.
ROWS, OUTPUT_BYTES = 4, 64 << 20


def allocate(
    model: nn.Module,
    choices: list[Choice],
    moments: dict[str, SiteStatistics],
    data: Dataset | None,
    progress: Callable[[str], None] | None = None,
) -> None:
    """Give every choice its final options, in place.

    Args:
        model: the original.
        choices: from `preflight`; sites with equal options share a budget.
        moments: their statistics by path.
        data: calibration rows, for `divergence`; a model whose blocks have no modules of their
            own cannot run with one of them replaced, so its sites are not measured.
        progress: called with the path of every site that is measured.
    """
    groups: dict[tuple[str, str], list[Choice]] = {}
    for c in choices:
        if c.conversion is not None and c.conversion.undecided(c.options):
            key = (c.conversion.name, c.options.model_dump_json())
            groups.setdefault(key, []).append(c)
    if not groups:
        return
    forms = normal_forms(model, [c for group in groups.values() for c in group])
    for group in groups.values():
        conversion = group[0].conversion
        assert conversion is not None
        measure: Measure | None = None
        if data is not None and all(c.site.owner != "graph" for c in group):
            chosen = {c.site.path: c for c in group}
            measure = divergence(model, chosen, data, conversion.rehearsal)
        subjects = [
            Subject(c.site.path, forms[c.site.path], moments[c.site.path], c.options) for c in group
        ]
        told = _told(measure, progress)
        for choice, options in zip(group, conversion.allocate(subjects, told), strict=True):
            choice.options = options


def _told(measure: Measure | None, progress: Callable[[str], None] | None) -> Measure:
    """`measure`, telling of every site."""

    def told(path: str, mixer: Mixer) -> float | None:
        if progress is not None:
            progress(path)
        return None if measure is None else measure(path, mixer)

    return told


def divergence(
    model: nn.Module,
    choices: dict[str, Choice],
    data: Dataset,
    rehearsal: Callable[[dict[str, Any]], dict[str, Any]] = dict,
) -> Measure:
    """How far the model's output moves when one site is replaced.

    Mean KL(original || changed) over real tokens for models with logits, else the mean squared
    difference of the first output. `rehearsal` makes the rows it is measured on from the data's.
    """
    target = shared_copy(model)
    batch = beside(model, rehearsal(next(iter(data.batches(ROWS)))))
    mask = batch.get("attention_mask")
    real = mask.bool() if isinstance(mask, Tensor) and mask.dim() == 2 else None
    tokens = next(v for v in batch.values() if isinstance(v, Tensor)).shape[:2]
    if without_logits(model) and len(tokens) == 2:
        # evenly spaced tokens of all rows rather than few rows: they share less context
        places = kept_places(*tokens, vocabulary_of(model)).to(device_of(model))
        if len(places) < tokens[1]:
            batch = {**batch, "logits_to_keep": places}
            real = None if real is None else real[:, places.to(real.device)]
    reference = _outputs(model, batch)
    fits = max(1, OUTPUT_BYTES // max(1, reference[:1].numel() * 4))
    if fits < len(reference):
        batch = {
            k: v[:fits] if isinstance(v, Tensor) and k != "logits_to_keep" else v
            for k, v in batch.items()
        }
        reference = reference[:fits].clone()
        real = None if real is None else real[:fits]
    finite_or_raise(reference, "the model's output", real)
    logits = _has_logits(model, batch)
    if logits:
        reference = reference.log_softmax(-1)

    def measure(path: str, mixer: Mixer) -> float:
        owner, binding = target.get_submodule(path), choices[path].site.binding
        assert binding is not None
        dtype = next(model.get_submodule(path).parameters()).dtype
        replace_module(target, path, install(owner, copy.deepcopy(mixer).to(dtype), binding))
        try:
            moved = _outputs(target, batch)
        finally:
            replace_module(target, path, owner)
        if logits:
            gap = (reference.exp() * (reference - moved.log_softmax(-1))).sum(-1)
        else:
            gap = (reference - moved).square().flatten(2).mean(-1)
        return float((gap if real is None else gap[real.to(gap.device)]).double().mean())

    return measure


def kept_places(rows: int, length: int, vocabulary: int) -> Tensor:
    """Positions whose logits are compared: all, or as many, evenly spaced, as `OUTPUT_BYTES`
    of float32 hold for all rows.

    The last token is among them; the first ones, which see little, come last in line.
    """
    most = max(1, OUTPUT_BYTES // max(1, 4 * rows * vocabulary))
    count = min(length, most)
    return length - 1 - torch.arange(count).flip(0) * length // count


def _run(model: nn.Module, batch: dict[str, Any]) -> Any:
    with evaluation(model), torch.no_grad():
        return model(**batch)


def _has_logits(model: nn.Module, batch: dict[str, Any]) -> bool:
    one = {
        k: v[:1] if isinstance(v, Tensor) and k != "logits_to_keep" else v for k, v in batch.items()
    }
    return isinstance(getattr(_run(model, one), "logits", None), Tensor)


def _outputs(model: nn.Module, batch: dict[str, Any]) -> Tensor:
    """Logits, or the first tensor of the output, float32."""
    output = _run(model, batch)
    found = getattr(output, "logits", None)
    if not isinstance(found, Tensor):
        found = output if isinstance(output, Tensor) else output[0]
    return found.float()
