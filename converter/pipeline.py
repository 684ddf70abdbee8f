"""The steps of one conversion, each reported and timed, resumable where long.

`reattend.api.convert` calls them in order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from reattend.allocation import allocate, waiting
from reattend.api import Result
from reattend.calibrate.ranks import agreed
from reattend.events import Event, OnEvent
from reattend.factory import read_inputs
from reattend.finder import FoundAttention, find_attention
from reattend.fingerprint import run_fingerprint
from reattend.foresight import foresee, is_large
from reattend.lowering import check_choices, check_targets, lower
from reattend.materials import Materials, check_data, load_materials, text_block
from reattend.moments import site_moments
from reattend.outdir import check_claimable
from reattend.plan import Plan
from reattend.plan_target import target_name
from reattend.predict import Prediction, predict
from reattend.preflight import Choice, check_inplace, choose, preflight
from reattend.processes import is_main
from reattend.reporting import build_report
from reattend.rewriting import Rewritten, normal_forms, rewrite
from reattend.runlog import RunLog
from reattend.source import Source, open_source
from reattend.statistics import SiteStatistics
from reattend.verify.evidence import gather
from reattend.verify.gates import enforce_gates
from reattend.verify.subject import Subject
from reattend.workdir import Workdir, digest

if TYPE_CHECKING:
    from reattend.calibrate import StageResult

T = TypeVar("T")

#: stages that report their own units
_COUNTED = frozenset({"statistics", "choose", "rewrite", "layerwise", "end-to-end"})


@dataclass
class Job:
    """One conversion: what `convert` was given, and what its steps have made so far.

    Started by torchrun or accelerate, every process does the same work and shares out the
    training; the first one writes and reports. `inputs` may be a safetensors file, read once the
    model is open.
    """

    plan: Plan
    inputs: dict[str, Any] | Path | None = None
    data: Any = None
    seed: int = 0
    inplace: bool = False
    out: Path | None = None
    overwrite: bool = False
    on_event: OnEvent | None = None
    log: RunLog = field(default_factory=RunLog)

    source: Source = field(init=False)
    example: dict[str, Any] | None = field(init=False)
    found: FoundAttention = field(init=False)
    choices: list[Choice] = field(init=False)
    materials: Materials = field(init=False)
    work: Workdir | None = field(init=False, default=None)
    done: Rewritten = field(init=False)
    stages: list[StageResult] = field(init=False, default_factory=list)
    result: Result = field(init=False)

    def open(self, model: Any, **opening: Any) -> None:
        """Check what can be checked at once, then open the model."""
        if not is_main():
            self.on_event = None
        check_targets(self.plan, self.out)
        check_data(self.plan, self.data)
        check_inplace(self.plan, self.inplace)
        if self.out is not None:
            check_claimable(self.out.expanduser().absolute())
        torch.manual_seed(self.seed)
        from torch.export import _trace  # noqa: F401  (loaded code is no growth)

        if not isinstance(model, torch.nn.Module):
            import reattend.targets.huggingface  # noqa: F401  (likewise)
        self.log.begin()
        trust = bool(opening.get("trust_remote_code"))
        if is_large(model) and not isinstance(self.inputs, Path):
            self._stage("preflight", partial(foresee, model, self.plan, self.inputs, trust))
        self.source = self._stage("open", lambda: open_source(model, **opening))
        given = self.inputs
        self.example = read_inputs(given, self.source.model) if isinstance(given, Path) else given

    def find(self) -> None:
        """Capture the graph, read every block, and prove it."""
        model, example = self.source.model, self.example
        self.found = self._stage("find", lambda: find_attention(model, example))

    def preflight(self) -> None:
        """What the plan does with every site; all refusals at once. Then the data."""
        self.choices = preflight(self.found, self.plan)
        check_choices(self.plan, self.source.model, self.choices)
        self.materials = self._stage("data", self._read_data)
        self.log.predicted = self._predict().peaks

    def forecast(self) -> Prediction:
        """In place of `preflight`: what every site would become, refused or not, and its cost.

        Nothing is written. Refusals are in `choices`; `preflight.enforce` raises them.
        """
        self.choices = choose(self.found, self.plan)
        if not any(c.action == "refused" for c in self.choices):
            check_choices(self.plan, self.source.model, self.choices)
        self.materials = Materials()
        if self.data is not None or self.plan.calibrate.data not in (None, "self"):
            self.materials = self._stage("data", self._read_data)
        return self._predict()

    @contextmanager
    def folder(self) -> Iterator[bool]:
        """The folder of the work, locked; gives whether this very result is already complete."""
        if self.out is None or not is_main():
            yield self.out is not None and self._already_there(False)
            return
        prints = run_fingerprint(self.source, self.plan, self.materials, self.seed)
        with Workdir.open(self.out, prints, self.overwrite) as self.work:
            if self.work.state == "resumed":
                self._tell("resume", message="continuing an interrupted run")
            yield self._already_there(self.work.state == "complete")

    def rewrite(self) -> None:
        """Statistics; the sizes that wait for them; then every block, in a copy of the model."""
        moments = self._stage("statistics", self._statistics)
        if waiting(self.choices):
            self._stage("choose", lambda: self._choose(moments))
        self.done = self._stage("rewrite", lambda: self._rewrite(moments))

    def calibrate(self) -> None:
        """Distil the original into the converted model, if the plan trains."""
        settings = self.plan.calibrate
        if not settings.trains:
            return
        from reattend.calibrate import calibrate

        assert self.materials.training is not None
        # gates may change without training anew
        rules = [r.to_dict() for r in self.plan.rules]
        fixed = [rules, self.plan.on_refusal, self.materials.fingerprint, self.seed]
        self.stages = calibrate(
            self.source.model, self.done.model, self.materials.training, settings,
            seed=self.seed if settings.seed is None else settings.seed, workdir=self.work,
            inputs_hash=digest([self.source.state, *fixed]), on_event=self.on_event,
            around=self.log.stage,
            originals=lambda model: normal_forms(model, self.choices),
        )  # fmt: skip
        self.log.reused(*(s.name for s in self.stages if s.reused))

    def verify(self) -> None:
        """Compare with the original, write the report, and hold it to the plan's gates.

        Raises:
            GateError: a gate or a check failed; nothing is published.
        """
        source, example = self.source, self.example
        subject = Subject(
            self.plan, self.seed, source, self.found, self.choices, self.done, self.materials,
            self.work, lambda what: self._tell("verify", message=what),
        )  # fmt: skip
        evidence = self._stage("verify", lambda: gather(subject, example, inplace=self.inplace))
        evidence.stages = self.stages
        report = build_report(subject, evidence)
        enforce_gates(report)
        self.result = Result(self.done.model, report, None, None, source.tokenizer, source.home)

    def lower(self) -> None:
        """Publish the checkpoint, and what else the plan's `targets` ask for."""
        work, result = self.work, self.result
        if work is not None:
            from reattend.publishing import publish_result

            self._stage("publish", lambda: publish_result(result, work))
            for target in self.plan.targets:
                stage = f"lower to {target_name(target)}"
                self._stage(stage, partial(lower, result, work, target))
            result.out = work.out
        result.run = self.log.finish(self.source, self.out)
        if work is not None:
            work.publish_bytes("run.json", result.run.to_json().encode())
            work.finish()
            self._tell("done", message=f"published to {work.out.name}")

    def _read_data(self) -> Materials:
        needed = any(c.needs for c in self.choices)
        return load_materials(self.source, self.plan, self.data, seed=self.seed, needed=needed)

    def _predict(self) -> Prediction:
        return predict(
            self.source.model, self.choices, self.plan, self.found.capture.inputs,
            rows=self.materials.rows, text=text_block(self.plan, self.data),
            owned=self.source.owned,
        )  # fmt: skip

    def _already_there(self, complete: bool) -> bool:
        """Whether the first process found this very result; then it is loaded."""
        if self.out is None or not agreed(complete, self.source.device):
            return False
        from reattend.publishing import load_folder
        from reattend.report import Report

        out, source = self.out.expanduser().absolute(), self.source
        self._tell("done", message=f"{out.name} is already complete: nothing to do")
        model, report = load_folder(out, None), Report.load(out)
        self.result = Result(model, report, None, out, source.tokenizer, source.home)
        return True

    def _statistics(self) -> dict[str, SiteStatistics]:
        wanted, data = [c for c in self.choices if c.needs], self.materials.statistics
        if not wanted or data is None:
            return {}

        def progress(tokens: int) -> None:
            self._tell("statistics", done=min(tokens, data.tokens), total=data.tokens)

        moments, reused = site_moments(
            self.source.model, self.source.state, self.found, wanted, data,
            self.plan.calibrate.batch_size, self.work, progress,
        )  # fmt: skip
        self._note_reused("statistics", reused)
        return moments

    def _choose(self, moments: dict[str, SiteStatistics]) -> None:
        def progress(done: int, total: int, path: str) -> None:
            self._tell("choose", site=path, done=done, total=total)

        reused = allocate(
            self.source.model, self.source.state, self.choices, moments,
            self.materials.statistics, self.work, progress,
        )  # fmt: skip
        self._note_reused("choose", reused)

    def _rewrite(self, moments: dict[str, SiteStatistics]) -> Rewritten:
        def progress(choice: Choice, done: int, total: int) -> None:
            self._tell("rewrite", site=choice.site.path, layer=choice.layer, done=done, total=total)

        return rewrite(
            self.source.model, self.choices, moments, capture=self.found.capture,
            inplace=self.inplace, owned=self.source.owned, spend=True, progress=progress,
        )  # fmt: skip

    def _note_reused(self, stage: str, reused: bool) -> None:
        if reused:
            self._tell(stage, message="reused from the interrupted run")
            self.log.reused(stage)

    def _stage(self, name: str, work: Callable[[], T]) -> T:
        self._tell(name)
        with self.log.stage(name):
            done = work()
        if name not in _COUNTED:
            self._tell(name, done=1, total=1)
        return done

    def _tell(self, stage: str, **what: Any) -> None:
        if self.on_event is not None:
            self.on_event(Event(stage, **what))
