"""What the kernels are meant to reach, judged on a row of the results: pass, fail or unmeasured.

Nothing here measures: `judge` reads a row that `python kernels/bench` wrote. A goal that does not
apply to a row (a decode bound by arithmetic, a density that does not allow the speed-up) says why.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

Row = dict[str, Any]
LEAST_DENSITY = 0.02
UNMEASURED = "unmeasured"


@dataclass(frozen=True)
class Verdict:
    """One goal on one row.

    Attributes:
        goal: its name.
        case: the row's.
        ok: whether it is reached; None: unmeasured or does not apply.
        value: what was measured.
        limit: what it must be.
        why: why there is no verdict.
    """

    goal: str
    case: str
    ok: bool | None
    value: float | None = None
    limit: float | None = None
    why: str = ""


class Missing(Exception):  # noqa: N818  (a reason, not an error)
    """Why a goal has no verdict on a row."""


Judged = tuple[float, float, bool]  # value, limit, whether less is better


def fastest(row: Row, *endings: str) -> Row | None:
    """The fastest peer whose name ends so; None: none of them ran."""
    peers = row.get("peers", {})
    found = [p for name, p in peers.items() if "ms" in p and name.endswith(endings)]
    return min(found, key=lambda peer: float(peer["ms"]), default=None)


def _rival(row: Row, *endings: str) -> Row:
    peer = fastest(row, *endings)
    if peer is None:
        raise Missing("no such peer ran")
    return peer


def _copy_bandwidth(row: Row) -> Judged:
    if row["bound"] != "bytes":
        raise Missing("bound by arithmetic")
    return row["fraction_of_floor"], 0.85, False


def _original_bytes(row: Row) -> Judged:
    shares = []
    for ending in ("original MHA", "original 8 KV heads"):
        peer = fastest(row, ending)
        if peer is not None:
            shares.append(peer["times_faster"] / peer["bytes_ratio"])
    if not shares:
        raise Missing("no original fits on the device")
    return min(shares), 0.85, False


def _equal_flops(row: Row) -> Judged:
    peer = _rival(row, "flash, equal FLOPs")
    return peer["times_faster"] / peer["flops_ratio"], 0.9, False


def _density(row: Row) -> Judged:
    if row["density"] < LEAST_DENSITY:
        raise Missing(f"density {row['density']:.2%} is below {LEAST_DENSITY:.0%}")
    flash = _rival(row, "flash")
    return flash["times_faster"] * row["density"], 0.8, False


def _times_flash(least: float) -> Callable[[Row], Judged]:
    def judged(row: Row) -> Judged:
        flash = _rival(row, "flash")
        if 1 / row["density"] < least:
            told = f"its density allows {1 / row['density']:.1f} x; measured"
            raise Missing(f"{told} {flash['times_faster']:.1f} x")
        return flash["times_faster"], least, False

    return judged


def _dense_bytes(row: Row) -> Judged:
    peer = _rival(row, "flash", "cudnn")
    return peer["times_faster"] / peer["bytes_ratio"], 0.85, False


def _share(row: Row) -> Judged:
    peer = _rival(row, "flash", "ours, all heads")
    return 1 / peer["times_faster"], row["share"] + 0.1, True


def _fla(row: Row) -> Judged:
    peer = _rival(row, "fla")
    return peer["times_faster"], 1.0, False


def _fla_backward(row: Row) -> Judged:
    peer = _rival(row, "fla")
    if "backward_ms" not in peer or "backward_ms" not in row:
        raise Missing(UNMEASURED)
    ours = row.get("backward_events_ms", row["backward_ms"])  # both timed in the same way
    return peer["backward_ms"] / ours, 1.0, False


def _backward(row: Row) -> Judged:
    if "backward_ms" not in row:
        raise Missing(UNMEASURED)
    return row["backward_ms"] / row["ms"], 2.5, True


def _layout(row: Row) -> Judged:
    if "layout_first_ms" not in row:
        raise Missing(UNMEASURED)
    each = row["layout_first_ms"] / row["layout_layers"]
    return max(each, row["layout_again_ms"]) / row["ms"], 0.05, True


#: name: what it says, and how it is judged
GOALS: dict[str, tuple[str, Callable[[Row], Judged]]] = {
    "copy bandwidth": ("at least 85 % of copy bandwidth, where bytes bind", _copy_bandwidth),
    "bytes of the original": (
        "speed-up over the original's decode of at least 0.85 x the ratio of bytes", _original_bytes
    ),
    "flash at equal FLOPs": ("at least 0.9 x flash's rate", _equal_flops),
    "density": ("time of at most dense flash x density / 0.8", _density),
    "40 x flash": ("at least 40 x dense flash", _times_flash(40)),
    "25.3 x flash": ("at least 25.3 x dense flash, where density allows", _times_flash(25.3)),
    "bytes of dense": ("speed-up over dense decode of at least 0.85 x the bytes", _dense_bytes),
    "share of dense": ("time of at most (share + 0.1) x dense", _share),
    "fla forward": ("at least fla-core's speed, forward", _fla),
    "fla backward": ("at least fla-core's speed, backward", _fla_backward),
    "backward": ("backward of at most 2.5 x forward", _backward),
    "layout": (
        "a layer's share of building all layouts of a new length at most 5 % of its call", _layout
    ),
}  # fmt: skip


def judge(goal: str, name: str, row: Row | None) -> Verdict:
    """One goal on the row of a case; None: it was not measured.

    Args:
        goal: of `GOALS`.
        name: of the case.
        row: what `python kernels/bench` wrote.
    """
    if row is None or "ms" not in row:
        return Verdict(goal, name, None, why=UNMEASURED if row is None else row["refused"])
    try:
        value, limit, less = GOALS[goal][1](row)
    except Missing as missing:
        return Verdict(goal, name, None, why=str(missing))
    except KeyError as missing:  # the row is of an older form
        return Verdict(goal, name, None, why=f"the row does not tell {missing}")
    return Verdict(goal, name, value <= limit if less else value >= limit, value, limit)


def judge_all(wanted: Iterable[tuple[str, tuple[str, ...]]], rows: Iterable[Row]) -> list[Verdict]:
    """Every goal of every case, in the order of `GOALS`.

    Args:
        wanted: names of cases and of their goals.
        rows: of the results.
    """
    found = {row["case"]: row for row in rows}
    pairs = [(goal, name) for name, goals in wanted for goal in goals]
    order = list(GOALS)
    pairs.sort(key=lambda pair: order.index(pair[0]))
    return [judge(goal, name, found.get(name)) for goal, name in pairs]


def goal_table(verdicts: list[Verdict]) -> str:
    """Markdown: every goal with a verdict, and what is unmeasured in one line."""
    told = [v for v in verdicts if v.why != UNMEASURED]
    passed = sum(v.ok is True for v in told)
    failed = sum(v.ok is False for v in told)
    open_ = [v for v in verdicts if v.why == UNMEASURED]
    lines = [
        f"Goals: {passed} reached, {failed} missed, {len(told) - passed - failed} do not apply or"
        f" could not be judged, {len(open_)} unmeasured.",
        "",
        "| goal | problem | measured | needed | |",
        "|---|---|---:|---:|---|",
    ]
    for v in told:
        if v.value is None or v.limit is None:
            lines.append(f"| {v.goal} | {v.case} | | | {v.why} |")
        else:
            verdict = "reached" if v.ok else "**missed**"
            lines.append(f"| {v.goal} | {v.case} | {v.value:.2f} | {v.limit:.2f} | {verdict} |")
    lines += ["", *(f"`{name}`: {text}." for name, (text, _) in GOALS.items())]
    for name in GOALS:
        cases = [v.case for v in open_ if v.goal == name]
        if cases:
            lines.append(f"Unmeasured, `{name}`: {'; '.join(cases)}.")
    return "\n".join(lines)
