"""One rule per head under bounds at several lengths: mixed-integer programs, solved by HiGHS.

MoA's problem (Fu et al., arXiv 2406.14909) without its commercial solver: binary x[h, c], one rule
c per head h, the mean density at every length at most the bound, the loss of one length minimised
while those of the others stay under caps. Layout letters: L lengths, H heads, C rules.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np

from reattend.errors import MissingExtraError

#: Stop at this relative gap between plan and bound, or after so many seconds.
GAP, SECONDS = 1e-3, 120.0
#: Whole numbers may miss a bound by this, in the bound's own unit.
SLACK = 1e-6
#: Caps tried on every other length's loss, between its best and its worst.
CAPS = 4
#: Losses are scaled to add up to this: HiGHS has absolute tolerances of about 1e-6.
SCALE = 1e3


@dataclass(frozen=True)
class Plan:
    """Rules by head, and what they cost.

    Attributes:
        rule_H: number of the rule of each head.
        loss_L: predicted loss at each length, in the unit given.
        gap: relative distance to the bound that was proven, of the program it comes from.
    """

    rule_H: tuple[int, ...]
    loss_L: tuple[float, ...]
    gap: float


@dataclass
class Problem:
    """What is to be shared out.

    Attributes:
        loss_LHC: of every head with every rule at every length.
        size_LHC: share of the keys that a head reads and keeps, at every length.
        weight_H: numbers cached per row of each head.
        site_H: the block each head belongs to.
        density: bound on the weighted mean of the shares.
        max_rules: different rules per block; None: any.
    """

    loss_LHC: np.ndarray
    size_LHC: np.ndarray
    weight_H: np.ndarray
    site_H: np.ndarray
    density: float
    max_rules: int | None = None

    def pareto(self) -> list[Plan]:
        """Plans that no other one beats at every length, best at the first length first.

        The last length is minimised under every combination of caps on the others (the epsilon
        constraint method), and each length alone. Empty where no plan keeps to the bounds.
        """
        found = {plan.rule_H: plan for plan in self._tried()}
        plans = sorted(found.values(), key=lambda plan: plan.loss_L)
        return [p for p in plans if not any(_beats(other, p) for other in plans)]

    def _tried(self) -> Iterator[Plan]:
        alone = [self.best(n, {}) for n in range(len(self.loss_LHC))]
        plans = [plan for plan in alone if plan is not None]
        if len(plans) < len(alone):
            return
        yield from plans
        table = np.array([plan.loss_L for plan in plans])
        steps = np.linspace(table.min(0), table.max(0), CAPS + 1)[1:]
        last = len(plans) - 1
        for pick in product(range(CAPS), repeat=last):
            caps = {n: float(steps[p, n]) for n, p in enumerate(pick)}
            if caps and (plan := self.best(last, caps)) is not None:
                yield plan

    def best(self, first: int, caps: dict[int, float]) -> Plan | None:
        """The least loss at one length with those at others at most their caps; None: nothing fits.

        Raises:
            MissingExtraError: SciPy is not installed.
        """
        optimize, sparse = _solver()
        _, heads, rules = self.loss_LHC.shape
        unit_L = SCALE / np.maximum(self.loss_LHC.max(2).sum(1), 1e-300)
        weight_H = self.weight_H / self.weight_H.sum()
        one = sparse.kron(sparse.eye_array(heads), np.ones((1, rules)))
        shares = (self.size_LHC * weight_H[:, None]).reshape(len(self.size_LHC), -1)
        bounds: list[tuple[Any, float, float]] = [
            (one, 1.0, 1.0),
            (sparse.csr_array(shares), -np.inf, self.density + 1e-9),
        ]
        for n, cap in caps.items():
            row = sparse.csr_array(self.loss_LHC[n].reshape(1, -1) * unit_L[n])
            bounds.append((row, -np.inf, cap * unit_L[n] * (1 + 1e-9)))
        objective = self.loss_LHC[first].reshape(-1) * unit_L[first]
        if self.max_rules is not None:
            bounds = self._few(bounds, sparse)
            objective = np.pad(objective, (0, bounds[0][0].shape[1] - len(objective)))
        with _stdout_kept():
            found = optimize.milp(
                objective,
                integrality=np.ones(len(objective)),
                bounds=optimize.Bounds(0, 1),
                constraints=[optimize.LinearConstraint(*bound) for bound in bounds],
                options={"mip_rel_gap": GAP, "time_limit": SECONDS},
            )
        if found.x is None or not _holds(found.x, bounds):
            return None
        rule_H = found.x[: heads * rules].reshape(heads, rules).argmax(1)
        loss_L = self.loss_LHC[:, np.arange(heads), rule_H].sum(1)
        gap = float(found.mip_gap) if found.fun > 1e-9 else 0.0
        return Plan(tuple(map(int, rule_H)), tuple(map(float, loss_L)), gap)

    def _few(self, bounds: list[tuple[Any, float, float]], sparse: Any) -> list[Any]:
        """With one number more per block and rule: whether the block uses the rule."""
        _, heads, rules = self.loss_LHC.shape
        sites = int(self.site_H.max()) + 1
        place = np.arange(heads * rules)
        column = self.site_H[place // rules] * rules + place % rules
        entries = (np.ones(len(place)), (place, column))
        used = sparse.csr_array(entries, shape=(len(place), sites * rules))
        wider = []
        for rows, low, high in bounds:
            none = sparse.csr_array((rows.shape[0], sites * rules))
            wider.append((sparse.hstack([rows, none]), low, high))
        wider.append((sparse.hstack([sparse.eye_array(len(place)), -used]), -np.inf, 0.0))
        counted = sparse.kron(sparse.eye_array(sites), np.ones((1, rules)))
        empty = sparse.csr_array((sites, len(place)))
        wider.append((sparse.hstack([empty, counted]), -np.inf, float(self.max_rules or rules)))
        return wider


def _holds(x: Any, bounds: list[tuple[Any, float, float]]) -> bool:
    """Whether the whole numbers nearest to a solution keep to the bounds; see scipy#24141."""
    return all(
        bool(((rows @ x.round() >= low - SLACK) & (rows @ x.round() <= high + SLACK)).all())
        for rows, low, high in bounds
    )


@contextmanager
def _stdout_kept() -> Iterator[None]:
    """HiGHS 1.12 prints a line however quiet it is told to be (HiGHS.jl#312): not to our output."""
    ours = os.dup(1)
    os.dup2(2, 1)
    try:
        yield
    finally:
        os.dup2(ours, 1)
        os.close(ours)


def _beats(one: Plan, other: Plan) -> bool:
    """No worse anywhere, better somewhere."""
    pairs = list(zip(one.loss_L, other.loss_L, strict=True))
    return all(a <= b for a, b in pairs) and any(a < b for a, b in pairs)


def _solver() -> tuple[Any, Any]:
    """scipy.optimize and scipy.sparse."""
    try:
        from scipy import optimize, sparse
    except ImportError as problem:
        raise MissingExtraError(
            "finder: profile solves mixed-integer programs with SciPy, which is not installed",
            next_step="pip install reattend[solver], or use finder: search",
        ) from problem
    return optimize, sparse
