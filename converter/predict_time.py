"""Time of every stage: what a probe of the model took, scaled by what each stage does.

Rough, and said to be: on a machine that does nothing else the whole run takes between a third of
the prediction and three times as long. The rates are measured on this machine, at this moment.
"""

from __future__ import annotations

import torch

from reattend.allocation import trials, waiting
from reattend.divergence import ROWS
from reattend.plan import Plan
from reattend.predict_memory import OWN_BATCH, OWN_LENGTH, OWN_ROWS, Sizes, held_rows, row_length
from reattend.predict_site import Rates, own_seconds
from reattend.predict_statistics import gram_width
from reattend.preflight import Choice
from reattend.probe import Probe
from reattend.rates import speed

#: Passes over the held-out rows: loss, six recall sets, for two models; agreement; one spare.
MEASURING_PASSES = 16
#: The same token by token: loss, agreement, six recall sets; so many rows at once.
STEPPED_PASSES, STEPPED_ROWS = 8, 8
#: Forward passes that training on a token costs: layerwise the teacher's and the blocks' three;
#: end to end both models' and a backward pass, which forms few weight gradients.
TRAINING_PASSES = {"layerwise": 2.0, "end-to-end": 4.5}


def statistics_tokens(plan: Plan, rows: int | None) -> int:
    """How many are read for statistics; `rows` of data, None where the model samples its own."""
    seq_len = row_length(plan, rows)
    back = 0 if plan.verify.data is not None else held_rows(plan, rows)
    given = OWN_ROWS if rows is None else rows - back
    return min(given * seq_len, max(plan.calibrate.statistics_tokens, seq_len))


def seconds(
    sizes: Sizes,
    converted: list[Choice],
    plan: Plan,
    rows: int | None,
    measured: Probe,
    rates: Rates,
) -> dict[str, float]:
    """Seconds of every stage.

    Args:
        sizes: of the original.
        converted: the sites that change.
        plan: decides data and stages.
        rows: rows of data; None: sampled from the model.
        measured: of the original in the dtype it is stored in.
        rates: of the machine.
    """
    from reattend.calibrate.run import budgets

    calibrate = plan.calibrate
    seq_len = row_length(plan, rows)
    tokens = statistics_tokens(plan, rows)
    forward = measured.seconds
    step = measured.seconds * measured.tokens
    needs = any(gram_width(c) for c in converted)
    own = {c.site.path: own_seconds(c, tokens, seq_len, rates) for c in converted}
    added = {name: sum(o[name] for o in own.values()) for name in ("statistics", "rewrite")}
    groups = waiting(converted)
    single = max(0.0012 * sizes.layers, 2.0 * sizes.weights / 1e10)
    sampled = OWN_ROWS // OWN_BATCH * OWN_LENGTH * max(single, OWN_BATCH * forward)
    found = {
        "open": sizes.weights / 5e8,
        "find": 2.0 + 0.7 * sizes.layers + 8 * step,
        "data": sampled if rows is None and needs else 0.0,
        "statistics": tokens * forward + added["statistics"] if needs else 0.0,
    }
    if groups:
        tried = sum(own[c.site.path]["choose"] for group in groups for c in group)
        found["choose"] = tried + forward * ROWS * seq_len * trials(groups)
    found["rewrite"] = sizes.weights / 4e9 + added["rewrite"]
    if calibrate.trains:
        dtype = {2: torch.bfloat16, 8: torch.float64}.get(sizes.element, torch.float32)
        # products are only part of a pass, so a model in half precision gains less than they do
        slower = min(2.0, max(1.0, speed(dtype) / rates.float32))
        for name, budget in budgets(calibrate).items():
            found[name] = TRAINING_PASSES[name] * forward * slower * budget
    passes = MEASURING_PASSES * held_rows(plan, rows) * seq_len * forward
    found["verify"] = passes + 4 * 8 * max(single, 3 * forward) + 6 * step
    if plan.verify.peers and rows is not None:
        found["verify"] += found["statistics"] + plan.verify.peer_rows * (
            MEASURING_PASSES * held_rows(plan, rows) * seq_len * forward / 2 + added["rewrite"]
        )
    if any(c.conversion and c.conversion.decodes_apart(c.options) for c in converted):
        step = 2 * max(single, STEPPED_ROWS * forward)
        batches = -(-held_rows(plan, rows) // STEPPED_ROWS)
        found["verify"] += STEPPED_PASSES * batches * seq_len * step
    found["publish"] = 1.0 + sizes.weights / 2e8
    return found
