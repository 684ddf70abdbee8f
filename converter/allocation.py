"""Options that wait for measurements: hand sites that share them to their conversion together."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any

from torch import Tensor, nn

from reattend.data import Dataset
from reattend.divergence import Divergence
from reattend.mixers.base import Mixer
from reattend.outdir import read_json
from reattend.passes.rewrite.base import (
    TRAINING_TRIALS,
    Answered,
    Conversion,
    Gap,
    Measure,
    Subject,
)
from reattend.preflight import Choice
from reattend.rewriting import normal_forms
from reattend.statistics import SiteStatistics
from reattend.workdir import Workdir, digest

#: Trials so far, trials in all, and the site they are about.
Progress = Callable[[int, int, str], None]
_STAGE, _FILE = "choose", "work/chosen.json"


def waiting(choices: list[Choice]) -> list[list[Choice]]:
    """Sites whose options are to be chosen, those of one rule with options that agree together."""
    groups: dict[tuple[int, str], list[Choice]] = {}
    for c in choices:
        if c.conversion is not None and c.conversion.undecided(c.options):
            key = (id(c.rule), c.conversion.together(c.options))
            groups.setdefault(key, []).append(c)
    return list(groups.values())


def trials(groups: list[list[Choice]]) -> int:
    """How often a few rows will be run through the model to choose."""
    return sum(_of(group).trials([c.config for c in group], group[0].options) for group in groups)


def allocate(
    model: nn.Module,
    state: Any,
    choices: list[Choice],
    moments: dict[str, SiteStatistics],
    data: Dataset | None,
    work: Workdir | None = None,
    progress: Progress | None = None,
) -> bool:
    """Give every choice its final options, in place; whether an interrupted run had them already.

    Args:
        model: the original.
        state: what its weights are (`Source.state`); part of what stored options are known by.
        choices: from `preflight`; the sites of a rule share its budget.
        moments: their statistics by path.
        data: calibration rows, for `Divergence`; a model whose blocks have no modules of their
            own cannot run with one of them replaced, so its sites are not measured.
        work: where the outcome is kept; None keeps nothing.
        progress: told of every trial.
    """
    groups = waiting(choices)
    each = [c for group in groups for c in group]
    asked = [
        [[c.site.path, _of([c]).name, c.options.model_dump(mode="json")] for c in group]
        for group in groups
    ]
    key = digest([state, data.fingerprint if data is not None else None, asked])
    if work is not None and work.has(_STAGE, key):
        stored = read_json(work.path(_FILE)) or {}
        for c in each:
            c.options = _of([c]).Options.model_validate(stored[c.site.path])
        _settle(each)
        return True
    forms = normal_forms(model, each)
    counted = Counted(trials(groups), progress)
    for group in groups:
        conversion = _of(group)
        measure: Divergence | None = None
        if data is not None and all(c.site.owner != "graph" for c in group):
            chosen = {c.site.path: c for c in group}
            rehearsal = partial(conversion.rehearsal, options=group[0].options)
            measure = Divergence(model, chosen, data, rehearsal)
        subjects = [
            Subject(c.site.path, forms[c.site.path], moments[c.site.path], c.options) for c in group
        ]
        counted.measure = measure
        for choice, options in zip(group, conversion.allocate(subjects, counted), strict=True):
            choice.options = options
    if work is not None:
        work.publish_json(_FILE, {c.site.path: c.options.model_dump(mode="json") for c in each})
        work.mark(_STAGE, key)
    _settle(each)
    return False


def _settle(choices: list[Choice]) -> None:
    """Sites for which their conversion has chosen another one get that."""
    for c in choices:
        other = _of([c]).instead(c.options)
        if other is not None:
            c.conversion, c.options = other, other.Options()


class Counted(Measure):
    """A `Divergence`, or none, that tells of every trial."""

    def __init__(self, total: int, progress: Progress | None) -> None:
        self.measure: Divergence | None = None
        self.done, self.total, self.progress = 0, total, progress

    def __call__(self, path: str, mixer: Mixer) -> float | None:
        """See `Measure`."""
        found = None if self.measure is None else self.measure(path, mixer)
        self._count(1, path)
        return found

    @contextmanager
    def _trained(self, measure: Divergence, mixers: Mapping[str, Mixer]) -> Iterator[Gap]:
        with measure.trial(mixers) as gap:

            def counted() -> Tensor:
                found = gap()
                self._count(TRAINING_TRIALS, "")
                return found

            yield counted

    def trial(self, mixers: Mapping[str, Mixer]) -> Any:
        """See `Measure`."""
        return None if self.measure is None else self._trained(self.measure, mixers)

    def answers(
        self, mixers: Mapping[str, Mixer], length: int, rows: int
    ) -> AbstractContextManager[Iterator[Answered]] | None:
        """See `Measure`."""
        if self.measure is None or not self.measure.logits:
            return None
        return self._told(self.measure, mixers, length, rows)

    @contextmanager
    def _told(
        self, measure: Divergence, mixers: Mapping[str, Mixer], length: int, rows: int
    ) -> Iterator[Iterator[Answered]]:
        def counted(runs: Iterator[Answered]) -> Iterator[Answered]:
            for run in runs:
                yield run
                self._count(1, "")

        with measure.answers(mixers, length, rows) as runs:
            yield counted(runs)

    @property
    def length(self) -> int:
        """See `Measure`."""
        return 0 if self.measure is None else self.measure.length

    def _count(self, trials: int, path: str) -> None:
        self.done = min(self.done + trials, self.total)
        if self.progress is not None:
            self.progress(self.done, self.total, path)


def _of(group: list[Choice]) -> Conversion:
    conversion = group[0].conversion
    assert conversion is not None
    return conversion
