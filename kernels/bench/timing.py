"""How the benchmark measures: graph replay over rotating inputs, host time, and the two ceilings;
ways that take turns on a CPU.

A replayed CUDA graph holds one call per input set, so launches cost the device what they cost it
and nothing waits for Python. Input sets together are several times the L2, so no call finds its
cache there because the one before read the same.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from pools import spoil

ROTATE_BYTES = 400_000_000  # several times the L2 of any GPU listed
MAX_SETS = 16
CALLS_PER_GRAPH = 16
ROUNDS = 15
TIME_MS = 600.0  # that one measurement may take, about
LONG_MS = 20.0  # of a call whose launch does not matter

Call = Callable[[], Any]


def input_sets(bytes_per_set: int) -> int:
    """How many input sets rotate."""
    return min(max(2, -(-ROTATE_BYTES // max(bytes_per_set, 1))), MAX_SETS)


@contextmanager
def capturing(graph: torch.cuda.CUDAGraph) -> Iterator[None]:
    """As `torch.cuda.graph`, which leaves its stream and generator in place when it fails.

    The allocator then still waits for the capture's end, so a worker runs no other job.
    """
    stream, generator = torch.cuda.current_stream(), torch.Generator("cuda")
    try:
        with torch.cuda.graph(graph):
            yield
    except BaseException:
        spoil()
        torch.cuda.set_stream(stream)
        default = torch.cuda.default_generators[torch.cuda.current_device()]
        default.graphsafe_set_state(generator.graphsafe_get_state())
        raise


def replay_ms(calls: Sequence[Call], rounds: int = ROUNDS, repeats: int | None = None) -> float:
    """Milliseconds of one call: median over replays of a graph that holds every call.

    Args:
        calls: the same work over different inputs.
        rounds: replays that are timed.
        repeats: how often a graph holds every call; as many as make 16 calls when None.
    """
    if repeats is None:
        repeats = max(1, CALLS_PER_GRAPH // len(calls))
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for call in calls:
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with capturing(graph):
        for _ in range(repeats):
            for call in calls:
                call()
    graph.replay()
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    times: list[float] = []
    for _ in range(rounds):
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end))
    return statistics.median(times) / (repeats * len(calls))


class Timed(NamedTuple):
    """Milliseconds of one call, and whether it was launched from Python because it has to be."""

    ms: float
    eager: bool


def measured(calls: Sequence[Call]) -> Timed:
    """Milliseconds of one call: graph replay where it is short and never waits for the host.

    Args:
        calls: the same work over different inputs.
    """
    torch.cuda.synchronize()
    mode = torch.cuda.get_sync_debug_mode()
    try:
        calls[0]()  # allocations and compiling may wait
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        calls[0]()
        waits = False
    except RuntimeError as error:
        if "synchronizing" not in str(error):
            raise
        waits = True
    finally:
        torch.cuda.set_sync_debug_mode(mode)
    once = call_ms(calls[0], 1)
    if waits or once > LONG_MS:
        rounds = max(3, min(ROUNDS, int(TIME_MS / max(once, 1e-3))))
        return Timed(call_ms(calls[0], rounds), waits)
    repeats = max(1, min(CALLS_PER_GRAPH // len(calls), int(TIME_MS / 10 / (once * len(calls)))))
    rounds = max(3, min(ROUNDS, int(TIME_MS / (once * repeats * len(calls)))))
    try:
        return Timed(replay_ms(calls, rounds, repeats), False)
    except RuntimeError:  # what a graph cannot hold; a device that broke raises again
        torch.cuda.synchronize()
        return Timed(events_ms(calls), True)


def eager_ms(calls: Sequence[Call], rounds: int = 5) -> float:
    """Milliseconds of one call launched from Python, host and device together."""
    times: list[float] = []
    for _ in range(rounds + 1):  # the first warms up
        torch.cuda.synchronize()
        began = time.perf_counter()
        for call in calls:
            call()
        torch.cuda.synchronize()
        times.append((time.perf_counter() - began) * 1e3)
    return statistics.median(times[1:]) / len(calls)


def call_ms(call: Call, rounds: int = ROUNDS) -> float:
    """Milliseconds of one call between events, for work so long that its launch does not matter.

    A copy must not be measured in a graph: as a graph node it leaves the multiprocessors to a copy
    engine, which is slower.
    """
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    times: list[float] = []
    for _ in range(rounds + 1):
        begin.record()
        call()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end))
    return statistics.median(times[1:])


def events_ms(calls: Sequence[Call]) -> float:
    """Milliseconds of one of these calls, launched in a row between events.

    Args:
        calls: the same work over different inputs.
    """

    def every() -> None:
        for call in calls:
            call()

    once = call_ms(every, 1)
    rounds = max(3, min(ROUNDS, int(TIME_MS / max(once, 1e-3))))
    return call_ms(every, rounds) / len(calls)


def in_turns(calls: Mapping[str, Call], rounds: int) -> dict[str, dict[str, float]]:
    """Medians of processor and wall time in ms, on a CPU, under the names of the calls.

    Calls take turns, each once before the clock of its turn starts, short ones in tens.
    """
    cpu: dict[str, list[float]] = {name: [] for name in calls}
    wall: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            times = 10 if time.perf_counter() - start < 0.02 else 1
            for _ in range(times):
                start, busy = time.perf_counter(), time.thread_time()
                call()
                cpu[name].append(1000 * (time.thread_time() - busy))
                wall[name].append(1000 * (time.perf_counter() - start))
    return {
        name: {
            "cpu_ms": round(statistics.median(cpu[name]), 4),
            "wall_ms": round(statistics.median(wall[name]), 4),
        }
        for name in calls
    }


def times_faster(found: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """How many times as long as `ours` the others took, by processor time."""
    ours = found["ours"]["cpu_ms"]
    return {name: round(row["cpu_ms"] / ours, 2) for name, row in found.items() if name != "ours"}


def copy_gb_per_s(size: int = 1 << 32) -> float:
    """GB read and written per second by a large device-to-device copy."""
    source = torch.randint(0, 255, (size // 2,), dtype=torch.int16, device="cuda")
    target = torch.empty_like(source)
    return 2 * size / call_ms(lambda: target.copy_(source)) / 1e6


def matmul_tflops(size: int = 8192, dtype: torch.dtype = torch.bfloat16) -> float:
    """Matrix products of random data, in TFLOP/s."""
    a, b = (torch.randn(size, size, device="cuda").to(dtype) for _ in range(2))
    return 2 * size**3 / call_ms(lambda: a @ b) / 1e9
