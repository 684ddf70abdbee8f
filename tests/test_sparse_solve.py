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


def large(heads: int = 64, rules: int = 24, lengths: int = 3) -> Problem:
    """A model's worth of heads: what each loses falls with its window, faster for some."""
    rng = np.random.default_rng(5)
    share = np.linspace(0.05, 1.0, rules)
    size = np.stack([share ** (1 + 0.2 * n) for n in range(lengths)])[:, None].repeat(heads, 1)
    worth, fall = rng.lognormal(0.0, 2.0, (2, 1, heads, 1))
    loss = worth * np.exp(-fall * size) * rng.uniform(0.8, 1.2, (lengths, heads, 1))
    loss[..., -1] = 0.0
    return Problem(loss, size, rng.integers(1, 4, heads) * 64.0, np.arange(heads) // 8, 0.5)


def bound(p: Problem, first: int, caps: dict[int, float]) -> float:
    """Below the least loss at one length: Lagrange's bound.

    Every head takes its best rule at prices for sizes and capped losses; that is a bound whatever
    the prices are. Good ones are those of the program of real numbers.
    """
    from scipy.optimize import linprog

    weight_H = (p.weight_H / p.weight_H.sum())[:, None]
    cost_KHC = np.stack([*(p.size_LHC * weight_H), *(p.loss_LHC[n] for n in caps)])
    limits, own_HC = np.array([*[p.density] * len(p.size_LHC), *caps.values()]), p.loss_LHC[first]
    one = np.kron(np.eye(len(own_HC)), np.ones(own_HC.shape[1]))
    size = (len(limits), -1)
    found = linprog(own_HC.ravel(), cost_KHC.reshape(size), limits, one, np.ones(len(one)))
    price_K = np.maximum(0.0, -found.ineqlin.marginals)
    total_HC = own_HC + np.tensordot(price_K, cost_KHC, 1)
    return float(total_HC.min(1).sum() - price_K @ limits)


def test_plans_of_many_heads_are_within_a_percent_of_a_bound_that_the_solver_did_not_make() -> None:
    p = large()
    last = len(p.loss_LHC) - 1
    alone = [p.best(n, {}) for n in range(last + 1)]
    worst = [max(plan.loss_L[n] for plan in alone if plan) for n in range(last)]
    least = [plan.loss_L[n] for n, plan in enumerate(alone) if plan]
    caps = {n: (worst[n] + 3 * least[n]) / 4 for n in range(last)}
    for plan, first, given in ((alone[last], last, {}), (p.best(last, caps), last, caps)):
        assert plan is not None and plan.gap <= 0.01
        low = bound(p, first, given)
        assert 0 < low <= plan.loss_L[first] * (1 + 1e-9)
        assert plan.loss_L[first] <= 1.01 * low
