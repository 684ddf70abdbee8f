"""One rule per head under bounds at several lengths: against every plan there is."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import numpy as np
import pytest

from reattend.passes.rewrite.sparse_solve import Problem

pytest.importorskip("scipy")


def problem(heads: int = 5, rules: int = 4, lengths: int = 2, **more: object) -> Problem:
    rng = np.random.default_rng(3)
    size = np.sort(rng.random((lengths, 1, rules)), -1).repeat(heads, 1)
    loss = -np.sort(-rng.random((lengths, heads, rules)), -1) * 1e-5
    loss[..., -1], size[..., -1] = 0.0, 1.0
    made = Problem(loss, size, np.arange(1.0, heads + 1), np.arange(heads) // 3, density=0.6)
    return replace(made, **more)  # type: ignore[arg-type]


def every(p: Problem) -> dict[tuple[int, ...], tuple[float, ...]]:
    """Losses of all plans within the bounds."""
    _, heads, rules = p.loss_LHC.shape
    found, at = {}, np.arange(heads)
    for rule in product(range(rules), repeat=heads):
        shares = (p.size_LHC[:, at, rule] * p.weight_H).sum(1) / p.weight_H.sum()
        few = [len({r for r, s in zip(rule, p.site_H, strict=True) if s == n}) for n in (0, 1)]
        if (shares <= p.density + 1e-9).all() and max(few) <= (p.max_rules or rules):
            found[rule] = tuple(p.loss_LHC[:, at, rule].sum(1))
    return found


@pytest.mark.parametrize("max_rules", [None, 1])
def test_the_plans_are_on_the_front_and_the_best_of_each_length_is_found(
    max_rules: int | None,
) -> None:
    p = problem(max_rules=max_rules)
    plans, all_plans = p.pareto(), every(p)
    assert len(all_plans) >= 10
    for plan in plans:
        assert plan.loss_L == pytest.approx(all_plans[plan.rule_H])
        assert plan.gap <= 0.01
        least = 0.99 * np.array(plan.loss_L)
        assert not any((np.array(other) < least).all() for other in all_plans.values())
    for n in range(2):
        least = min(loss[n] for loss in all_plans.values())
        assert min(plan.loss_L[n] for plan in plans) <= 1.01 * least
    assert max_rules or len(plans) > 1


def test_bounds_that_nothing_keeps_to_give_no_plan() -> None:
    assert problem(size_LHC=np.full((2, 5, 4), 0.7)).pareto() == []
