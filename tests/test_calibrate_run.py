"""Calibration of a tiny model: it learns, touches nothing else, and names what goes wrong."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from calibrated_pair import (
    SETTINGS,
    SHORT,
    VOCABULARY,
    convert,
    data,
    fresh,
    same,
    state,
    teacher_and_students,
)
from torch import nn

from reattend.calibrate import StageResult, calibrate
from reattend.calibrate.run import budgets
from reattend.data import Dataset
from reattend.errors import ArgumentError, DataError, MissingExtraError, ModelError, TrainingError
from reattend.events import Event
from reattend.plan_sections import Calibrate
from reattend.verify.quality import agreement


@pytest.fixture(scope="module")
def pair() -> tuple[nn.Module, nn.Module, nn.Module]:
    return teacher_and_students()


@pytest.mark.parametrize("stages", [("layerwise",), ("end-to-end",), ("layerwise", "end-to-end")])
def test_loss_and_held_out_divergence_fall(pair: Any, stages: Any) -> None:
    teacher, student = pair[0], fresh(pair[1])
    held = data(16, 99)
    before, original = agreement(teacher, student, held)["kl"], state(teacher)
    start = state(student)
    events: list[Event] = []
    settings = SETTINGS.model_copy(update={"stages": stages})
    results = calibrate(teacher, student, data(200, 3), settings, seed=0, on_event=events.append)
    assert [r.name for r in results] == list(stages)
    assert sum(r.tokens for r in results) >= settings.tokens
    for result in results:
        assert result.loss[-1][0] == result.tokens
        assert sum(v for _, v in result.loss[-5:]) < sum(v for _, v in result.loss[:5])
    assert agreement(teacher, student, held)["kl"] < 0.8 * before
    assert same(state(teacher), original)
    now = state(student)
    frozen = [n for n in now if ".mixer." not in n]
    assert frozen
    assert all(torch.equal(now[n], start[n]) for n in frozen)
    assert any(not torch.equal(now[n], start[n]) for n in now if ".mixer." in n)
    for name in stages:
        done = [e.done for e in events if e.stage == name]
        assert done == sorted(done)
        assert done[-1] == next(e.total for e in events if e.stage == name)


def test_layerwise_improves_every_site(pair: Any) -> None:
    teacher, student = pair[0], fresh(pair[1])
    settings = SETTINGS.model_copy(update={"stages": ("layerwise",)})
    (result,) = calibrate(teacher, student, data(200, 3), settings, seed=0)
    assert sorted(result.sites) == ["model.layers.0.self_attn", "model.layers.1.self_attn"]
    assert all(after < 0.9 * before for before, after in result.sites.values())


def test_the_dense_model_stays_where_it_is(pair: Any) -> None:
    teacher, student = pair[0], fresh(pair[2])
    before = state(student)
    results = calibrate(teacher, student, data(40, 3), SHORT, seed=0)
    assert all(abs(v) < 1e-6 for r in results for _, v in r.loss)
    assert same(state(student), before)


def test_an_exact_start_stays_exact(pair: Any) -> None:
    """Exact up to rounding: AdamW would walk off at full speed on rounding noise alone."""
    teacher, student = pair[0], convert(pair[0], 0)
    before = state(student)
    results = calibrate(teacher, student, data(40, 3), SHORT, seed=0)
    assert any(v != 0 for r in results for _, v in r.loss), "not a rounding-only start"
    assert all(abs(v) < 1e-6 for r in results for _, v in r.loss)
    assert same(state(student), before)


def test_a_shared_teacher_weight_is_not_written(pair: Any) -> None:
    """An identity student shares storage with the teacher; here it starts off the teacher."""
    teacher = copy.deepcopy(pair[0])
    student = convert(teacher, None)
    attention: Any = student.get_submodule("model.layers.0.self_attn")
    shared = attention.mixer.v_proj.weight
    source = teacher.get_parameter("model.layers.0.self_attn.v_proj.weight")
    assert shared.data_ptr() == source.data_ptr()
    with torch.no_grad():
        attention.mixer.o_proj.weight = nn.Parameter(attention.mixer.o_proj.weight * 0.5)
    original = state(teacher)
    calibrate(teacher, student, data(40, 3), SHORT, seed=0)
    assert same(state(teacher), original)
    assert not torch.equal(attention.mixer.v_proj.weight, shared)


def test_same_seed_same_bytes_other_seed_other_bytes(pair: Any) -> None:
    runs = []
    for seed in (0, 0, 1):
        student = fresh(pair[1])
        torch.rand(seed + 1)  # the caller's random state must not matter
        runs.append((calibrate(pair[0], student, data(40, 3), SHORT, seed=seed), state(student)))
    assert runs[0][0] == runs[1][0]
    assert same(runs[0][1], runs[1][1])
    assert not same(runs[0][1], runs[2][1])


def test_the_callers_random_state_is_kept(pair: Any) -> None:
    torch.manual_seed(11)
    expected = torch.rand(3)
    torch.manual_seed(11)
    calibrate(pair[0], fresh(pair[1]), data(40, 3), SHORT, seed=0)
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize("stage", ["layerwise", "end-to-end"])
def test_nan_in_the_student_names_stage_step_and_site(pair: Any, stage: Any) -> None:
    student = fresh(pair[1])
    block: Any = student.get_submodule("model.layers.1.self_attn")
    with torch.no_grad():
        block.mixer.kv_b_proj.weight[0, 0] = float("nan")
    before = state(student)
    settings = SHORT.model_copy(update={"stages": (stage,)})
    with pytest.raises(TrainingError) as caught:
        calibrate(pair[0], student, data(40, 3), settings, seed=0)
    assert caught.value.exit_code == 4
    assert f"stage {stage}, step 1, site model.layers.1" in str(caught.value)
    assert torch.equal(before["lm_head.weight"], student.get_parameter("lm_head.weight"))


def test_divergence_of_training_is_an_error_and_changes_nothing(pair: Any) -> None:
    student = fresh(pair[1])
    before = state(student)
    with pytest.raises(TrainingError, match="nothing was changed"):
        calibrate(pair[0], student, data(40, 3), SHORT.model_copy(update={"lr": 1e30}), seed=0)
    assert same(state(student), before)


def test_nan_in_the_teacher_is_its_own_error(pair: Any) -> None:
    teacher = copy.deepcopy(pair[0])
    with torch.no_grad():
        teacher.get_parameter("model.layers.0.self_attn.o_proj.weight")[0, 0] = float("nan")
    with pytest.raises(ModelError, match=r"the original model produces NaN"):
        calibrate(teacher, fresh(pair[1]), data(40, 3), SHORT, seed=0)


def test_padding_tokens_do_not_matter(pair: Any) -> None:
    rows = data(40, 3, padded=True)
    ids, mask = rows.packed
    other = torch.where(mask.bool(), ids, (ids * 7 + 5) % VOCABULARY)
    changed = Dataset([{"input_ids": other, "attention_mask": mask}], description="other padding")
    assert not torch.equal(ids, other)
    runs = []
    for rows_used in (rows, changed):
        student = fresh(pair[1])
        runs.append((calibrate(pair[0], student, rows_used, SHORT, seed=0), state(student)))
    assert runs[0][0] == runs[1][0]
    assert same(runs[0][1], runs[1][1])
    assert runs[0][0][0].tokens < 3 * SHORT.tokens


def test_bfloat16_trains_in_float32_and_is_rounded_once(pair: Any) -> None:
    teacher, student = copy.deepcopy(pair[0]).bfloat16(), fresh(pair[1]).bfloat16()
    wide = copy.deepcopy(student).float()
    calibrate(copy.deepcopy(teacher).float(), wide, data(40, 3), SHORT, seed=0)
    before = state(student)
    calibrate(teacher, student, data(40, 3), SHORT, seed=0)
    assert {p.dtype for p in student.parameters()} == {torch.bfloat16}
    assert same(state(student), state(wide.bfloat16()))
    assert not same(state(student), before)


def test_training_flags_are_left_alone(pair: Any) -> None:
    student = fresh(pair[1]).train()
    flags = {n: p.requires_grad for n, p in student.named_parameters()}
    calibrate(pair[0], student, data(40, 3), SHORT, seed=0)
    assert student.training
    assert {n: p.requires_grad for n, p in student.named_parameters()} == flags
    assert all(p.grad is None for p in student.parameters())
    assert not pair[0].get_submodule("model.layers.0.self_attn")._forward_hooks


def test_budgets_add_up() -> None:
    assert sum(budgets(SETTINGS).values()) == SETTINGS.tokens
    only = SETTINGS.model_copy(update={"stages": ("end-to-end",)})
    assert budgets(only) == {"end-to-end": SETTINGS.tokens}


def test_no_tokens_means_no_training(pair: Any) -> None:
    assert calibrate(pair[0], fresh(pair[1]), data(4, 3), Calibrate(tokens=0), seed=0) == []


def test_errors_name_what_is_missing(pair: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ArgumentError, match="nothing to calibrate"):
        calibrate(pair[0], copy.deepcopy(pair[0]), data(4, 3), SHORT, seed=0)
    empty = Dataset(
        [{"input_ids": torch.zeros(2, 4).long(), "attention_mask": torch.zeros(2, 4).long()}],
        description="blank",
    )
    with pytest.raises(DataError, match="no token"):
        calibrate(pair[0], fresh(pair[1]), empty, SHORT, seed=0)
    monkeypatch.setitem(__import__("sys").modules, "peft", None)
    lora = SHORT.model_copy(update={"lora_rank": 2})
    with pytest.raises(MissingExtraError, match="peft"):
        calibrate(pair[0], fresh(pair[1]), data(4, 3), lora, seed=0)


def test_lora_changes_weights_by_low_rank_only(pair: Any) -> None:
    pytest.importorskip("peft")
    student = fresh(pair[1])
    before = state(student)
    lora = SETTINGS.model_copy(update={"lora_rank": 2, "lr": 1e-2})
    results = calibrate(pair[0], student, data(200, 3), lora, seed=0)
    now = state(student)
    assert now.keys() == before.keys()
    moved = [n for n in now if not torch.equal(now[n], before[n])]
    assert moved
    for name in moved:
        values = torch.linalg.svdvals((now[name] - before[name]).double())
        assert values[2:].sum() < 1e-4 * values.sum(), name
    assert isinstance(results[0], StageResult)
    assert results[-1].loss[-1][1] < results[-1].loss[0][1]
