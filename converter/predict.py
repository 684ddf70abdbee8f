"""What a conversion will cost, before any statistics: cache, parameters, memory, time.

Memory is the peak of each stage above the process's size before the model is opened, so that it
can be laid beside `run.json` (`predict_memory`: what is counted). Time is rough, and rates are
measured on the spot (`predict_time`).
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from torch import nn

from reattend.inputs import is_hf
from reattend.plan import Plan
from reattend.predict_memory import memory, projections, row_length, sizes_of
from reattend.predict_site import Rates, own_bytes, own_seconds
from reattend.predict_time import seconds, statistics_tokens
from reattend.preflight import Choice
from reattend.probe import probe


@dataclass(frozen=True)
class SitePrediction:
    """One site before and after; bytes per token in the cache dtype.

    `peak_bytes` is what the site would add to the model's memory were it the only one to change;
    `seconds` what statistics, sizes and building take for it, the model's own passes aside.
    """

    path: str
    action: str
    conversion: str
    options: dict[str, Any]
    reason: str
    cache_bytes_before: int
    cache_bytes_after: int
    parameters_before: int
    parameters_after: int
    peak_bytes: int
    seconds: float


@dataclass(frozen=True)
class StagePrediction:
    """Peak memory of a stage above the bare process, bytes, and its time, seconds."""

    name: str
    peak_bytes: int
    seconds: float


@dataclass(frozen=True)
class Prediction:
    """What `--dry-run` shows."""

    sites: tuple[SitePrediction, ...]
    stages: tuple[StagePrediction, ...]
    parameters_before: int
    parameters_after: int

    @property
    def peak_bytes(self) -> int:
        """Growth of memory over the bare process, whole run."""
        return max(s.peak_bytes for s in self.stages)

    @property
    def seconds(self) -> float:
        """All stages."""
        return sum(s.seconds for s in self.stages)

    @property
    def peaks(self) -> dict[str, int]:
        """Memory growth by stage."""
        return {s.name: s.peak_bytes for s in self.stages}

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {**asdict(self), "peak_bytes": self.peak_bytes, "seconds": self.seconds}


def predict(
    model: nn.Module,
    choices: list[Choice],
    plan: Plan,
    inputs: dict[str, Any],
    *,
    rows: int | None,
    text: int = 0,
    owned: bool = True,
) -> Prediction:
    """Predict a run.

    Args:
        model: the original, opened.
        choices: from `preflight.choose`.
        plan: its `calibrate` section bounds the data.
        inputs: example arguments of the model, which is run on the first row of them.
        rows: rows of `seq_len` tokens that the data gives; None: sampled from the model.
        text: bytes of text that are tokenised at a time; 0 for tensors.
        owned: reattend loaded the model; nobody else holds it.
    """
    converted = [c for c in choices if c.action == "converted"]
    blocks = [c.site.path for c in converted if c.site.owner != "graph"]
    measured = probe(model, inputs, [*blocks, *projections(choices)])
    sizes = sizes_of(model, choices, measured.saved)
    peaks = memory(sizes, converted, plan, rows, text, is_hf(model), owned)
    rates = Rates.measured()
    times = seconds(sizes, converted, plan, rows, measured, rates)
    grown = sum(c.after.parameters - c.before.parameters for c in converted)
    return Prediction(
        sites=tuple(_site(c, sizes.element, plan, rows, rates) for c in choices),
        stages=tuple(StagePrediction(n, p, round(times[n], 2)) for n, p in peaks.items()),
        parameters_before=sizes.parameters,
        parameters_after=sizes.parameters + grown,
    )


def _site(
    choice: Choice, element: int, plan: Plan, rows: int | None, rates: Rates
) -> SitePrediction:
    before, after, peak, own = choice.before, choice.before, 0, {}
    if choice.action == "converted":
        seq_len = row_length(plan, rows)
        after = choice.after
        peak = own_bytes(choice, element, plan.calibrate.batch_size * seq_len, seq_len)
        own = own_seconds(choice, statistics_tokens(plan, rows), seq_len, rates)
    return SitePrediction(
        path=choice.site.path,
        action=choice.action,
        conversion="" if choice.conversion is None else choice.conversion.name,
        options={} if choice.options is None else choice.options.model_dump(exclude_unset=True),
        reason=choice.reason,
        cache_bytes_before=before.cache * element,
        cache_bytes_after=after.cache * element,
        parameters_before=before.parameters,
        parameters_after=after.parameters,
        peak_bytes=peak,
        seconds=sum(own.values()),
    )
