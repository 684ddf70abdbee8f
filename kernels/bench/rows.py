"""Times one problem of the benchmark or one of its peers: parts of a row of the results."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from functools import lru_cache
from typing import Any, NamedTuple

import problems
import torch
from cases import Case
from patterns import heads_of, read_by
from peers import Peer, dense, peers
from problems import ROOM, Problem, compile_case, work_of
from timing import Timed, eager_ms, events_ms, input_sets, measured
from tuning import share_of_configs

Row = dict[str, Any]
LAYERS = 32  # of Llama-2-7B and Llama-3-8B, whose shapes the cases have


def problems_of(case: Case) -> list[Problem]:
    """Several input sets, together larger than the cache, as many as fit.

    Raises:
        MemoryError: one does not fit.
    """
    each = work_of(case).bytes
    if case.pattern:  # the whole cache is there, whatever is read
        each = max(each, work_of(dense(case)).bytes)
    if each > ROOM:
        raise MemoryError(f"{each / 1e9:.0f} GB of inputs and output")
    sets = min(input_sets(work_of(case).bytes), max(1, ROOM // each))
    return [Problem(case, seed=seed) for seed in range(sets)]


class Job(NamedTuple):
    """What is timed in one go, so that what fails or hangs loses nothing else.

    Attributes:
        case: the problem.
        part: ``forward`` or ``backward``.
        peer: name of the peer; ours where empty.
        ceilings: of the device, for a forward of ours.
    """

    case: Case
    part: str
    peer: str = ""
    ceilings: dict[str, float] = {}


def begun(case: Case) -> Row:
    """A row of which nothing is timed yet."""
    return {
        "case": case.name,
        "op": case.op,
        "shape": {k: getattr(case, k) for k in ("b", "h", "g", "n", "m", "d", "rope", "page")},
        "dtype": case.dtype,
        "peers": {},
    }


def peer_of(job: Job) -> Peer:
    """The peer of a job that is of one."""
    return next(peer for peer in peers(job.case) if peer.name == job.peer)


def timed(job: Job) -> Row:
    """In a worker: what one job adds to its row, or to the entry of its peer."""
    torch.cuda.empty_cache()
    if job.peer:
        return (_theirs if job.part == "forward" else _their_gradient)(job)
    return _ours(job.case, job.ceilings) if job.part == "forward" else _our_gradient(job.case)


def warm(given: tuple[Job, int, int]) -> None:
    """In a worker, before anything is timed: compile, which leaves programs on disk.

    Args:
        given: what is timed later; of a peer that chooses among configurations, which part of them
            and of how many.
    """
    job, part, parts = given
    if not job.peer:
        compile_case(job.case)
        return
    peer = peer_of(job)
    with share_of_configs(part, parts):
        peer.make(Problem(peer.case))()
        if peer.back is not None and job.case.backward:
            peer.back(Problem(peer.case))()
        torch.cuda.synchronize()


def _ours(case: Case, ceilings: dict[str, float]) -> Row:
    made = problems_of(case)
    calls = [problem.forward for problem in made]
    ms, eager = measured(calls), eager_ms(calls)
    again = measured(calls)
    work = work_of(case)
    rate = ceilings["matmul_fp32_tflops" if case.dtype == "float32" else "matmul_tflops"]
    floors = {"bytes": work.bytes / ceilings["copy_gb_per_s"] / 1e6, "FLOPs": work.flops / rate}
    floors["FLOPs"] /= 1e9
    bound = max(floors, key=lambda name: floors[name])
    row: Row = {
        "config": made[0].config(),
        "ms": round(ms.ms, 5),
        "ms_again": round(again.ms, 5),
        "eager_ms": round(eager, 5),
        "bound": bound,
        "floor_ms": round(floors[bound], 5),
        "fraction_of_floor": round(floors[bound] / ms.ms, 3),
        "tflops": round(work.flops / ms.ms / 1e9, 1),
        "gb_per_s": round(work.bytes / ms.ms / 1e6, 1),
    }
    if case.pattern:
        row["density"] = round(read_by(case).density, 4)
        if not case.pattern.endswith("blocks"):
            row |= layout_times(case)
    if case.op == "routed_attention":
        row["share"] = case.share
    if ms.eager:
        row["eager"] = True
    return row


def _our_gradient(case: Case) -> Row:
    calls = [problem.backward for problem in problems_of(case)]
    back = measured(calls)
    row: Row = {
        "backward_ms": round(back.ms, 5),
        "backward_events_ms": round(events_ms(calls), 5),  # as peers are timed
    }
    if back.eager:
        row["backward_waits"] = True
    return row


def layout_times(
    case: Case, rounds: int = 3, clock: Callable[[], float] = time.perf_counter
) -> Row:
    """Milliseconds on the host that layouts take in a model of `layout_layers` layers.

    `layout_first_ms`: the first prompt of its length, all patterns and all layers together;
    `layout_again_ms`: one layer of the next prompt. Imports and a short text came before.
    """
    from reattend.mixers.config import CoreConfig
    from reattend.mixers.shared_layouts import Layouts

    core = CoreConfig(
        heads=case.h, kv_heads=case.g, qk_head_dim=case.d, v_head_dim=case.d, scale=1.0,
    )  # fmt: skip
    firsts: list[float] = []
    nexts: list[float] = []
    device, patterns = torch.device(problems.DEVICE), heads_of(case)
    Layouts().get(patterns[0], core, 64, device)
    for _ in range(rounds):  # the layers before are gone: their layouts are freed
        layers = [Layouts() for _ in range(LAYERS)]
        for times in (firsts, nexts):
            began = clock()
            for layer in layers:
                for pattern in patterns:
                    layer.get(pattern, core, case.m, device)
            times.append(1e3 * (clock() - began))
        del layers
    return {
        "layout_first_ms": round(statistics.median(firsts), 4),
        "layout_layers": LAYERS,
        "layout_again_ms": round(statistics.median(nexts) / LAYERS, 4),
    }


@lru_cache(maxsize=64)
def _of_others(peer: Peer) -> Timed:
    """A peer on its own problem."""
    return measured([peer.make(problem) for problem in problems_of(peer.case)])


def _theirs(job: Job) -> Row:
    """Its time, once for all cases that are compared with it, and how its work compares."""
    peer, case = peer_of(job), job.case
    theirs = _of_others(peer)
    found: Row = {
        "ms": round(theirs.ms, 5),
        "bytes_ratio": round(work_of(peer.case).bytes / work_of(case).bytes, 3),
        "flops_ratio": round(work_of(peer.case).flops / work_of(case).flops, 3),
    }
    return found | {"eager": True} if theirs.eager else found


def _their_gradient(job: Job) -> Row:
    peer = peer_of(job)
    assert peer.back is not None
    calls = [peer.back(problem) for problem in problems_of(peer.case)]
    return {"backward_ms": round(events_ms(calls), 5), "backward_eager": True}
