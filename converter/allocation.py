"""Options that wait for statistics: hand sites that share them to their conversion together."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager

from torch import nn

from reattend.data import Dataset
from reattend.divergence import Divergence
from reattend.mixers.base import Mixer
from reattend.passes.rewrite.base import Gap, Measure, Subject
from reattend.preflight import Choice
from reattend.rewriting import normal_forms
from reattend.statistics import SiteStatistics


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
        data: calibration rows, for `Divergence`; a model whose blocks have no modules of their
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
        measure: Divergence | None = None
        if data is not None and all(c.site.owner != "graph" for c in group):
            chosen = {c.site.path: c for c in group}
            measure = Divergence(model, chosen, data, conversion.rehearsal)
        subjects = [
            Subject(c.site.path, forms[c.site.path], moments[c.site.path], c.options) for c in group
        ]
        told = Told(measure, progress)
        for choice, options in zip(group, conversion.allocate(subjects, told), strict=True):
            choice.options = options


class Told(Measure):
    """A `Divergence`, or none, that tells of every site it measures."""

    def __init__(self, measure: Divergence | None, progress: Callable[[str], None] | None) -> None:
        self.measure, self.progress = measure, progress

    def __call__(self, path: str, mixer: Mixer) -> float | None:
        """See `Measure`."""
        if self.progress is not None:
            self.progress(path)
        return None if self.measure is None else self.measure(path, mixer)

    def trial(self, mixers: Mapping[str, Mixer]) -> AbstractContextManager[Gap] | None:
        """See `Measure`."""
        return None if self.measure is None else self.measure.trial(mixers)
