"""Time of every stage: what a probe of the model took, scaled by what each stage does.

Rough, and said to be: on a machine that does nothing else the whole run takes between a third of
the prediction and three times as long. The rates are measured on this machine, at this moment.
"""

from __future__ import annotations

import time

import torch

from reattend.allocation import trials, waiting
from reattend.divergence import ROWS
from reattend.plan import Plan
from reattend.predict_memory import OWN_BATCH, OWN_LENGTH, OWN_ROWS, Sizes, held_rows
from reattend.predict_statistics import gram_width, solves, training
from reattend.preflight import Choice
from reattend.probe import Probe

#: Passes over the held-out rows: loss, six recall sets, for two models; agreement; one spare.
MEASURING_PASSES = 16
#: The same token by token: loss, agreement, six recall sets; so many rows at once.
STEPPED_PASSES, STEPPED_ROWS = 8, 8
#: Forward passes that training on a token costs: layerwise the teacher's and the blocks' three;
#: end to end both models' and a backward pass, which forms few weight gradients.
TRAINING_PASSES = {"layerwise": 2.0, "end-to-end": 4.5}


def seconds(
    sizes: Sizes, converted: list[Choice], plan: Plan, rows: int | None, measured: Probe
) -> dict[str, float]:
    """Seconds of every stage.

    Args:
        sizes: of the original.
        converted: the sites that change.
        plan: decides data and stages.
        rows: rows of data; None: sampled from the model.
        measured: of the original in the dtype it is stored in.
    """
    from reattend.calibrate.run import budgets

    wide, calibrate = speed(torch.float64), plan.calibrate
    seq_len = OWN_LENGTH if rows is None else calibrate.seq_len
    given = OWN_ROWS if rows is None else rows - held_rows(rows)
    tokens = min(given * seq_len, max(calibrate.statistics_tokens, seq_len))
    forward = measured.seconds
    step = measured.seconds * measured.tokens
    needs = any(gram_width(c) for c in converted)
    moments = sum(gram_width(c) ** 2 for c in converted)
    spread = sum(
        12.0 * seq_len * c.config.core.heads * c.config.core.qk_head_dim
        for c in converted
        if "attention" in c.needs
    )
    cubes = {c.site.path: 40.0 * gram_width(c) ** 3 / wide for c in converted}
    groups = waiting(converted)
    single = max(0.0012 * sizes.layers, 2.0 * sizes.weights / 1e10)
    own = OWN_ROWS // OWN_BATCH * OWN_LENGTH * max(single, OWN_BATCH * forward)
    found = {
        "open": sizes.weights / 5e8,
        "find": 2.0 + 0.7 * sizes.layers + 8 * step,
        "data": own if rows is None and needs else 0.0,
        "statistics": tokens * (forward + (2.0 * moments + spread) / wide) if needs else 0.0,
    }
    if groups:
        tried = sum(cubes[c.site.path] * max(0, solves(c) - 1) for group in groups for c in group)
        found["choose"] = tried + forward * ROWS * seq_len * trials(groups)
    trained = sum(training(c, seq_len)[0] for c in converted)
    found["rewrite"] = sum(cubes[c.site.path] * min(1, solves(c)) for c in converted)
    found["rewrite"] += sizes.weights / 4e9
    found["rewrite"] += trained / speed(torch.float32) if trained else 0.0
    if calibrate.trains:
        dtype = {2: torch.bfloat16, 8: torch.float64}.get(sizes.element, torch.float32)
        # products are only part of a pass, so a model in half precision gains less than they do
        slower = min(2.0, max(1.0, speed(dtype) / speed(torch.float32)))
        for name, budget in budgets(calibrate).items():
            found[name] = TRAINING_PASSES[name] * forward * slower * budget
    passes = MEASURING_PASSES * held_rows(rows) * seq_len * forward
    found["verify"] = passes + 4 * 8 * max(single, 3 * forward) + 6 * step
    if plan.verify.peers and rows is not None:
        found["verify"] += found["statistics"] + len(plan.verify.peers) * (
            MEASURING_PASSES * held_rows(rows) * seq_len * forward / 2 + sum(cubes.values())
        )
    if any(c.conversion and c.conversion.decodes_apart(c.options) for c in converted):
        step = 2 * max(single, STEPPED_ROWS * forward)
        batches = -(-held_rows(rows) // STEPPED_ROWS)
        found["verify"] += STEPPED_PASSES * batches * seq_len * step
    found["publish"] = 1.0 + sizes.weights / 2e8
    return found


def speed(dtype: torch.dtype) -> float:
    """Floating-point operations per second of one product on this machine, best of three."""
    a = torch.ones(256, 512, dtype=dtype)
    b = torch.ones(512, 512, dtype=dtype)
    best = float("inf")
    for _ in range(3):
        begin = time.perf_counter()
        a @ b
        best = min(best, time.perf_counter() - begin)
    return 2.0 * 256 * 512 * 512 / max(best, 1e-6)
