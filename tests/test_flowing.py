"""Causal flow attention: the released recipe by loops, and a model that decodes with it."""

from __future__ import annotations

from math import exp
from pathlib import Path
from typing import Any

import pytest
import torch
from decoder_models import decoder
from mla_blocks import config, dense
from pydantic import ValidationError
from test_linear import inputs, linear
from torch import Tensor

from reattend import convert, load
from reattend.mixers.base import Context
from reattend.mixers.linear import LinearAttention
from reattend.passes.rewrite.linear import LinearOptions, ToLinear

OPTIONS: dict[str, Any] = {"flow": True, "feature_map": "sigmoid", "window": 0}


def by_loops(mixer: Any, x_ND: Tensor) -> Tensor:
    """Token by token: sums end with the token, and their means stand for sums over all."""
    (q, _), new = LinearAttention.project(mixer, x_ND[None], x_ND[None], Context(), None)
    k, v = (x[0].repeat_interleave(q.shape[1] // x.shape[1], 0) for x in new.rows)
    out = torch.zeros_like(v)
    for h in range(len(v)):
        a, b = (1 / (1 + (-x).exp()) for x in (q[0, h], k[h]))
        into, away, race = [], [], []
        for n in range(len(x_ND)):
            into.append(sum(float(a[n] @ b[j]) for j in range(n + 1)) / (n + 1))
            away.append(sum(float(b[n] @ a[j]) for j in range(n + 1)) / (n + 1))
            taken = sum(float(a[n] @ b[j]) / away[j] for j in range(n + 1)) / (n + 1)
            given = sum(float(b[n] @ a[j]) / into[j] for j in range(n + 1)) / (n + 1)
            race.append(exp(min(max(given, -1.0), 1.0)))
            share = [race[j] / sum(race[: j + 1]) * (j + 1) for j in range(n + 1)]
            mixed = sum((a[n] @ b[j]) * share[j] * v[h, j] for j in range(n + 1))
            out[h, n] = mixed / (into[n] * (n + 1)) / (1 + exp(-taken))
    return mixer.o_proj(out.transpose(0, 1).flatten(1))


def test_outputs_are_those_of_the_released_recipe_wherever_padding_stands() -> None:
    mixer = linear(dense(config()), **OPTIONS)
    x, _ = inputs(17, (0,))
    with torch.no_grad():
        want = by_loops(mixer, x[0])
        assert (mixer(x, Context())[0] - want).abs().max() <= 1e-12 * want.abs().max()
        padded = torch.cat([inputs(4, (0,))[0], x[:, :9], inputs(2, (0,))[0], x[:, 9:]], 1)
        real = torch.ones(1, 23, dtype=torch.bool)
        real[0, :4] = real[0, 13:15] = False
        place = (real.long().cumsum(-1) - 1).clamp_min(0)
        got = mixer(padded, Context(mask=real, position_BN=place))[real]
        assert (got - want).abs().max() <= 1e-12 * want.abs().max()


def test_it_costs_what_it_says_and_what_contradicts_it_is_named() -> None:
    mixer, options = linear(dense(config()), **OPTIONS), LinearOptions(**OPTIONS)
    cost = ToLinear().cost(config(), options)
    assert cost.parameters == sum(p.numel() for p in mixer.parameters())
    for wrong, words in (
        ({"window": 8}, "set window: 0"),
        ({"decay": "fixed"}, "no decay"),
        ({"feature_map": "silu", "normalize": "none"}, "not negative"),
    ):
        with pytest.raises(ValidationError, match=words):
            LinearOptions(**{**OPTIONS, **wrong})


def test_a_language_model_learns_and_generates(tmp_path: Path) -> None:
    calibrate = {
        "tokens": 2000, "stages": ["layerwise"], "seq_len": 40, "batch_size": 4, "lr": 1e-2,
    }  # fmt: skip
    result = convert(
        decoder("llama", layers=2, groups=2),
        plan={"rules": [{"sites": "*", "to": "linear", **OPTIONS}], "calibrate": calibrate},
        data=torch.randint(3, 97, (12, 40)),
        out=tmp_path / "m",
    )
    loss = result.report.calibration.stages[-1].loss
    assert loss[-1][1] < 0.9 * loss[0][1]
    model = load(tmp_path / "m")
    ids = torch.randint(3, 97, (3, 9))
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    run = {"attention_mask": mask, "max_new_tokens": 6, "do_sample": False}
    assert torch.equal(model.generate(ids, **run), model.generate(ids, use_cache=False, **run))
