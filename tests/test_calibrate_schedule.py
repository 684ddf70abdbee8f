"""The learning rate: warm-up and cosine, and how it follows the distance to go."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from reattend import convert
from reattend.calibrate import calibrate
from reattend.calibrate.schedule import FRESH, WARMUP, factor, fresh_rate, pace
from reattend.data import Dataset
from reattend.plan_sections import Calibrate


def test_it_warms_up_and_ends_at_nothing() -> None:
    assert factor(0.0) == 0.0
    assert factor(WARMUP) == 1.0
    assert factor(1.0) == pytest.approx(0.0, abs=1e-12)
    rates = [factor(x / 100) for x in range(int(100 * WARMUP), 101)]
    assert rates == sorted(rates, reverse=True)


def test_the_pace_is_the_root_of_the_loss_and_at_most_one() -> None:
    assert pace(0.1, far=0.1) == pace(7.0, far=0.1) == 1.0
    assert pace(0.001, far=0.1) == pytest.approx(0.1)
    assert pace(0.0, far=0.1) == 0.0


def test_new_weights_walk_as_far_in_fewer_steps() -> None:
    assert fresh_rate(1e-3, 400) == pytest.approx(2 * fresh_rate(1e-3, 800)) == 0.02
    assert fresh_rate(1e-3, 5) == FRESH
    assert fresh_rate(1e-3, 1e6) == 1e-3


@pytest.fixture(scope="module")
def teacher() -> LlamaForCausalLM:
    torch.manual_seed(5)
    config = LlamaConfig(
        vocab_size=61, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=8, initializer_range=0.25,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


@pytest.mark.parametrize("stage", ["layerwise", "end-to-end"])
def test_a_start_close_by_is_not_carried_away(teacher: LlamaForCausalLM, stage: str) -> None:
    """A twentieth of the stage's own rate at this start; the full rate makes it worse first."""
    student = convert(teacher, plan="identity").model
    with torch.no_grad():
        for name, weight in student.named_parameters():
            if "self_attn" in name:
                weight.add_(0.002 * torch.randn_like(weight))
    ids = torch.randint(1, 61, (120, 24), generator=torch.Generator().manual_seed(1))
    data = Dataset([{"input_ids": ids, "attention_mask": torch.ones_like(ids)}], description="x")
    settings = Calibrate(tokens=2500, batch_size=4, seq_len=24, stages=[stage])

    def worst(settings: Calibrate) -> float:
        (result,) = calibrate(teacher, copy.deepcopy(student), data, settings, seed=0)
        losses = [loss for _, loss in result.loss]
        return max(losses) / losses[0]

    lr = {"layerwise": 2e-3, "end-to-end": 1e-3}[stage]
    assert worst(settings.model_copy(update={"lr": lr})) > 2.0
    assert worst(settings) < 1.5


def test_feature_maps_walk_and_the_blocks_own_weights_stay_close(teacher: LlamaForCausalLM) -> None:
    rule = {"sites": "*", "to": "linear", "window": 4, "feature_dim": 8, "feature_init": "uniform"}
    student = convert(teacher, plan={"rules": [rule]}).model
    start = {n: p.detach().clone() for n, p in student.named_parameters() if "mixer" in n}
    ids = torch.randint(1, 61, (16, 24), generator=torch.Generator().manual_seed(1))
    data = Dataset([{"input_ids": ids, "attention_mask": torch.ones_like(ids)}], description="x")
    told = Calibrate(tokens=1000, batch_size=4, seq_len=24, stages=["layerwise"])

    def moved(settings: Calibrate, name: str) -> float:
        made = copy.deepcopy(student)
        calibrate(teacher, made, data, settings, seed=0)
        gaps = [
            (p.detach() - start[n]).abs().max() for n, p in made.named_parameters() if name in n
        ]
        return float(torch.stack(gaps).max())

    assert moved(told, "features_q") > 10 * moved(told, "q_proj") > 0
    one = told.model_copy(update={"lr": 2e-3})  # what is asked for is one rate for all
    assert moved(one, "features_q") < 2 * moved(one, "q_proj")
