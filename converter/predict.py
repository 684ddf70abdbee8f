"""What a conversion will cost, before any statistics: cache, parameters, memory, time.

Memory is the growth of the process over its size before the model is opened, as the highest
point up to the end of each stage, so that it can be laid beside `run.json`. The byte counts
follow from shapes; the constants were measured (torch.export and the libraries it loads).
Time is rough: floating-point operations over the speed of one measured product.
"""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from reattend.inputs import is_hf
from reattend.materials import HELD_ROWS, HELD_SHARE
from reattend.plan import Plan
from reattend.preflight import Choice

MIB = 1 << 20
#: Measured on Linux with torch 2.13, transformers 5.23: loading; capture; first products; the
#: report's page with its plots.
OPENING, CAPTURING, RUNNING, PLOTTING = 12 * MIB, 65 * MIB, 18 * MIB, 45 * MIB
#: A tokenizer's memory per byte of the text it is given; measured. Half of it stays fragmented.
TOKENISING = 165
#: Rows and tokens of what the model samples for itself when no data is given.
OWN_ROWS, OWN_LENGTH, OWN_BATCH = 64, 256, 16
#: Passes over the held-out rows: loss, six recall sets, for two models; agreement; one spare.
MEASURING_PASSES = 16


@dataclass(frozen=True)
class SitePrediction:
    """One site before and after; bytes per token in the cache dtype."""

    path: str
    action: str
    conversion: str
    options: dict[str, Any]
    reason: str
    cache_bytes_before: int
    cache_bytes_after: int
    parameters_before: int
    parameters_after: int


@dataclass(frozen=True)
class StagePrediction:
    """Highest growth of memory up to the end of a stage, bytes, and its time, seconds."""

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


@dataclass(frozen=True)
class _Sizes:
    """Numbers of one model and plan. Bytes unless they say otherwise."""

    weights: int
    largest: int  # numbers in the largest tensor
    element: int
    parameters: int
    vocabulary: int
    widest: int  # output features of the widest layer below the head
    layers: int
    heads: int

    def logits(self, tokens: int) -> int:
        return tokens * self.vocabulary * self.element

    def activations(self, tokens: int) -> int:
        return 3 * tokens * self.widest * self.element


def predict(
    model: nn.Module, choices: list[Choice], plan: Plan, *, rows: int | None, text: int = 0
) -> Prediction:
    """Predict a run.

    Args:
        model: the original, opened.
        choices: from `preflight.choose`.
        plan: its `calibrate` section bounds the data.
        rows: rows of `seq_len` tokens that the data gives; None: sampled from the model.
        text: bytes of text that are tokenised at a time; 0 for tensors.
    """
    sizes = _sizes(model, choices)
    converted = [c for c in choices if c.action == "converted"]
    peaks = _memory(sizes, converted, plan, rows, text, is_hf(model))
    seconds = _time(sizes, converted, plan, rows)
    grown = sum(c.after.parameters - c.before.parameters for c in converted)
    return Prediction(
        sites=tuple(_site(c, sizes.element) for c in choices),
        stages=tuple(StagePrediction(n, p, round(seconds[n], 2)) for n, p in peaks.items()),
        parameters_before=sizes.parameters,
        parameters_after=sizes.parameters + grown,
    )


def _site(choice: Choice, element: int) -> SitePrediction:
    before = choice.before
    after = choice.after if choice.action == "converted" else before
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
    )


def _sizes(model: nn.Module, choices: list[Choice]) -> _Sizes:
    parameters = list(model.parameters())
    config: Any = getattr(model, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else None
    vocabulary = int(getattr(text, "vocab_size", 0) or 0)
    outputs = [m.weight.shape[0] for m in model.modules() if isinstance(m, nn.Linear)]
    return _Sizes(
        weights=sum(p.numel() * p.element_size() for p in parameters),
        largest=max(p.numel() for p in parameters),
        element=parameters[0].element_size(),
        parameters=sum(p.numel() for p in parameters),
        vocabulary=vocabulary,
        widest=max((n for n in outputs if n != vocabulary), default=0),
        layers=len(choices),
        heads=max((c.config.core.heads for c in choices), default=0),
    )


def _gram_width(choice: Choice) -> int:
    """Y = G (d + e) where the conversion asks for second moments."""
    if "gram" not in choice.needs:
        return 0
    core = choice.config.core
    return core.kv_heads * (core.qk_head_dim + core.v_head_dim)


def _grams(choice: Choice) -> int:
    """Bytes of one site's moments: float64, and the queries' where their rank is cut."""
    core = choice.config.core
    queries = core.heads * core.qk_head_dim
    return 8 * (_gram_width(choice) ** 2 + (queries**2 if "queries" in choice.needs else 0))


def _held(rows: int | None) -> int:
    return 0 if rows is None else min(HELD_ROWS, rows // HELD_SHARE)


def _memory(
    sizes: _Sizes,
    converted: list[Choice],
    plan: Plan,
    rows: int | None,
    text: int,
    generates: bool,
) -> dict[str, int]:
    """Highest growth at the end of every stage; a stage never ends below the one before."""
    calibrate, element = plan.calibrate, sizes.element
    width = max((_gram_width(c) for c in converted), default=0)
    new = sum(c.after.parameters for c in converted) * element
    block = max((c.before.parameters for c in converted), default=0)
    batch = calibrate.batch_size * (OWN_LENGTH if rows is None else calibrate.seq_len)
    base = sizes.weights + OPENING
    moments = sum(_grams(c) for c in converted)
    found: dict[str, int] = {}
    # isfinite holds |x|, two comparisons and their product beside x.
    found["open"] = base + sizes.largest * (element + 3)
    base += CAPTURING
    found["find"] = base + 2 * 8 * block
    cache = sum(c.before.cache for c in converted) * element
    own = OWN_BATCH * (OWN_LENGTH * cache + sizes.vocabulary * element)
    found["data"] = base + TOKENISING * text + (2 * own if rows is None and width else 0)
    base += RUNNING + TOKENISING * text // 2
    running = sizes.logits(batch) + sizes.activations(batch)
    tokens = 2 * 8 * batch * width + 8 * width**2
    found["statistics"] = base + (running + moments + tokens if width else 0)
    found["rewrite"] = base + moments + new + 12 * 8 * width**2
    base += new
    found["calibrate"] = base + (_training(sizes, new, batch) if calibrate.trains else 0)
    found["verify"] = base + _verifying(sizes, _held(rows), calibrate.seq_len, generates)
    found["publish"] = base + sizes.weights + PLOTTING
    highest = 0
    for name, value in found.items():
        highest = found[name] = max(highest, int(value))
    return found


def _training(sizes: _Sizes, new: int, batch: int) -> int:
    """Both models in float32, gradients and two moments of what is trained, one backward pass."""
    trained = 4 * new // sizes.element
    models = 2 * 4 * sizes.parameters
    kept = sizes.layers * sizes.activations(batch) * 4 // sizes.element
    logits = 4 * sizes.logits(batch) * 4 // sizes.element
    return models + 3 * trained + 2 * kept + logits


def _verifying(sizes: _Sizes, held: int, seq_len: int, generates: bool) -> int:
    """Logits of both models for a batch, and one row of them five times in float32.

    And the scores of the converted model's prefill: as they are, masked, their softmax, a product.
    """
    rows = min(8, held) if held else 4
    both = 2 if held else 1
    logits = both * sizes.logits(rows * seq_len)
    row = 4 * seq_len * sizes.vocabulary * (5 if held else 1)
    decode = 6 * sizes.logits(3 * 53) if generates else 0
    scores = 4 * 4 * rows * sizes.heads * seq_len**2
    return max(logits + row, decode) + scores + sizes.activations(rows * seq_len)


def _time(sizes: _Sizes, converted: list[Choice], plan: Plan, rows: int | None) -> dict[str, float]:
    speed, wide = _speed(sizes.element), _speed(8)
    calibrate = plan.calibrate
    seq_len = OWN_LENGTH if rows is None else calibrate.seq_len
    given = OWN_ROWS if rows is None else rows - _held(rows)
    tokens = min(given * seq_len, max(calibrate.statistics_tokens, seq_len))
    forward = 2.0 * sizes.parameters / speed
    step = max(0.0012 * sizes.layers, OWN_BATCH * forward)
    needs = any(_gram_width(c) for c in converted)
    moments = sum(_gram_width(c) ** 2 for c in converted)
    solve = sum(40.0 * _gram_width(c) ** 3 for c in converted) / wide
    own = OWN_ROWS // OWN_BATCH * OWN_LENGTH * step if rows is None and needs else 0.0
    decode = 4 * 8 * max(0.0012 * sizes.layers, 3 * forward)
    return {
        "open": sizes.weights / 1e9,
        "find": 2.0 + 0.35 * sizes.layers,
        "data": own,
        "statistics": tokens * (forward + 2.0 * moments / wide) if needs else 0.0,
        "rewrite": solve + sizes.weights / 4e9,
        "calibrate": 8.0 * forward * calibrate.tokens if calibrate.trains else 0.0,
        "verify": MEASURING_PASSES * _held(rows) * seq_len * forward + decode,
        "publish": 1.0 + sizes.weights / 2e8,
    }


def _speed(element: int) -> float:
    """Floating-point operations per second of one product on this machine, best of three."""
    dtype = {2: torch.bfloat16, 4: torch.float32, 8: torch.float64}.get(element, torch.float32)
    a = torch.ones(256, 512, dtype=dtype)
    b = torch.ones(512, 512, dtype=dtype)
    best = float("inf")
    for _ in range(3):
        begin = time.perf_counter()
        a @ b
        best = min(best, time.perf_counter() - begin)
    return 2.0 * 256 * 512 * 512 / max(best, 1e-6)
