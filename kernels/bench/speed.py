"""Times cases and their peers, one after the other in a process that is replaced where one breaks.

Every time is kept as it comes. What failed or is missing is tried again by a later run, after all
that was never tried.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from cases import Case
from peers import Peer, peers
from pools import LATE, Outcome, each_ended, side_by_side, told
from proofs import Key, needs
from rows import Job, Row, begun, timed, warm

COMPILE_SECONDS = 150.0  # before anything is timed
LIMIT = 120.0  # seconds for one time, what is compiled and chosen for it included
Report = dict[str, Any]


def lacks(case: Case, row: Row | None, sources: dict[str, str]) -> bool:
    """Whether something of a case is still to be timed."""
    if row is None or "ms" not in row or row.get("sources") != sources[case.op]:
        return True
    if "peers_refused" in row or (case.backward and "backward_ms" not in row):
        return True
    return any(_open(row, peer.name) for peer in _others(case, row))


def _others(case: Case, row: Row) -> list[Peer]:
    """A case's peers; none where naming them fails, which its row tells."""
    row.pop("peers_refused", None)
    try:
        return list(peers(case))
    except Exception as error:  # of one case
        row["peers_refused"] = told(error)
        return []


def _open(row: Row, name: str) -> bool:
    found = row["peers"].get(name, {})
    return not found or any(str(why).startswith(LATE) for why in found.values())


def jobs_of(case: Case, row: Row, red: dict[Key, str], ceilings: dict[str, float]) -> Iterator[Job]:
    """What a row lacks, one after the other: what is next depends on what the last one told."""
    if "ms" not in row:
        yield Job(case, "forward", ceilings=ceilings)
    if "ms" not in row:
        return
    if case.backward and "backward_ms" not in row:
        row.pop("backward_refused", None)
        why = [red[key] for key in needs(case, "backward") if key in red]
        if why:
            row["backward_refused"] = f"not timed: {'; '.join(why)}"
        else:
            yield Job(case, "backward")
    for peer in _others(case, row):
        if _open(row, peer.name):
            yield Job(case, "forward", peer.name)
        found = row["peers"].get(peer.name, {})
        told_of = {"backward_ms", "backward_refused"} & found.keys()
        if case.backward and peer.back and "ms" in found and not told_of:
            yield Job(case, "backward", peer.name)


def note(job: Job, row: Row, outcome: Outcome) -> None:
    """Add what a job told to its row."""
    entry, found = row, outcome.value
    refused = "refused" if job.part == "forward" else "backward_refused"
    if job.peer:
        entry = row["peers"].setdefault(job.peer, {})
        if job.part == "forward":
            entry.clear()
    entry.pop(refused, None)
    entry |= {refused: outcome.failed} if outcome.failed else found
    if job.peer and job.part == "forward" and not outcome.failed:
        entry["times_faster"] = round(found["ms"] / row["ms"], 3)


def compile_all(cases: list[Case], deadline: float) -> None:
    """Leave every program on disk; what does not compile is reported when it is timed."""
    todo = [(Job(case, "forward"), 0, 1) for case in cases]
    for case in cases:
        for peer in _others(case, {}):
            job = Job(case, "forward", peer.name)
            todo += [(job, part, peer.compiles) for part in range(peer.compiles)]
    side_by_side(warm, todo, deadline)


def time_all(
    cases: list[Case],
    report: Report,
    red: dict[Key, str],
    sources: dict[str, str],
    deadline: float,
    saved: Callable[[Row], None],
) -> None:
    """Time what cases lack.

    Args:
        cases: those whose forward is proven.
        report: its rows are added to and replaced.
        red: what is not proven.
        sources: fingerprints of the ops.
        deadline: of `time.monotonic`.
        saved: called with every row that told something new.
    """
    rows = {row["case"]: row for row in report["speed"]}
    now: list[Row] = []
    asked: list[Job] = []

    def jobs() -> Iterator[Job]:
        for case in sorted(cases, key=lambda case: case.name in rows):
            row = rows.get(case.name)
            if row is None or "ms" not in row or row.get("sources") != sources[case.op]:
                row = begun(case) | {"sources": sources[case.op]}
            now[:] = [row]
            for job in jobs_of(case, row, red, report["ceilings"]):
                asked.append(job)
                yield job

    for index, outcome in each_ended(timed, jobs(), deadline, 1, LIMIT):
        row = now[0]
        note(asked[index], row, outcome)
        rows[row["case"]] = row
        report["speed"] = list(rows.values())
        saved(row)
