"""Relations of MiniLM: their divergence, what they need of a plan, and that training uses it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from calibrated_pair import data, tiny_teacher
from mla_blocks import config
from torch import Tensor

from reattend import convert
from reattend.calibrate import relations
from reattend.calibrate.relations import (
    relation_divergence,
    relation_heads,
    split,
    unrelated,
)
from reattend.errors import PlanError, RefusedError
from reattend.mixers.rotary import rotate
from reattend.plan import Plan
from reattend.plan_sections import Calibrate

ALL = Calibrate(tokens=1, relations=("q", "k", "v"))


def plain(student: Tensor, teacher: Tensor, real: Tensor) -> Tensor:
    """With hidden columns in place of tokens taken out."""

    def rows(x: Tensor) -> Tensor:
        scores = x @ x.mT / x.shape[-1] ** 0.5
        return scores.masked_fill(~real[:, None, None], -torch.inf).log_softmax(-1)

    target, guess = rows(teacher), rows(student)
    apart = torch.where(real[:, None, None], target.exp() * (target - guess), 0.0)
    return (apart.sum(-1) * real[:, None]).sum()


def test_the_divergence_and_its_gradient_equal_the_definition(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """In chunks that do not divide the rows, with padding that is not a number."""
    monkeypatch.setattr(relations, "CHUNK", 3)
    student = torch.randn(2, 2, 7, 4, dtype=torch.float64, requires_grad=True)
    teacher = torch.randn(2, 2, 7, 6, dtype=torch.float64)
    real = torch.tensor([[1] * 7, [0, 1, 1, 1, 1, 0, 0]]).bool()
    expected = plain(student, teacher, real)
    (wanted,) = torch.autograd.grad(2.5 * expected, student)
    with torch.no_grad():
        teacher[1, :, 0] = float("nan")
    total = relation_divergence(student, teacher, real)
    (got,) = torch.autograd.grad(2.5 * total, student)
    torch.testing.assert_close(total, expected)
    torch.testing.assert_close(got, wanted)
    assert float(relation_divergence(student.detach(), student, real)) == 0


def test_relation_heads_are_cut_from_all_heads_side_by_side() -> None:
    """And rotated pairs stay whole: the relations of each depend on distances alone."""
    x = torch.randn(1, 2, 5, 8, dtype=torch.float64)
    assert torch.equal(split(x, 2, 0), x)
    assert split(x, 1, 0).shape == (1, 1, 5, 16)
    angles = torch.arange(5).double()[:, None] * torch.tensor([1.0, 0.3, 0.1]).double()
    near, far = (
        rotate(x, ((angles + p).cos()[None], (angles + p).sin()[None]), 3) for p in (0.0, 0.7)
    )
    cut = [split(y, 8, 3) for y in (near, far)]
    torch.testing.assert_close(*(y @ y.mT for y in cut))


def test_heads_that_cannot_be_cut_are_refused() -> None:
    before = config(8, 4)
    core = before.core.model_copy(update={"heads": 6, "kv_heads": 3})
    after = before.model_copy(update={"core": core})
    assert unrelated(ALL, before, after) is None
    assert relation_heads(ALL, "q", before, after) == 2
    assert relation_heads(ALL, "v", before, after) == 1
    odd = ALL.model_copy(update={"relation_heads": 5, "relations": ("v",)})
    width = core.v_head_dim
    assert f"does not divide the {4 * width} and {3 * width}" in str(unrelated(odd, before, after))
    crossing = before.model_copy(update={"memory_size": 8})
    assert "come from another stream" in str(unrelated(ALL, crossing, crossing))


def test_a_plan_is_refused_where_there_is_nothing_to_compare() -> None:
    calibrate: dict[str, Any] = {"tokens": 100, "relations": ["v"]}
    rules = [{"sites": "*", "to": "mla", "kv_keep": 0.5}]
    plan, text = {"rules": rules, "calibrate": calibrate}, torch.ones(2, 9).long()
    with pytest.raises(RefusedError, match="has not its own heads"):
        convert(tiny_teacher(), plan=plan, data=text)
    with pytest.raises(PlanError, match="list layerwise"):
        Plan.load({"rules": rules, "calibrate": {**calibrate, "stages": ["end-to-end"]}})


def test_training_brings_relations_nearer() -> None:
    """Of merged heads: the plan reaches the stage, and gradients the weights."""
    teacher, text = tiny_teacher(), data(60, 3).blocks[0]["input_ids"]
    rule = {"sites": "*", "to": "gqa", "num_key_value_heads": 1}
    apart = {}
    for weight in (1e-6, 10.0):
        calibrate = {"tokens": 3000, "batch_size": 4, "seq_len": 24, "stages": ["layerwise"],
                     "relations": ["v"], "relation_weight": weight}  # fmt: skip
        made = convert(teacher, plan={"rules": [rule], "calibrate": calibrate}, data=text)
        apart[weight] = _apart(teacher, made.model, text[:8])
    assert apart[10.0] < 0.7 * apart[1e-6]


def _apart(teacher: Any, student: Any, ids: Tensor) -> float:
    """Of values, whose relations are read here from the models' own projections."""
    found: dict[str, Tensor] = {}
    path = "model.layers.0.self_attn"  # whose input is the same in both
    whole = (teacher.get_submodule(path).v_proj, student.get_submodule(path).mixer.v_proj)
    for name, module in zip("ts", whole, strict=True):
        module.register_forward_hook(lambda m, a, y, name=name: found.update({name: y}))
    with torch.no_grad():
        teacher(ids)
        student(ids)
    real = torch.ones_like(ids).bool()
    sides = (found[name][:, None].double() for name in "st")
    return float(plain(*sides, real))
