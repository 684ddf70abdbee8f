"""How the GPU benchmark times what a graph cannot hold or what compiles long, without a GPU."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

BENCH = Path(__file__).parents[1] / "kernels" / "bench"

# a capture that fails leaves its stream current and the generator counting, as torch's does
FAKE = """
import sys
sys.path.insert(0, sys.argv[1])
import torch
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace as Names
import pools, timing
state = Names(stream="default", counting=False, broken=False, refuses=False, clock=0.0)
class Event:
    def __init__(self, enable_timing): pass
    def record(self): self.at = state.clock
    def synchronize(self): pass
    def elapsed_time(self, end): return end.at - self.at
class Stream:
    def wait_stream(self, other): pass
@contextmanager
def graph(made):
    before, state.stream, state.counting = state.stream, "capture", True
    yield
    if state.refuses:
        raise RuntimeError("operation would make the legacy stream depend on a blocking stream")
    state.stream, state.counting = before, False
def sync():
    if state.broken:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")
def restored(x):
    assert x == "fresh"
    state.counting = False
cuda = torch.cuda
cuda.Event, cuda.Stream, cuda.graph, cuda.synchronize = Event, Stream, graph, sync
cuda.stream, cuda.current_stream = lambda s: nullcontext(), lambda: Stream()
cuda.set_stream = lambda stream: setattr(state, "stream", "default")
cuda.CUDAGraph = lambda: Names(replay=lambda: call())
cuda.get_sync_debug_mode, cuda.set_sync_debug_mode = lambda: 0, lambda mode: None
cuda.current_device = lambda: 0
cuda.default_generators = [Names(graphsafe_set_state=restored)]
torch.Generator = lambda device: Names(graphsafe_get_state=lambda: "fresh")
def call():
    state.clock += 2.0
assert timing.measured([call] * 16) == (2.0 / 16, False)  # a replay is one call here
assert not pools._SPOILED
state.refuses = True
assert timing.measured([call] * 16) == (2.0, True)
assert state.stream == "default" and not state.counting and pools._SPOILED
assert timing.events_ms([call] * 3) == 2.0
state.broken = True
for refuses in (False, True):
    state.refuses = refuses
    try:
        timing.measured([call])
    except RuntimeError as error:
        assert "illegal" in str(error)
    else:
        raise AssertionError
"""


def test_a_failed_capture_is_timed_by_events_and_leaves_the_process_sane() -> None:
    run = subprocess.run(
        [sys.executable, "-c", FAKE, str(BENCH)], capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr


TUNING = """
import os, sys
sys.path.insert(0, sys.argv[1])
from types import SimpleNamespace as Names
import speed, tuning
from cases import Case
from peers import Peer
from triton.runtime.autotuner import Autotuner
tuner = Names(configs=list(range(7)), early_config_prune=None, perf_model=None)
found = []
for part in range(3):
    with tuning.share_of_configs(part, 3):
        found.append(Autotuner.prune_configs(tuner, {}))
assert sorted(sum(found, [])) == tuner.configs and max(map(len, found)) == 3, found
with tuning.share_of_configs(9, 10):
    assert Autotuner.prune_configs(tuner, {}) == [0]  # none may be left without
assert Autotuner.prune_configs(tuner, {}) == tuner.configs
assert os.environ["FLA_CACHE_RESULTS"] == "0"
case = Case("a", "attention", 1, 4, 2, 64, 64, 16)
speed.peers = lambda case: [Peer("x", case, None, compiles=3), Peer("y", case, None)]
speed.side_by_side = lambda work, jobs, deadline: found.append(jobs)
speed.compile_all([case], 0.0)
assert [(job.peer, *rest) for job, *rest in found[-1]] == [
    ("", 0, 1), ("x", 0, 3), ("x", 1, 3), ("x", 2, 3),
]
"""


def test_what_a_peer_chooses_among_is_compiled_in_parts() -> None:
    run = subprocess.run(
        [sys.executable, "-c", TUNING, str(BENCH)], capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
