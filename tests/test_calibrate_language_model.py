"""Calibration on the next-token loss: its value is transformers' own, and what cannot have one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from calibrated_pair import SHORT, data, fresh, teacher_and_students
from torch import nn
from transformers import BertConfig, BertLMHeadModel

from reattend import convert
from reattend.calibrate import calibrate
from reattend.calibrate.language_model import LanguageModel, next_tokens
from reattend.calibrate.ranks import Ranks
from reattend.calibrate.working import working_copies
from reattend.errors import ArgumentError, PlanError
from reattend.plan import Plan
from reattend.plan_sections import Calibrate


@pytest.fixture(scope="module")
def pair() -> tuple[nn.Module, nn.Module, nn.Module]:
    return teacher_and_students()


def settings(**more: Any) -> Calibrate:
    kept = SHORT.model_dump(exclude={"stages", "loss"})
    return Calibrate(**{**kept, "loss": "lm", **more})


def test_the_loss_is_that_of_transformers(pair: Any) -> None:
    stage = LanguageModel(working_copies(pair[0], fresh(pair[1])), Ranks(torch.device("cpu")))
    (batch,) = data(4, 5, padded=True).batches(4)
    found = stage.accumulate(batch, silent=False)[""]
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    wanted = stage.working.student(**batch, labels=labels, use_cache=False).loss
    assert (batch["attention_mask"] == 0).any()
    assert torch.allclose(found, wanted.to(found.dtype), rtol=1e-6, atol=0)
    gradients = [p.grad for p in stage.working.masters.values()]
    assert all(g is not None and bool(g.any()) for g in gradients)


def test_padding_on_the_left_predicts_nothing() -> None:
    ids = torch.tensor([[0, 0, 5, 6, 7]])
    assert next_tokens(ids, ids > 0).tolist() == [[-1, -1, 6, 7, -1]]
    assert next_tokens(ids, None).tolist() == [[0, 5, 6, 7, -1]]


def test_the_dense_model_learns_the_text(pair: Any) -> None:
    """Unlike under distillation, where it is at its goal from the start."""
    rows = data(4, 3)  # few rows, so that there is something to learn by heart
    (result,) = calibrate(pair[0], fresh(pair[2]), rows, settings(lr=1e-2), seed=0)
    assert result.name == "end-to-end"
    assert "next-token" in result.loss_name
    assert result.loss[-1][1] < 0.9 * result.loss[0][1]


def test_a_plan_says_so_and_has_no_layerwise_stage() -> None:
    assert settings().stages == ("end-to-end",)
    rules = [{"sites": "*", "to": "dense"}]
    plan = Plan.load({"rules": rules, "calibrate": {"loss": "lm", "tokens": 10}})
    assert Plan.load(plan.to_dict()).calibrate.stages == ("end-to-end",)
    with pytest.raises(PlanError, match=r"stages: \[end-to-end\]"):
        settings(stages=("layerwise", "end-to-end"))


def test_a_model_that_sees_later_tokens_is_refused() -> None:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 32}
    model = BertLMHeadModel(BertConfig(vocab_size=61, num_hidden_layers=1, **sizes)).eval()
    student = convert(model, plan="identity").model
    with pytest.raises(ArgumentError, match="sees later tokens"):
        calibrate(model, student, data(8, 3), settings(), seed=0)
