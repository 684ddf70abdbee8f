"""Run by test_kill.py in a process of its own: conversions that die at chosen moments.

Packages are imported and the attention found once; every conversion then runs in a forked child,
so that a hundred of them take a minute. `python kill_harness.py REQUEST.json` prints one JSON line.
"""

from __future__ import annotations

import gc
import json
import os
import random
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

KILLED = 9


def prepare(model: str, plan: dict[str, Any], data: str) -> Callable[[Path], None]:
    """Import and warm up everything; returns one conversion into a folder."""
    import torch

    torch.set_num_threads(1)
    from transformers.utils import logging

    logging.disable_progress_bar()
    from reattend import convert, pipeline

    original, memo = pipeline.find_attention, {}

    def found_once(module: Any, inputs: Any = None) -> Any:
        if "found" not in memo:
            memo["found"] = original(module, inputs)
        return memo["found"]

    pipeline.find_attention = found_once
    light = {k: plan["calibrate"][k] for k in ("seq_len", "statistics_tokens")}
    convert(model, {"rules": plan["rules"], "calibrate": light}, data=data).report.to_html()
    gc.freeze()  # the children look for garbage among their own objects only

    def run(out: Path) -> None:
        convert(model, plan, data=data, out=out, seed=3)

    return run


def in_child(work: Callable[[], None]) -> int:
    """Fork, run, wait; the child's exit status, or 128 + its signal."""
    pid = os.fork()
    if pid == 0:
        try:
            work()
        except BaseException:
            import traceback

            traceback.print_exc()
            os._exit(70)
        os._exit(0)
    return code_of(os.waitpid(pid, 0)[1])


def code_of(status: int) -> int:
    return os.WEXITSTATUS(status) if os.WIFEXITED(status) else 128 + os.WTERMSIG(status)


def at_points(hook: Callable[[str, str], None]) -> None:
    """Call `hook(phase, name)` wherever a kill could fall inside a durable write."""
    from reattend.workdir import Workdir

    Workdir._at = lambda _self, phase, name: hook(phase, name)  # type: ignore[method-assign]


def points_of(run: Callable[[Path], None], out: Path) -> list[str]:
    """Every point of an uninterrupted run, in order."""
    log = out.with_suffix(".points")

    def note(phase: str, name: str) -> None:
        with log.open("a") as file:
            file.write(f"{phase} {name}\n")

    def work() -> None:
        at_points(note)
        run(out)

    code = in_child(work)
    if code:
        raise SystemExit(f"the uninterrupted run ended with {code}")
    return log.read_text().splitlines()


def die_at(run: Callable[[Path], None], out: Path, count: int) -> int:
    """Run until the point number `count` (from 1) and die there, as by kill -9."""
    seen = [0]

    def hook(_phase: str, _name: str) -> None:
        seen[0] += 1
        if seen[0] == count:
            os._exit(KILLED)

    def work() -> None:
        at_points(hook)
        run(out)

    return in_child(work)


def chain(run: Callable[[Path], None], out: Path) -> int:
    """One output, killed at the first point never killed at before, until it is complete."""
    log = out.with_suffix(".killed")
    log.touch()

    def hook(phase: str, name: str) -> None:
        before = log.read_text().splitlines()
        if f"{phase} {name}" not in before:
            with log.open("a") as file:
                file.write(f"{phase} {name}\n")
            os._exit(KILLED)

    def work() -> None:
        at_points(hook)
        run(out)

    while (code := in_child(work)) == KILLED:
        if out.exists() and "renamed" not in log.read_text():
            raise SystemExit("an output before it was complete")
    if code:
        raise SystemExit(f"a resumed run ended with {code}")
    return len(log.read_text().splitlines())


def each(run: Callable[[Path], None], folder: Path, count: int) -> None:
    """For every point a fresh output: die there, then resume."""
    for number in range(1, count + 1):
        out = folder / f"each-{number}"
        if die_at(run, out, number) != KILLED:
            raise SystemExit(f"no kill at point {number}")
        if code := in_child(lambda out=out: run(out)):  # type: ignore[misc]
            raise SystemExit(f"resuming after point {number} ended with {code}")


def while_gates_learn(run: Callable[[Path], None], out: Path) -> None:
    """Die when the gates of the second block begin to learn, then resume."""
    from reattend.passes.rewrite import sparse_teach

    original, seen = sparse_teach._train, [0]

    def train(*given: Any) -> str:
        seen[0] += 1
        if seen[0] == 2:
            os._exit(KILLED)
        return original(*given)

    def work() -> None:
        sparse_teach._train = train
        run(out)

    if in_child(work) != KILLED:
        raise SystemExit("no kill while gates learn")
    if code := in_child(lambda: run(out)):
        raise SystemExit(f"the resumed run ended with {code}")


def at_random(run: Callable[[Path], None], out: Path, seconds: float, seed: int) -> list[float]:
    """Three real kill -9 of one output at random times, then an undisturbed run."""
    times = [random.Random(seed + i).uniform(0.1, 0.95) * seconds for i in range(3)]
    for wait in times:
        pid = os.fork()
        if pid == 0:
            run(out)
            os._exit(0)
        time.sleep(wait)
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    if code := in_child(lambda: run(out)):
        raise SystemExit(f"the last run ended with {code}")
    return times


def main() -> None:
    request = json.loads(Path(sys.argv[1]).read_text())
    folder = Path(request["folder"])
    run = prepare(request["model"], request["plan"], request["data"])
    whole = folder / "whole"
    points = points_of(run, whole)
    answer: dict[str, Any] = {"points": points}
    if "random" in request["do"]:
        begin = time.monotonic()
        if code := in_child(lambda: run(folder / "again")):
            raise SystemExit(f"the second run ended with {code}")
        answer["seconds"] = time.monotonic() - begin
    if "chain" in request["do"]:
        answer["killed"] = chain(run, folder / "chain")
    if "random" in request["do"]:
        answer["times"] = at_random(run, folder / "random", answer["seconds"], request["seed"])
    if "gates" in request["do"]:
        while_gates_learn(run, folder / "gates")
    if "each" in request["do"]:
        each(run, folder, len(points))
    print(json.dumps(answer))


if __name__ == "__main__":
    main()
